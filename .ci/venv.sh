# Sourced by quickstart.sh and test.sh: makes .venv if there is none and installs the pinned requirements into it.
# PYTHON=/path/to/python3.11 chooses the interpreter.
# shellcheck shell=bash
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or later with venv and pip found; set PYTHON=/path/to/python3.11" >&2
  return 1
}

install_requirements() {
  local stamp
  stamp=$(cat requirements.txt requirements-dev.txt | cksum)
  if [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python)
    echo "making .venv with $python"
    "$python" -m venv .venv
  fi
  echo "installing requirements into .venv (a few minutes the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev.txt
  echo "$stamp" >.venv/installed
}
