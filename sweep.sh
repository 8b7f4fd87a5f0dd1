#!/usr/bin/env bash
# A grid of training runs, then answers, judgements and analysis.
#
#   JUDGE=gpt-5-mini bash sweep.sh               the study: 60 runs on Llama-2-7b-chat
#   bash sweep.sh --dry_run                      print every command in order, run nothing
#   LOSSES=dpo BETAS="0.05 0.1" SEEDS=42 JUDGE=hf:models/judge bash sweep.sh
#
# Rerun the same command to continue: every stage skips what is finished. A run that fails does not stop the grid; it
# is listed at the end, and the exit code is then 1.
#
# Axes (environment variables, words separated by spaces):
#   LOSSES  dpo td_dpo discopop       BETAS  0.01 0.05 0.5 2.5      TAUS  0.5 1 2 (td_dpo alone)
#   SEEDS   42 43 44                  LRS    1e-5                   LOGP   the loss's own (or: sum mean)
# Settings:
#   MODEL  meta-llama/Llama-2-7b-chat-hf    DATA  data/dpo-mix-7k    MT_BENCH  data/mt_bench    RESULTS  results
#   NPROC  GPUs (or 1)       ranks of each training run
#   JUDGE  no default        judge model, or hf:FOLDER        BASE_URL  server of the judge (default: OpenAI's)
#   STAGES "train gen judge analyze"
#   TRAIN_ARGS, GEN_ARGS, JUDGE_ARGS, ANALYZE_ARGS   further arguments of a stage, e.g. TRAIN_ARGS="--epochs 1"
#   PYTHON python
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry_run=false
case "${1:-}" in
  --dry_run) dry_run=true ;;
  -h | --help) sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
  "") ;;
  *) echo "error: unknown argument $1; see bash sweep.sh --help" >&2; exit 2 ;;
esac

PYTHON=${PYTHON:-python}
RESULTS=${RESULTS:-results}
MODEL=${MODEL:-meta-llama/Llama-2-7b-chat-hf}
DATA=${DATA:-data/dpo-mix-7k}
MT_BENCH=${MT_BENCH:-data/mt_bench}
STAGES=${STAGES:-train gen judge analyze}
read -ra losses <<<"${LOSSES:-dpo td_dpo discopop}"
read -ra betas <<<"${BETAS:-0.01 0.05 0.5 2.5}"
read -ra taus <<<"${TAUS:-0.5 1 2}"
read -ra seeds <<<"${SEEDS:-42 43 44}"
read -ra rates <<<"${LRS:-1e-5}"
read -ra logps <<<"${LOGP:-default}"
read -ra train_args <<<"${TRAIN_ARGS:-}"
read -ra gen_args <<<"${GEN_ARGS:-}"
read -ra judge_args <<<"${JUDGE_ARGS:-}"
read -ra analyze_args <<<"${ANALYZE_ARGS:-}"
failed=()
trap 'echo "stopped; run the same command again to continue" >&2; exit 130' INT TERM

has_stage() { [[ " $STAGES " == *" $1 "* ]]; }

if has_stage judge && [ -z "${JUDGE:-}" ]; then
  echo "error: JUDGE is not set; JUDGE=MODEL (with BASE_URL for a server of your own), JUDGE=hf:FOLDER for a local model," \
    "or leave the stage out: STAGES='train gen analyze'" >&2
  exit 2
fi

if [ -z "${NPROC:-}" ]; then
  NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))' 2>/dev/null) || {
    echo "error: $PYTHON has no torch; activate the environment (source .venv/bin/activate) or set PYTHON" >&2
    exit 2
  }
fi

# run NAME COMMAND...: print it, run it, note a failure and go on.
run() {
  local name=$1
  shift
  printf '\n+'
  printf ' %q' "$@"
  printf '\n'
  if $dry_run; then return; fi
  local code=0
  "$@" || code=$?
  if [ "$code" -eq 75 ] || [ "$code" -eq 130 ]; then # a training run was told to stop, and has saved
    echo "stopped; run the same command again to continue" >&2
    exit "$code"
  fi
  if [ "$code" -ne 0 ]; then failed+=("$name (exit code $code)"); fi
}

# torchrun passes SIGUSR1 on to its ranks only if told so, and gives them thirty seconds by default: less than a large
# micro-batch and a checkpoint may take.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}
launcher=("$PYTHON")
if [ "$NPROC" -gt 1 ]; then launcher=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC"); fi

train_point() { # loss beta tau-or-empty seed rate logp-or-default
  local arguments=(--model "$MODEL" --data "$DATA" --results_dir "$RESULTS" --loss "$1" --beta "$2" --seed "$4"
    --learning_rate "$5")
  if [ -n "$3" ]; then arguments+=(--tau "$3"); fi
  if [ "$6" != default ]; then arguments+=(--logp "$6"); fi
  run "train $1 beta $2${3:+ tau $3} seed $4" "${launcher[@]}" "$here/train_pref.py" "${arguments[@]}" \
    ${train_args[@]+"${train_args[@]}"}
}

if has_stage train; then
  for seed in "${seeds[@]}"; do
    for rate in "${rates[@]}"; do
      for logp in "${logps[@]}"; do
        for loss in "${losses[@]}"; do
          for beta in "${betas[@]}"; do
            if [ "$loss" = td_dpo ]; then
              for tau in "${taus[@]}"; do train_point "$loss" "$beta" "$tau" "$seed" "$rate" "$logp"; done
            else
              train_point "$loss" "$beta" "" "$seed" "$rate" "$logp"
            fi
          done
        done
      done
    done
  done
fi
if has_stage gen; then
  run "answers" "$PYTHON" "$here/gen_mtbench.py" "$RESULTS" --base --model "$MODEL" --mt_bench "$MT_BENCH" \
    ${gen_args[@]+"${gen_args[@]}"}
fi
if has_stage judge; then
  url=()
  if [ -n "${BASE_URL:-}" ]; then url=(--base_url "$BASE_URL"); fi
  run "judgements" "$PYTHON" "$here/judge.py" "$RESULTS" --judge "$JUDGE" ${url[@]+"${url[@]}"} --mt_bench "$MT_BENCH" \
    ${judge_args[@]+"${judge_args[@]}"}
fi
if has_stage analyze; then
  run "analysis" "$PYTHON" "$here/analyze.py" "$RESULTS" ${analyze_args[@]+"${analyze_args[@]}"}
fi

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\n%s of the grid failed:\n' "${#failed[@]}" >&2
  printf '  %s\n' "${failed[@]}" >&2
  echo "run the same command again to continue" >&2
  exit 1
fi
