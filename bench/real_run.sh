#!/usr/bin/env bash
# All stages by hand on real input, with a judge behind a real HTTP server on loopback.
#
#   bash bench/real_run.sh DATASET MT_BENCH_DIR OUT
#
# DATASET       pairs as prep_data.py takes them (bench/README.md: 2,212 pairs ranked by GPT-4)
# MT_BENCH_DIR  folder with MT-Bench's three official files
# OUT           folder to write; rerun to continue
# Needs `pip install "transformers[serving]"` in addition to requirements.txt. No GPU, no key, nothing leaves this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dataset=$1 questions=$2 out=$3
source bench/serve.sh
model=$out/SmolLM2-135M-Instruct port=${PORT:-8811}
export HF_HUB_OFFLINE=1
say() { printf '\n[%s] %s\n' "$(date +%T)" "$*"; }

say "model and data"
python examples/embedded_model.py "$model"
python prep_data.py --dataset "$dataset" --limit 128 --out "$out/data/pairs"
python prep_data.py --mt_bench "$questions" --out "$out/data/mt_bench"

say "24 optimiser steps on real pairs"
python train_pref.py --model "$model" --data "$out/data/pairs" --results_dir "$out/results" --loss dpo --beta 0.1 \
  --learning_rate 2e-4 --global_batch 8 --per_device_batch 4 --epochs 2 --max_steps 24 --eval_steps 12 \
  --max_length 512 --lora_r 16 --lora_dropout 0 --run_id dpo_real

say "the adapter loads with plain PEFT"
python - "$model" "$out/results/dpo_real/adapter" <<'PY'
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
moved = [p.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n]
print(f"{len(moved)} LoRA matrices B, none zero: {min(moved) > 0}")
PY

say "80 x 2 answers"
python gen_mtbench.py "$out/results/dpo_real" --mt_bench "$out/data/mt_bench" --max_new_tokens 128

say "judged over HTTP"
serve "$model" "$port" "$out/serve.log"
OPENAI_API_KEY=local python judge.py "$out/results" --judge "$model" --base_url "http://127.0.0.1:$port/v1" \
  --mt_bench "$out/data/mt_bench" --max_tokens "${JUDGE_TOKENS:-256}" --concurrency 8 || echo "judge.py: exit code $?"

say "analysed"
python analyze.py "$out/results"
say "done"
