# Sourced by scripts that need a server. serve MODEL PORT LOG [ARGUMENT...]: an OpenAI-compatible server for MODEL on
# loopback (`transformers serve`), ended with the script; returns when it answers.
# shellcheck shell=bash
serve() {
  local model=$1 port=$2 log=$3
  shift 3
  transformers serve "$model" --host 127.0.0.1 --port "$port" --continuous-batching "$@" >"$log" 2>&1 &
  server=$!
  trap 'kill "$server" 2>/dev/null || true' EXIT
  for _ in $(seq 90); do
    if curl -sf "http://127.0.0.1:$port/health" >/dev/null; then return; fi
    sleep 2
  done
  echo "error: no server on port $port after three minutes; see $log" >&2
  return 1
}
