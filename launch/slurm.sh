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
RESTARTS=${RESTARTS:-20}               # after exit code 75 of a task, which says: stopped early, safe to start again
# -----------------------------------------------------------------------------
set -uo pipefail
if (($# == 0)); then
  echo "usage: sbatch launch/slurm.sh COMMAND ..." >&2
  exit 2
fi

run=${DRY_RUN:+echo}
export PATH=$ENVIRONMENT/bin:$PATH JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
# srun's code is the highest of its tasks, and tasks that it ends itself have higher ones than 75: each leaves its own.
# Of a task Slurm tells only the first process to stop, which hands it on. A wait that a signal ends can lose the code.
ended=$PWD/.adaptrm-${SLURM_JOB_ID:-job}
# shellcheck disable=SC2016 # the variables are the task's
task='trap "kill \$!" TERM
"$@" &
while kill -0 $! 2>/dev/null; do sleep 1; done
wait $!
code=$?
case $code in 2 | 75) touch "$0.$code" ;; esac
exit $code'
rm -f "$ended".*
# Five minutes before the end of its time a job is told to save (--signal above), as it is before it is preempted.
$run srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c "$task" "$ended" "$@"
code=$?
if [[ -e $ended.2 ]]; then
  code=2
elif [[ -e $ended.75 ]]; then
  code=75
fi
rm -f "$ended".*
if ((code == 75 && ${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
  echo "launch/slurm.sh: exit code 75, back to the queue" >&2
  $run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
