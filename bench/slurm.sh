#!/usr/bin/env bash
# A real Slurm on this machine alone: sweep.sh as an array of six tasks, one of them preempted and requeued.
#
#   sudo bash bench/slurm.sh OUT       # OUT: a new folder; Debian's slurm-wlm and munge installed, none of them running
#
# Two partitions: a job in `high` takes a core from a task in `low`, which gets SIGTERM and a minute to save, and is put
# back into the queue by Slurm. All daemons are ended at the end. Model and pairs as in bench/kill_sweep.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python}
host=$(hostname -s)
etc=$(mktemp -d /tmp/slurm.XXXXXX) # munge wants its socket where nobody else may write, with a short path
pids=()
stop() {
  scancel --user root 2>/dev/null || true
  for _ in $(seq 100); do squeue -h -o %T 2>/dev/null | grep -q . || break; sleep 0.2; done
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; done
  rm -rf "$etc"
}
trap stop EXIT

mkdir "$etc/munge" "$etc/state" "$etc/spool"
chmod 755 "$etc"
dd if=/dev/urandom of="$etc/munge/key" bs=128 count=1 status=none
chmod 400 "$etc/munge/key"
chown -R munge: "$etc/munge"
runuser -u munge -- munged --foreground --key-file="$etc/munge/key" --socket="$etc/munge/socket" \
  --pid-file="$etc/munge/pid" --seed-file="$etc/munge/seed" --log-file="$etc/munge/log" &
pids+=($!)
cat >"$etc/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${PORT:-26817}
SlurmdPort=$((${PORT:-26817} + 1))
AuthType=auth/munge
AuthInfo=socket=$etc/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$etc/state
SlurmdSpoolDir=$etc/spool
SlurmctldPidFile=$etc/slurmctld.pid
SlurmdPidFile=$etc/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=5,bf_interval=5
MinJobAge=3600
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=$host PriorityTier=10 State=UP
CONF
export SLURM_CONF=$etc/slurm.conf
for _ in $(seq 50); do [ -S "$etc/munge/socket" ] && break; sleep 0.1; done
slurmctld -D >"$out/slurmctld.log" 2>&1 &
pids+=($!)
slurmd -D >"$out/slurmd.log" 2>&1 &
pids+=($!)
for _ in $(seq 100); do [ "$(sinfo -h -o %T 2>/dev/null | head -n 1)" = idle ] && break; sleep 0.3; done
sinfo -o "%P %T %c %G"
sbatch --version

"$python" prep_data.py --dataset examples/preferences.jsonl --limit 64 --out "$out/pairs" >"$out/prepare.log"
"$python" bench/random_llama.py --pairs "$out/pairs/train.jsonl" --vocabulary 600 --layers 2 --hidden 64 --heads 4 \
  --intermediate 96 "$out/model" >>"$out/prepare.log" 2>&1
export PYTHON=$python MODEL=$out/model DATA=$out/pairs RESULTS=$out/results HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export TRAIN_ARGS="--global_batch 8 --per_device_batch 4 --epochs ${EPOCHS:-20} --eval_steps 40 --save_steps 10
  --lora_r 4 --max_length 256 --dtype float32 --compile off"
bash sweep.sh quick --list

job=$(sbatch --parsable --array=0-5 --partition low --output "$out/task-%a.log" sweep.sh quick)
echo "array $job"
training() { find "$out/results" -name "step-*.safetensors" -printf "%h\n" 2>/dev/null | sort -u | wc -l; }
until [ "$(training)" -ge 2 ]; do sleep 0.2; done
echo "== two tasks train; a job of higher priority takes a core"
sbatch --partition high --wrap "sleep ${SLEEP:-15}" --output "$out/high.log"
seen=
for _ in $(seq 600); do
  now=$(squeue -a -r -h -t all -o "%i %T" | sort | tr '\n' ',')
  if [ "$now" != "$seen" ]; then echo "$(date +%T) $now"; fi
  seen=$now
  if ! squeue -h -o %T | grep -q .; then break; fi
  sleep 0.5
done
echo "== in the end"
for task in 0 1 2 3 4 5; do
  scontrol show job "${job}_$task" | tr ' ' '\n' | grep -E '^(ArrayTaskId|JobState|Restarts|ExitCode)=' | tr '\n' ' '
  echo
done
cat "$out/results/sweep.log"
grep -h -o "saved after step [0-9]*\|continued after step [0-9]*" "$out"/results/logs/*.log || true
"$python" -m pref.sweeping quick --stages train --status
