#!/usr/bin/env bash
# train_pref.py against TRL on one GPU: a Llama-2-7B-shaped model of random weights in NF4, real pairs at 2,048 tokens.
#
#   bash bench/gpu.sh PAIRS.jsonl [OUT]          # PAIRS.jsonl: train.jsonl of prep_data.py
#
# For a bare machine with Python 3.12, torch 2.11 and transformers 5.17 and no network. To be carried there, in a folder
# `wheels/` next to this repository's files: the wheels of bitsandbytes, peft, accelerate, trl (1.16.0), datasets and
# what of datasets' requirements is missing there; the script installs them without looking further (--no-deps) and
# names what cannot be imported. Fetch them where there is a network:
#
#   pip download --no-deps -d wheels bitsandbytes peft accelerate trl==1.16.0 datasets
#
# Writes OUT/*.log; each log's last line is the JSON object of bench/train_vs_trl.py. TRL runs at several micro-batches
# (BATCHES), train_pref.py at its own defaults; a micro-batch that does not fit is noted and skipped.
# SHAPE (arguments of random_llama.py), LENGTH, QUANT and STEPS are for trying the script on a small machine.
set -euo pipefail
cd "$(dirname "$0")/.."

pairs=${1:?usage: bash bench/gpu.sh PAIRS.jsonl [OUT]}
out=${2:-${OUT:-bench/out}}
python=${PYTHON:-python3}
model=${MODEL_DIR:-/tmp/random_llama}
read -ra shape <<< "${SHAPE:-}"
mkdir -p "$out"

if [ -d wheels ]; then
  "$python" -m pip install --quiet --no-index --no-deps --find-links wheels wheels/*.whl
fi
"$python" - << 'PY'
import importlib.util
import sys

needed = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "trl", "datasets", "safetensors", "scipy", "tqdm")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    sys.exit(f"cannot be imported: {', '.join(missing)}; carry their wheels in wheels/")
PY
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2> /dev/null || echo "no GPU: a trial of the script only"

[ -f "$model/config.json" ] || "$python" bench/random_llama.py --pairs "$pairs" "${shape[@]}" "$model"

compare() { # NAME, then arguments of train_vs_trl.py
  local log="$out/$1.log"
  shift
  "$python" bench/train_vs_trl.py --model "$model" --pairs "$pairs" --max_length "${LENGTH:-2048}" \
    --quant "${QUANT:-nf4}" --steps "${STEPS:-4}" --warmup 1 --rounds 1 --lora_r 64 "$@" > "$log" 2>&1 ||
    echo "$log: failed (out of memory, perhaps): $(grep -m1 -i 'out of memory' "$log" || tail -n 1 "$log")"
  tail -n 1 "$log"
}

for batch in ${BATCHES:-2 4 8}; do
  compare "trl_$batch" --only trl --batch "$batch" --checkpointing on
done
compare both --batch "${BATCH:-4}" --checkpointing on --compile off --only trl train_pref
compare compiled --batch "${BATCH:-4}" --checkpointing on --compile on --only train_pref
