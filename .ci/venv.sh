# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh, in the toolkit's folder: makes .venv and installs the pinned
# requirements into it. PYTHON=/path/to/python3.11 chooses the interpreter that .venv is made with.
# Works with bash 3.2, which macOS has.

# Prints the path of the interpreter: PYTHON if it is set, else the first that is new enough.
find_python() {
  local candidate check='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
  for candidate in "${PYTHON:-python3.11}" python3.12 python3.13 python3; do
    if "$candidate" -c "$check" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    [ -z "${PYTHON:-}" ] || break # the user's choice or none
  done
  if [ -n "${PYTHON:-}" ]; then
    echo "error: PYTHON=$PYTHON is not a Python 3.11 or later with venv and pip" >&2
  else
    echo "error: no Python 3.11 or later with venv and pip; set PYTHON=/path/to/python3.11" >&2
  fi
  return 1
}

# Does nothing if the requirements in .venv are those of this checkout.
install_requirements() {
  local stamp python
  stamp=$(cat requirements.txt requirements-dev.txt | cksum)
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "making .venv with $python"
    "$python" -m venv .venv
  fi
  if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
    echo "installing requirements into .venv (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
      -r requirements-dev.txt
    echo "$stamp" >.venv/installed
  fi
  unset PYTHON # .venv is used from here on; sweep.sh would take PYTHON for the stages' interpreter
}
