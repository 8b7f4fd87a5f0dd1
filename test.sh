#!/usr/bin/env bash
# Style checks and the whole test suite, from a bare clone: bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/venv.sh
install_requirements
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
exec python -m pytest -n 2 --dist loadfile "$@"
