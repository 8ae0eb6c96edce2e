#!/usr/bin/env bash
# One adaptrm command on Google Kubernetes Engine, as a JobSet on TPU slices or GPU nodes.
#
#     SOURCE=git+https://HOST/OWNER/adaptrm launch/gke.sh adaptrm train reward CONFIG --out /shared/runs/8b
#
# ---- change these -----------------------------------------------------------
ON=${ON:-tpu} # or gpu
NAME=${NAME:-adaptrm}
SOURCE=${SOURCE:-}          # what pip installs in each pod: git+https://HOST/OWNER/adaptrm@REF
IMAGE=${IMAGE:-python:3.12} # any with Python 3.11 or later, pip and git
CLAIM=${CLAIM:-adaptrm}     # ReadWriteMany volume claim for runs and data; each pod sees it at /shared
RESTARTS=${RESTARTS:-20}    # after any exit code but 0 and 2, which is bad input
# On TPUs: slices, and per slice its type, topology, hosts and chips a host.
SLICES=${SLICES:-1}
TPU=${TPU:-tpu-v5p-slice}
TOPOLOGY=${TOPOLOGY:-2x2x2}
HOSTS=${HOSTS:-2}
CHIPS=${CHIPS:-4}
# On GPUs: nodes, their type and GPUs a node.
NODES=${NODES:-2}
GPU=${GPU:-nvidia-h100-80gb}
GPUS=${GPUS:-8}
# -----------------------------------------------------------------------------
set -euo pipefail
if (($# == 0)) || [[ -z $SOURCE ]] || [[ $ON != tpu && $ON != gpu ]]; then
  echo "usage: [ON=gpu] SOURCE=git+https://HOST/OWNER/adaptrm launch/gke.sh COMMAND ..." >&2
  exit 2
fi

# What the two differ in. The environment names the processes: GKE's of TPUs, ours of GPUs. JAX_PLATFORMS: jax is to
# fail where it finds no device, not to train on the CPU. LD_LIBRARY_PATH: where GKE puts the driver.
if [[ $ON == tpu ]]; then
  extra=tpu replicas=$SLICES pods=$HOSTS limit="google.com/tpu: $CHIPS"
  selector="cloud.google.com/gke-tpu-accelerator: $TPU
                cloud.google.com/gke-tpu-topology: $TOPOLOGY"
  environment="
                    - {name: JAX_PLATFORMS, value: tpu}"
  annotations="{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}" # one slice a node pool
else
  extra=cuda replicas=1 pods=$NODES limit="nvidia.com/gpu: $GPUS"
  selector="cloud.google.com/gke-accelerator: $GPU"
  environment="
                    - {name: JAX_PLATFORMS, value: cuda}
                    - {name: LD_LIBRARY_PATH, value: /usr/local/nvidia/lib64}
                    - {name: JAX_COORDINATOR_ADDRESS, value: \"$NAME-hosts-0-0.$NAME:8476\"}
                    - {name: JAX_NUM_PROCESSES, value: \"$NODES\"}
                    - name: JAX_PROCESS_ID
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']"
  annotations="{}"
fi

# Each word of the command as a string of YAML.
words() {
  local word
  for word in "$@"; do
    printf "\n                    - '%s'" "${word//\'/\'\'}"
  done
}

jobset() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations: $annotations
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
    rules:
      # A Job that its pod policy below has failed had bad input. All else starts again: jax ends the peers of a process
      # that has ended, with codes of their own.
      - name: badInput
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: hosts
      replicas: $replicas
      template:
        spec:
          parallelism: $pods
          completions: $pods
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # That a machine is taken away is no bad input, whatever the exit code.
              - action: Count
                onPodConditions:
                  - type: DisruptionTarget
              - action: FailJob
                onExitCodes:
                  containerName: adaptrm
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                $selector
              containers:
                - name: adaptrm
                  image: $IMAGE
                  command:
                    - bash
                    - -c
                    - pip install -q "adaptrm[$extra] @ $SOURCE" || exit 1; exec "\$@"
                    - host
                  args:$(words "$@")
                  env:$environment
                  resources:
                    limits:
                      $limit
                  volumeMounts:
                    - {name: shared, mountPath: /shared}
                    - {name: memory, mountPath: /dev/shm}
              volumes:
                - name: shared
                  persistentVolumeClaim:
                    claimName: $CLAIM
                - name: memory
                  emptyDir:
                    medium: Memory
YAML
}

if [[ -n ${DRY_RUN:-} ]]; then
  jobset "$@"
else
  jobset "$@" | kubectl apply -f -
fi
