#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@300
# A whole study, unattended, on one machine or as a Slurm array.
#
#   JUDGE=MODEL bash sweep.sh           the study: 60 runs of Llama-2-7b-chat, answers, judgements, analysis
#   bash sweep.sh --help                grids, axes, settings, --status, --dry_run
#   sbatch --array=0-59 --gres=gpu:1 sweep.sh
#
# The same command continues. PYTHON chooses the interpreter; without it, .venv next to this script
# is used if it exists, else `python`.
set -euo pipefail

# Slurm runs a copy of this script from its spool folder. The toolkit is then where sbatch was
# called, or in TOOLKIT.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$here/train_pref.py" ]; then here=${TOOLKIT:-${SLURM_SUBMIT_DIR:-$here}}; fi
if [ ! -f "$here/train_pref.py" ]; then
  echo "error: $here: train_pref.py is not there; submit from the toolkit's folder, or set TOOLKIT to it" >&2
  exit 2
fi

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; fi
fi
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
  echo "error: $PYTHON cannot import torch; make .venv with 'bash test.sh', activate an environment that has torch, or set PYTHON" >&2
  exit 2
fi

# Before a preemption Slurm sends SIGTERM to job steps, but not to a batch script. So the sweep runs
# as a step, which shares the job's resources (--overlap). srun forwards signals to it.
step=()
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
  step=(srun --overlap --nodes 1 --ntasks 1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"})
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec ${step[@]+"${step[@]}"} "$PYTHON" -m pref.sweeping "$@"
