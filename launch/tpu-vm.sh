#!/usr/bin/env bash
# One adaptrm command on all hosts of a TPU VM that is there. What it says comes from host 0.
#
#     SOURCE=git+https://HOST/OWNER/adaptrm launch/tpu-vm.sh adaptrm train reward CONFIG --out /shared/runs/8b
#
# ---- change these -----------------------------------------------------------
NAME=${NAME:-adaptrm}
ZONE=${ZONE:-us-east5-a}
SOURCE=${SOURCE:-}       # what pip installs on each host: git+https://HOST/OWNER/adaptrm@REF
MOUNT=${MOUNT:-}         # a Filestore share for runs and data, as IP:/share; each host sees it at /shared
RESTARTS=${RESTARTS:-20} # after exit code 75, which says: stopped early, safe to start again
# -----------------------------------------------------------------------------
set -euo pipefail
if (($# == 0)) || [[ -z $SOURCE ]]; then
  echo "usage: SOURCE=git+https://HOST/OWNER/adaptrm launch/tpu-vm.sh COMMAND ..." >&2
  exit 2
fi

# The same on every host. The image's Python may be too old, so it gets one of its own.
on_each_host="set -eu
if [ -n '$MOUNT' ] && ! mountpoint -q /shared; then
  sudo apt-get install -qy nfs-common && sudo mkdir -p /shared && sudo mount '$MOUNT' /shared
fi
python3 -m pip install -q --user uv
python3 -m uv venv -q --allow-existing --python 3.12 \"\$HOME/adaptrm-env\"
python3 -m uv pip install -q --python \"\$HOME/adaptrm-env\" 'adaptrm[tpu] @ $SOURCE'
export PATH=\"\$HOME/adaptrm-env/bin:\$PATH\"
restarts=0
while true; do
  code=0
  $(printf '%q ' "$@")|| code=\$?
  if [ \$code -ne 75 ] || [ \$restarts -ge $RESTARTS ]; then exit \$code; fi
  restarts=\$((restarts + 1))
done"
if [[ -n ${DRY_RUN:-} ]]; then
  echo "gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=all --command="
  echo "$on_each_host"
  exit
fi
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$on_each_host"
