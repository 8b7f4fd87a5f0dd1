#!/usr/bin/env bash
# The whole study at small scale, with a score that a program computes: 87 runs of the embedded model, to the report.
#
#   bash bench/controlled_study.sh    about two hours on two cores; rerun to continue
#
# Everything goes to controlled/. The grid is grids/controlled: the default grid (dpo at four betas, td_dpo at four betas and
# three taus, discopop at four betas) and dLRML's nine settings, three seeds each. The pairs are made of the base model's own
# answers to instructions that a program checks (examples/tasks/constraints.py); answers to 60 other instructions are scored.
# The claims of the study, translated to this score, are in controlled_claims.json next to this file. They were written before
# the first run. SEEDS, BETAS, ... in the environment make it smaller or larger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source .ci/venv.sh
install_requirements
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1

python examples/embedded_model.py quickstart/SmolLM2-135M-Instruct
mkdir -p controlled/results
cp bench/controlled_claims.json controlled/results/claims.json
bash sweep.sh controlled --yes
