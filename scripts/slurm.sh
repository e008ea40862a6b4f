#!/usr/bin/env bash
#SBATCH --job-name=gluon
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#
# One run on many nodes, requeued until it is done:
#
#   sbatch --nodes=4 scripts/slurm.sh --config configs/mvr1_b512.py [--key value ...]
#
# 300 seconds before the job's time ends (and when it is preempted) Slurm signals the tasks. torchrun passes
# the signal on to its ranks. They save a checkpoint, leave the marker runs/<run>/requeue and end. This script
# then requeues the job. A rank that dies is restarted by torchrun up to RESTARTS times. --resume auto continues
# in each case.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
python=${PYTHON:-.venv/bin/python}
gpus=${SLURM_GPUS_ON_NODE:-gpu}
restarts=${RESTARTS:-3}

# Check the options before any node starts, and find out where the marker will be.
run_dir=$("$python" -c '
import sys
from training.config import load_config
from common.errors import one_line_errors
with one_line_errors("slurm"):
    config = load_config(sys.argv[1:])
    print(config.results_dir, config.run_name, sep="/")
' "$@") || exit 2
rm -f "$run_dir/requeue"

# Time for the ranks to save their checkpoint after the signal. Before torch 2.12 torchrun has no such option and gives 30 s.
grace=()
"$python" -m torch.distributed.run --help | grep -q -- --shutdown-timeout && grace=(--shutdown-timeout=240)

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$gpus" --max-restarts="$restarts" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:$port" \
  ${grace[@]+"${grace[@]}"} train_gpt.py "$@" --resume auto
status=$?

# torchrun loses the ranks' exit codes when a signal ends it, so the marker alone decides.
if [ -e "$run_dir/requeue" ]; then
  echo "slurm: the run was preempted and is saved; job $SLURM_JOB_ID goes back into the queue"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
