#!/usr/bin/env bash
# Ask for a TPU slice, wait for it, run one adaptrm command on all its hosts (launch/tpu-vm.sh) and give it back. A spot
# slice that is taken away is asked for again, and the command goes on.
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
state() {
  resource describe "$NAME" --format="value(state.state)" 2>/dev/null || true
}

if [[ -n ${DRY_RUN:-} ]]; then
  request
  "$here/tpu-vm.sh" "$@"
  give_back
  exit
fi
while true; do
  case $(state) in
    ACTIVE)
      code=0
      "$here/tpu-vm.sh" "$@" || code=$?
      ((code == 0)) || sleep "$PATIENCE"
      if [[ $(state) == ACTIVE ]]; then # it was the command's own end, not that of its slice
        give_back
        exit "$code"
      fi
      ;;
    SUSPENDED | FAILED) give_back ;;
    "") request ;;
    *) sleep "$PATIENCE" ;; # queued, or on its way up or down
  esac
done
