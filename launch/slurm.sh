#!/usr/bin/env bash
# One adaptrm command on several nodes of a Slurm cluster, one process a node with all of its GPUs.
#
#     sbatch launch/slurm.sh adaptrm train reward CONFIG --out /shared/runs/8b
#
# ---- change these -----------------------------------------------------------
#SBATCH --job-name=adaptrm
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# -----------------------------------------------------------------------------
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
# ---- and these --------------------------------------------------------------
ENVIRONMENT=${ENVIRONMENT:-$PWD/.venv} # with adaptrm installed, seen by all nodes: pip install '.[cuda]'
RESTARTS=${RESTARTS:-20}               # after exit code 75, which says: stopped early, safe to start again
# -----------------------------------------------------------------------------
set -uo pipefail
if (($# == 0)); then
  echo "usage: sbatch launch/slurm.sh COMMAND ..." >&2
  exit 2
fi

run=${DRY_RUN:+echo}
export PATH=$ENVIRONMENT/bin:$PATH
# Five minutes before the end of its time a job is told to save (--signal above), as it is before it is preempted.
$run srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@"
code=$?
if ((code == 75 && ${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
  echo "launch/slurm.sh: exit code 75, back to the queue" >&2
  $run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
