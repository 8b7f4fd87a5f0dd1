#!/usr/bin/env bash
# A controlled study in miniature: does training on its own answers make the embedded model follow instructions better, with
# which loss, at what distance from where it started? No hub, no API key, no GPU.
#
#   bash quickstart.sh    about eleven minutes on two cores after the installs; rerun to continue
#
# Everything goes to quickstart/. A program checks the instructions (examples/tasks/brevity.py), so that the score is the
# truth and costs nothing. The model has 135M parameters: which loss wins here says little about larger models.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/venv.sh
install_requirements
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
started=$SECONDS

# 1) From installed packages: a model folder, and for the README's other examples preference pairs and MT-Bench's files.
python examples/embedded_model.py quickstart/SmolLM2-135M-Instruct
python prep_data.py --dataset examples/preferences.jsonl --out quickstart/data/preferences
python prep_data.py --mt_bench nvidia --out quickstart/data/mt_bench

# 2) The grid in grids/quick: the base model's answers, their scores, pairs; three losses; answers to other questions, their
#    scores, analysis.
bash sweep.sh quick --yes

elapsed=$((SECONDS - started))
cat <<TEXT

quickstart finished in $((elapsed / 60)) min $((elapsed % 60)) s after the installs
  report     quickstart/results/comparison/report.html    opens from disk; tables/ and figures/ next to it
  pairs      quickstart/results/base/brevity_train/   answers.jsonl, judgements.csv, pairs/
  one run    quickstart/results/dpo_b0.1_*/               args.json, metrics.jsonl, adapter/, brevity/, figures/
What to run next, after source .venv/bin/activate:
  your task      python prep_data.py --task my_task.py --check
  your data      python prep_data.py --dataset my_pairs.jsonl
  your model     python train_pref.py --model MODEL --data data/my_pairs --loss dpo --mode trial
  the study      python prep_data.py && python prep_data.py --mt_bench && JUDGE=MODEL bash sweep.sh
TEXT
