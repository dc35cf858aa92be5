#!/bin/bash
# A sweep on Slurm: one job, whose first node has Ray's head and whose other nodes join it. Shortly
# before its time is over it ends the sweep in order and goes back into the queue; the next round
# goes on in the same run folder, until the sweep is done. `scancel` ends it for good.
#
#   sbatch cluster/slurm.sh /shared/cars.yaml /shared/runs/cars
#
# Change: the #SBATCH lines and VENV. VENV, config, data and run folder lie on a disk that all nodes
# mount. Further arguments go to `foldrace run` and `foldrace resume`. A preempted job is put back
# into the queue by Slurm itself (--requeue); only the trials that ran have lost something.
#SBATCH --job-name=foldrace
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

VENV=${VENV:-/shared/venv}
config=${1:?"usage: sbatch $0 CONFIG RUN_FOLDER [--set KEY=VALUE ...]"}
run=${2:?"usage: sbatch $0 CONFIG RUN_FOLDER [--set KEY=VALUE ...]"}
shift 2
# shellcheck disable=SC1091
source "$VENV/bin/activate"

# Who shares a node or the network with the job can reach Ray's ports, but has not its token.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from the job by itself
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # of its own: another job's head may share the node

# A short --temp-dir, for the job's TMPDIR may be too long for Ray's sockets. Not `ray stop` at the
# end: it would end other jobs' Ray, too; Slurm ends what this job has started.
ray start --head --port="$port" --ray-client-server-port=$((port + 10000)) \
  --num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="/tmp/ray-$SLURM_JOB_ID" --disable-usage-stats
if ((SLURM_NNODES > 1)); then
  srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
    ray start --address="$head:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats \
    --block &
fi
# What joins later is used as well, but the look at each node comes before the first trial.
python - "$head:$port" "$SLURM_NNODES" <<'END'
import sys, time, ray

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
end = time.monotonic() + 120
while (nodes := sum(n["Alive"] for n in ray.nodes())) < int(sys.argv[2]) and time.monotonic() < end:
    time.sleep(1)
print(f"{nodes} of {sys.argv[2]} nodes have joined")
END

if foldrace status "$run" >/dev/null 2>&1; then
  command=(resume "$run")
else
  command=(run "$config" --out "$run")
fi
foldrace "${command[@]}" --address "$head:$port" "$@" &
sweep=$!
again=
trap 'again=yes; kill -TERM "$sweep"' USR1 # the time is nearly over
trap 'kill -TERM "$sweep"' TERM            # scancel

# A signal ends `wait`, not the sweep, which then takes a while.
while true; do
  code=0
  wait "$sweep" || code=$?
  kill -0 "$sweep" 2>/dev/null || break
done
if [[ -n $again && $code -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
