#!/usr/bin/env bash
# Print kuberay.yaml with the launcher's variables filled in:
#
#   RLRESTORE_CONFIG=/app/configs/quickstart.yaml RLRESTORE_RUNS=/runs RLRESTORE_IMAGE=registry/rlrestore:cuda RLRESTORE_GPUS=8 \
#       scripts/launch/kuberay.sh | kubectl create -f -
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch/settings.sh
source "$here/settings.sh"
RAY_VERSION=$(grep -oP '^ray==\K\S+' "$here/../../requirements.lock")
export RAY_VERSION RLRESTORE_RESTARTS RLRESTORE_GRACE_S RLRESTORE_NAME RLRESTORE_IMAGE RLRESTORE_CLAIM RLRESTORE_RUNS RLRESTORE_CONFIG
export RLRESTORE_GPUS RLRESTORE_MEMORY_GB
export WORKERS=$((RLRESTORE_NODES > 1 ? RLRESTORE_NODES : 1)) CPUS=$((RLRESTORE_CPUS > 0 ? RLRESTORE_CPUS : 8))
export SHM_GB=$(((RLRESTORE_MEMORY_GB * 3 + 9) / 10)) # Ray's object store takes 30 % of the memory
set_train_command auto
ENTRYPOINT=$(printf '%q ' bash /app/scripts/launch/again.sh "${train_command[@]}")
export ENTRYPOINT
# An unset name is an error, not an empty string.
awk '{
    while (match($0, /\$\{[A-Z_]+\}/)) {
        name = substr($0, RSTART + 2, RLENGTH - 3)
        if (!(name in ENVIRON)) { print "kuberay.yaml: " name " is not set" > "/dev/stderr"; exit 64 }
        printf "%s%s", substr($0, 1, RSTART - 1), ENVIRON[name]
        $0 = substr($0, RSTART + RLENGTH)
    }
    print
}' "$here/kuberay.yaml"
