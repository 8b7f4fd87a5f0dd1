#!/usr/bin/env bash
# Style checks and tests, from a bare clone.
#
#   bash test.sh                  everything: what continuous integration runs
#   bash test.sh --fast           an answer in about a minute: without the tests marked `slow`
#   bash test.sh -k loss          further arguments are pytest's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/venv.sh
install_requirements
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
if [ "${1:-}" = --fast ]; then
  shift
  set -- -m "not slow" "$@"
fi
unset PYTHONDONTWRITEBYTECODE # tests start stages in many processes, each of which would compile them
exec python -m pytest -n 2 --dist worksteal "$@"
