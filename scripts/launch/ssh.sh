#!/usr/bin/env bash
# One run on machines that are reached by ssh, without any batch system. From the first machine (docs/launching.md, "Two machines"):
#
#   RLRESTORE_HOSTS="one two" RLRESTORE_CONFIG=configs/quickstart.yaml RLRESTORE_RUNS=/shared/runs scripts/launch/ssh.sh
#
# Starts Ray on every host, trains here, and stops on every host the Ray that it started. Stop it with SIGTERM: it saves first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/launch/settings.sh
source "$here/settings.sh"
: "${RLRESTORE_HOSTS:?set it to the machines, the head (this one) first: \"one two\"}"
read -r -a hosts <<<"$RLRESTORE_HOSTS"
use_token "$RLRESTORE_RUNS/.ray-token-${hosts[0]}"
head_address=${RLRESTORE_HEAD_ADDRESS:-$(hostname -I | cut -d' ' -f1)}
mapfile -t options < <(node_options)
export RAY_TMPDIR=/tmp/rlrestore-$RLRESTORE_PORT # apart from any other Ray of these machines; short: Ray's sockets lie in it
node_environment=(PATH="$PATH" RAY_TMPDIR="$RAY_TMPDIR" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$RLRESTORE_TOKEN_FILE")

steps=()
# shellcheck disable=SC2317,SC2329  # called by the trap
finish() {
    for step in "${steps[@]}"; do # `ray start --block` ends its node's Ray when it ends
        kill -TERM "$step" 2>/dev/null || true
    done
    wait 2>/dev/null || true
    [[ -z $own_token ]] || rm -f "$own_token"
}
trap finish EXIT

ray start --head --block --node-ip-address="$head_address" --port="$RLRESTORE_PORT" --include-dashboard=false --disable-usage-stats \
    "${options[@]}" &
steps+=($!)
wait_for "$head_address" "$RLRESTORE_PORT"
for host in "${hosts[@]:1}"; do
    command=$(printf '%q ' env "${node_environment[@]}" ray start --block --address="$head_address:$RLRESTORE_PORT" \
        --disable-usage-stats "${options[@]}")
    # -tt: when this end goes away, so does Ray on the other
    ssh -tt -o BatchMode=yes "$host" "$command" </dev/null &
    steps+=($!)
done

set_train_command "$head_address:$RLRESTORE_PORT"
code=0
run_and_forward bash "$here/again.sh" "${train_command[@]}" || code=$?
exit "$code"
