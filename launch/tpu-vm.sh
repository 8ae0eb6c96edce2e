#!/usr/bin/env bash
# One adaptrm command on all hosts of a TPU VM that is there. What it says comes from host 0.
#
#     SOURCE=git+https://HOST/OWNER/adaptrm launch/tpu-vm.sh adaptrm train reward CONFIG --out /shared/runs/8b
#
# It runs on when the connection drops, and after Ctrl-C: the same again shows it again. Another command, such as
# `true`, has it save and end first.
#
# ---- change these -----------------------------------------------------------
NAME=${NAME:-adaptrm}
ZONE=${ZONE:-us-east5-a}
SOURCE=${SOURCE:-}       # what pip installs on each host: git+https://HOST/OWNER/adaptrm@REF
MOUNT=${MOUNT:-}         # a Filestore share for runs and data, as IP:/share; each host sees it at /shared
RESTARTS=${RESTARTS:-20} # after any exit code but 0 and 2, which is bad input
PAUSE=${PAUSE:-10}       # seconds before a start again
# -----------------------------------------------------------------------------
set -euo pipefail
if (($# == 0)) || [[ -z $SOURCE ]]; then
  echo "usage: SOURCE=git+https://HOST/OWNER/adaptrm launch/tpu-vm.sh COMMAND ..." >&2
  exit 2
fi

# The same on every host. gcloud too does it again where a connection drops, and then finds the command running.
read -r -d '' script <<'END' || true
set -u
here=$HOME/.adaptrm-launch
mkdir -p "$here"
runs() { grep -qs "$1" "/proc/$(cat "$here/process" 2>/dev/null)/cmdline"; }
if ! runs "$START"; then
  if runs launch-; then
    kill -- "-$(cat "$here/process")"
    while runs launch-; do sleep 1; done
  fi
  if [ -n "$MOUNT" ] && ! mountpoint -q /shared; then
    sudo apt-get install -qy nfs-common || exit 1
    sudo mkdir -p /shared && sudo mount "$MOUNT" /shared || exit 1
  fi
  # The image's Python may be too old, so it gets one of its own. (uv may end with 2, and that is no bad input.)
  python3 -m pip install -q --user uv || exit 1
  python3 -m uv venv -q --allow-existing --python 3.12 "$HOME/adaptrm-env" || exit 1
  python3 -m uv pip install -q --python "$HOME/adaptrm-env" "adaptrm[tpu] @ $SOURCE" || exit 1
  export PATH="$HOME/adaptrm-env/bin:$PATH" JAX_PLATFORMS=tpu
  rm -f "$here/$START.code"
  : >"$here/$START.log" # there before it is read
  setsid bash -c "trap : TERM; \"\$@\"; echo \$? >'$here/$START.code'" "$START" "$@" \
    >>"$here/$START.log" 2>&1 </dev/null &
  echo $! >"$here/process"
fi
tail -n 200 -f --pid="$(cat "$here/process")" "$here/$START.log"
code=$(cat "$here/$START.code" 2>/dev/null) || code=1 # killed
echo "$(hostname): exit code $code"
exit "$code"
END
start=launch-$(printf '%s\n' "$SOURCE" "$@" | cksum | cut -d' ' -f1)
on_each_host="START=$start SOURCE=$(printf %q "$SOURCE") MOUNT=$(printf %q "$MOUNT")
set -- $(printf '%q ' "$@")
$script"
if [[ -n ${DRY_RUN:-} ]]; then
  echo "gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=all --command="
  echo "$on_each_host"
  exit
fi

# gcloud ends when all hosts have, with the code of the first that failed. That of one with bad input is what counts.
show() {
  local line code=0
  while IFS= read -r line; do
    printf '%s\n' "$line"
    [[ $line != *": exit code 2" ]] || code=2
  done
  return "$code"
}
trap 'exit 130' INT # gcloud ends with 1 then
for ((restarts = 0; ; restarts++)); do
  code=0
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$on_each_host" | show || code=$?
  if ((code == 0 || code == 2 || restarts >= RESTARTS)); then
    exit "$code"
  fi
  echo "launch/tpu-vm.sh: exit code $code, again" >&2
  sleep "$PAUSE"
done
