#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@300
# A whole study, unattended, on one machine or as Slurm array tasks: pref.sweeping with the environment's Python (PYTHON).
#
#   JUDGE=MODEL bash sweep.sh           the study: 60 runs on Llama-2-7b-chat, answers, judgements, analysis
#   bash sweep.sh --help                grids, axes, settings, --status, --dry_run
#   sbatch --array=0-59 --gres=gpu:1 sweep.sh
#
# Rerun the same command to continue.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Slurm runs a copy of this script out of its spool: the toolkit is where sbatch was typed, or in TOOLKIT.
if [ ! -f "$here/train_pref.py" ]; then here=${TOOLKIT:-${SLURM_SUBMIT_DIR:-$here}}; fi
if [ ! -f "$here/train_pref.py" ]; then
  echo "error: $here: no train_pref.py; submit from the toolkit's folder, or set TOOLKIT to it" >&2
  exit 2
fi
PYTHON=${PYTHON:-python}
if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
  echo "error: $PYTHON has no torch; activate the environment (source .venv/bin/activate) or set PYTHON" >&2
  exit 2
fi
# Slurm's SIGTERM ahead of a preemption goes to steps, not to a batch script: so be a step, which costs no resources of
# its own. srun passes signals on.
step=()
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
  step=(srun --overlap --nodes 1 --ntasks 1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"})
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec ${step[@]+"${step[@]}"} "$PYTHON" -m pref.sweeping "$@"
