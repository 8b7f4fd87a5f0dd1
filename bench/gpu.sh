#!/usr/bin/env bash
# The toolkit on one GPU, unattended, within ten minutes: correctness, training against TRL, answers. What it measures,
# prints and returns is described in bench/gpu_run.py, whose arguments it takes.
#
#   bash bench/gpu.sh [--wheels DIR] [--pairs PAIRS.jsonl] [--out DIR]
#   bash bench/gpu.sh --device cpu                                         # a rehearsal at toy sizes
#
# For a bare machine without a network: torch with CUDA and transformers there (tried for: Python 3.12, torch 2.11,
# transformers 5.17), whatever else is missing carried as wheels in DIR, or in $WHEELS. Fetch them where there is a
# network (one version of each; the H100 image that this was written for lacks these):
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_24_x86_64 \
#     --platform manylinux_2_17_x86_64 -d wheels bitsandbytes==0.50.2 trl==1.16.0 datasets==5.2.0 dill multiprocess xxhash
#
# PYTHON: the interpreter (python3). They are installed into OUT/site, not into it.
set -euo pipefail
cd "$(dirname "$0")/.."
export BEGUN
BEGUN=$(date +%s)

wheels=${WHEELS:-} out=bench/out previous=
for word in "$@"; do
  case $previous in
    --wheels) wheels=$word ;;
    --out) out=$word ;;
  esac
  previous=$word
done
python=${PYTHON:-python3}

if [ -n "$wheels" ]; then
  if ! compgen -G "$wheels/*.whl" > /dev/null; then
    echo "error: $wheels: no wheels there" >&2
    exit 2
  fi
  mkdir -p "$out"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$out/site" "$wheels"/*.whl
  PYTHONPATH=$(cd "$out/site" && pwd)${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONPATH
fi
exec "$python" bench/gpu_run.py "$@"
