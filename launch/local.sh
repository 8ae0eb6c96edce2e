#!/usr/bin/env bash
# One adaptrm command as several processes on this machine, on its CPUs: what a multi-host run looks like.
#
#     launch/local.sh adaptrm train reward demo --out runs/two
#
# ---- change these -----------------------------------------------------------
PROCESSES=${PROCESSES:-2}
DEVICES_PER_PROCESS=${DEVICES_PER_PROCESS:-1}
GRACE=${GRACE:-120}      # seconds to save what there is, from TERM to KILL
RESTARTS=${RESTARTS:-20} # after exit code 75, which says: stopped early, safe to start again
PORT=${PORT:-}           # where the first process listens; empty for one that is likely free
# -----------------------------------------------------------------------------
set -uo pipefail
if (($# == 0)); then
  echo "usage: launch/local.sh COMMAND ..." >&2
  exit 2
fi

export JAX_PLATFORMS=cpu
export JAX_NUM_CPU_DEVICES=$DEVICES_PER_PROCESS
export JAX_NUM_PROCESSES=$PROCESSES
processes=()
told=0
trap 'told=1' TERM INT HUP

start() {
  export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-$((20000 + RANDOM % 10000))}
  processes=()
  for ((process = 0; process < PROCESSES; process++)); do
    # The first process talks to you; of the others only errors are shown.
    if ((process == 0)); then
      JAX_PROCESS_ID=$process "$@" &
    else
      JAX_PROCESS_ID=$process "$@" >/dev/null &
    fi
    processes+=($!)
  done
}

# TERM, so many seconds, KILL.
stop() {
  kill "${processes[@]}" 2>/dev/null
  for ((tenths = 0; tenths < $1 * 10; tenths++)); do
    kill -0 "${processes[@]}" 2>/dev/null || break
    sleep 0.1
  done
  kill -9 "${processes[@]}" 2>/dev/null
}

for ((restarts = 0; ; restarts++)); do
  start "$@"
  code=0
  for ((left = PROCESSES; left > 0 && code == 0 && told == 0; left--)); do
    wait -n
    code=$?
  done
  if ((told)); then
    stop "$GRACE"
    wait "${processes[0]}"
    code=$?
  elif ((code == 75)); then
    stop "$GRACE" # the others are saving too
  elif ((code != 0)); then
    stop 2 # they wait for the one that is gone, and can save nothing without it
  fi
  wait
  if ((code != 75 || told || restarts == RESTARTS)); then
    exit "$code"
  fi
  echo "launch/local.sh: exit code 75, starting again" >&2
done
