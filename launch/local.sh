#!/usr/bin/env bash
# One adaptrm command as several processes on this machine, on its CPUs: what a multi-host run looks like.
#
#     launch/local.sh adaptrm train reward demo --out runs/two
#
# ---- change these -----------------------------------------------------------
PROCESSES=${PROCESSES:-2}
DEVICES_PER_PROCESS=${DEVICES_PER_PROCESS:-1}
PORT=${PORT:-12355}
# -----------------------------------------------------------------------------
set -euo pipefail
if (($# == 0)); then
  echo "usage: launch/local.sh COMMAND ..." >&2
  exit 2
fi

export JAX_PLATFORMS=cpu
export JAX_NUM_CPU_DEVICES=$DEVICES_PER_PROCESS
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT
export JAX_NUM_PROCESSES=$PROCESSES

# jax catches TERM to save on preemption, and a process that waits for one that is gone does not get to it.
stop() {
  kill $(jobs -p) 2>/dev/null || return 0
  sleep 2
  kill -9 $(jobs -p) 2>/dev/null || true
}
trap stop EXIT
for ((process = 0; process < PROCESSES; process++)); do
  # The first process talks to you; of the others only errors are shown.
  if ((process == 0)); then
    JAX_PROCESS_ID=$process "$@" &
  else
    JAX_PROCESS_ID=$process "$@" >/dev/null &
  fi
done

# The first process that fails ends the run: the others would wait for it.
for ((left = PROCESSES; left > 0; left--)); do
  wait -n
done
