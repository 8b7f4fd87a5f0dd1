#!/usr/bin/env bash
# Answers and judgements through a real OpenAI-compatible server on loopback, judge.py killed -9 three times.
#
#   bash bench/served.sh MODEL MT_BENCH_DIR OUT      # MODEL: a chat model's folder; OUT: a new folder
#
# `transformers serve` (pip install "transformers[serving]") answers MT-Bench's questions as the run `base`, then judges
# them. At the end: how many completions the server was asked for, by its own log, and how many rows there are.
set -euo pipefail
cd "$(dirname "$0")/.."
source bench/serve.sh
model=$(cd "$1" && pwd)
questions=$2
out=$3
port=${PORT:-8123}
python=${PYTHON:-python}
mkdir -p "$out"
export OPENAI_API_KEY=local HF_HUB_OFFLINE=1
url=http://127.0.0.1:$port/v1

serve "$model" "$port" "$out/serve.log" --log-level info
asked() { grep -c 'POST /v1/chat/completions' "$out/serve.log" || true; }

echo "== answers"
"$python" gen_mtbench.py "$out/results" --base --model "$model" --served_base "$model" --base_url "$url" \
  --mt_bench "$questions" --max_new_tokens "${ANSWER_TOKENS:-16}" --concurrency 8 2> "$out/answers.err" | tail -n 6
echo "completions asked for: $(asked)"

before=$(asked)
judge=("$python" judge.py "$out/results" --judge "$model" --base_url "$url" --mt_bench "$questions" --allow_incomplete
  --max_tokens "${JUDGE_TOKENS:-8}" --concurrency "${CONCURRENCY:-4}")
echo "== judgements, killed three times"
for seconds in ${KILL_AFTER:-25 20 30}; do
  "${judge[@]}" > "$out/judge.log" 2>&1 &
  pid=$!
  sleep "$seconds"
  kill -9 "$pid" 2> /dev/null || true
  wait "$pid" 2> /dev/null || true
  echo "killed after $seconds s; completions asked for: $(($(asked) - before))"
done
"${judge[@]}" 2> /dev/null | tail -n 12 || true
echo "completions asked for in all: $(($(asked) - before)); rows in judgements.csv:" \
  "$("$python" -c "import sys; from pathlib import Path; from pref.files.judgements import read_judgements as r; \
print(len(r(Path(sys.argv[1]))))" "$out/results/base/mt_bench/judgements.csv")"
