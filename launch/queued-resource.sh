#!/usr/bin/env bash
# Ask for a TPU slice, wait for it, run one adaptrm command on all its hosts (launch/tpu-vm.sh) and give it back. A spot
# slice that is taken away is asked for again, and the command goes on. Ctrl-C leaves slice and command there: the same
# again goes on.
#
#     SOURCE=git+https://HOST/OWNER/adaptrm launch/queued-resource.sh adaptrm train reward CONFIG --out /shared/runs/8b
#
# ---- change these (and those of launch/tpu-vm.sh) ---------------------------
export NAME=${NAME:-adaptrm}
export ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-16}               # gcloud compute tpus accelerator-types list --zone ZONE
RUNTIME=${RUNTIME:-v2-alpha-tpuv5} # v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5-lite for v5e
SPOT=${SPOT:-1}                    # empty for on-demand
PATIENCE=${PATIENCE:-60}           # seconds between looks at its state
REQUESTS=${REQUESTS:-20}           # to ask for a slice at most
RESTARTS=${RESTARTS:-20}           # on slices that are there, after any exit code but 0 and 2, which is bad input
# -----------------------------------------------------------------------------
set -euo pipefail
if (($# == 0)) || [[ -z ${SOURCE:-} ]]; then
  echo "usage: SOURCE=git+https://HOST/OWNER/adaptrm launch/queued-resource.sh COMMAND ..." >&2
  exit 2
fi

here=$(dirname "$0")
resource() {
  ${DRY_RUN:+echo} gcloud compute tpus queued-resources "$@" --zone="$ZONE"
}
request() {
  resource create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
}
give_back() {
  resource delete "$NAME" --quiet --force
}
# Only what is not found is absent: no answer may be a lost connection, or a login that has ended.
state() {
  local answer
  if answer=$(resource describe "$NAME" --format="value(state.state)" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$answer" >&2
  fi
}

if [[ -n ${DRY_RUN:-} ]]; then
  request
  "$here/tpu-vm.sh" "$@"
  give_back
  exit
fi
trap 'exit 130' INT
requests=0 restarts=0
while true; do
  case $(state) in
    ACTIVE)
      code=0
      RESTARTS=0 "$here/tpu-vm.sh" "$@" || code=$?
      if ((code == 0 || code == 2)); then
        give_back
        exit "$code"
      fi
      sleep "$PATIENCE" # it takes a while until a slice that is gone is said to be
      if [[ $(state) == ACTIVE ]] && ((restarts++ >= RESTARTS)); then
        give_back
        exit "$code"
      fi
      ;;
    SUSPENDED | FAILED)
      give_back
      sleep "$PATIENCE"
      ;;
    ABSENT)
      if ((requests++ >= REQUESTS)); then
        echo "launch/queued-resource.sh: asked $REQUESTS times; look at the quota, or raise REQUESTS" >&2
        exit 1
      fi
      request
      ;;
    *) sleep "$PATIENCE" ;; # queued, on its way up or down, or no answer
  esac
done
