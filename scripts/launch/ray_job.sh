#!/usr/bin/env bash
# One run on a Ray cluster that stands already, by its job server (`ray start --head` with the dashboard; tunnel it to loopback):
#
#   ssh -N -L 8265:127.0.0.1:8265 HEAD &
#   RLRESTORE_CONFIG=/shared/configs/mine.yaml RLRESTORE_RUNS=/shared/runs RLRESTORE_TOKEN_FILE=token scripts/launch/ray_job.sh
#
# rlrestore must be installed on the cluster; both paths are the head's, from the root. The job runs on if this terminal closes. `ray job stop`
# lets the run save if the head was started with RAY_JOB_STOP_WAIT_TIME_S of at least RLRESTORE_GRACE_S (Ray's own value is 3 s).
set -euo pipefail
# shellcheck source=scripts/launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
: "${RLRESTORE_TOKEN_FILE:?set it to the file with the token of the cluster}"
[[ -r $RLRESTORE_TOKEN_FILE ]] || {
    say "RLRESTORE_TOKEN_FILE=$RLRESTORE_TOKEN_FILE cannot be read"
    exit 64
}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RLRESTORE_TOKEN_FILE

for path in "$RLRESTORE_CONFIG" "$RLRESTORE_RUNS"; do
    [[ $path == /* ]] || {
        say "$path is relative: the job runs in a folder of Ray's, give the path from the root"
        exit 64
    }
done

set_train_command auto
# This folder goes along as the working directory: again.sh repeats the run as long as it saves and stops by itself.
exec ray job submit --address "$RLRESTORE_DASHBOARD" --submission-id "$RLRESTORE_NAME-$(date -u +%Y%m%d-%H%M%S)" \
    --working-dir "$(dirname "${BASH_SOURCE[0]}")" -- \
    env RLRESTORE_CONFIG="$RLRESTORE_CONFIG" RLRESTORE_RUNS="$RLRESTORE_RUNS" RLRESTORE_RESTARTS="$RLRESTORE_RESTARTS" \
    bash again.sh "${train_command[@]}"
