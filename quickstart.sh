#!/usr/bin/env bash
# The whole study in miniature: three losses at two betas on an embedded model, judged and analysed.
# No hub, no API key, no GPU.
#
#   bash quickstart.sh    about eight minutes on two cores after the installs; rerun to continue
#
# Everything goes to quickstart/. The model has 135M parameters and judges itself: this shows that
# the pipeline works and what it leaves on disk. It does not measure which loss is better.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/venv.sh
install_requirements
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
started=$SECONDS

# 1) A model folder, preference pairs and MT-Bench's official files, all from installed packages.
python examples/embedded_model.py quickstart/SmolLM2-135M-Instruct
python prep_data.py --dataset examples/preferences.jsonl --out quickstart/data/preferences
python prep_data.py --mt_bench nvidia --out quickstart/data/mt_bench

# 2) Training, answers, judgements and analysis: the grid in grids/quick.
bash sweep.sh quick --yes

elapsed=$((SECONDS - started))
cat <<TEXT

quickstart finished in $((elapsed / 60)) min $((elapsed % 60)) s after the installs
  report     quickstart/results/comparison/report.html    opens from disk; tables/ and figures/ next to it
  one run    quickstart/results/dpo_b0.5_*/               args.json, metrics.jsonl, adapter/, mt_bench/, figures/
What to run next, after source .venv/bin/activate:
  your data      python prep_data.py --dataset my_pairs.jsonl
  your model     python train_pref.py --model MODEL --data data/my_pairs --loss dpo --mode trial
  the study      python prep_data.py && python prep_data.py --mt_bench && JUDGE=MODEL bash sweep.sh
TEXT
