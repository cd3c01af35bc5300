# shellcheck shell=bash
# The one set of variables of all launchers, with their defaults; they source this file. Set them in the environment, or in a file that
# RLRESTORE_SETTINGS names.
#
#   RLRESTORE_CONFIG         config file, as the head node sees it (needed)
#   RLRESTORE_RUNS           folder of all runs, shared by all nodes (needed): becomes run.dir
#   RLRESTORE_ARGS           more key=value overrides, separated by blanks
#   RLRESTORE_BIN            folder of `rlrestore` and `ray` on every node; empty: they are on PATH
#   RLRESTORE_NODES          machines                        RLRESTORE_GPUS  of each      RLRESTORE_CPUS  of each (0: Ray counts)
#   RLRESTORE_PORT           of the Ray head; below the range of ports that the system hands out
#   RLRESTORE_HEAD_ADDRESS   address by which other nodes reach the head; empty: found by the launcher
#   RLRESTORE_TOKEN_FILE     Ray's token, mode 600, at the same path on every node; empty: made by the launcher, for this run
#   RLRESTORE_START_S        limit for the head to answer
#   RLRESTORE_GRACE_S        time between the request to stop and the kill: one iteration, its evaluation and a checkpoint
#   RLRESTORE_RESTARTS       times that a run which saved and stopped (exit code 85) is started again
#   RLRESTORE_HOSTS          ssh.sh: the machines, the head first
#   RLRESTORE_DASHBOARD      ray_job.sh: address of the cluster's job server
#   RLRESTORE_NAME, RLRESTORE_IMAGE, RLRESTORE_CLAIM, RLRESTORE_MEMORY_GB   kuberay.sh: names of the job, image and shared volume claim,
#                            memory of a pod

if [[ -n ${RLRESTORE_SETTINGS:-} ]]; then
    # shellcheck disable=SC1090  # the user's file
    source "$RLRESTORE_SETTINGS"
fi
: "${RLRESTORE_CONFIG:?set it to the config file, e.g. configs/quickstart.yaml}"
: "${RLRESTORE_RUNS:?set it to a folder that all nodes share; runs are written there}"
: "${RLRESTORE_ARGS:=}"
: "${RLRESTORE_BIN:=}"
: "${RLRESTORE_NODES:=2}"
: "${RLRESTORE_GPUS:=0}"
: "${RLRESTORE_CPUS:=0}"
: "${RLRESTORE_PORT:=6379}"
: "${RLRESTORE_HEAD_ADDRESS:=}"
: "${RLRESTORE_TOKEN_FILE:=}"
: "${RLRESTORE_START_S:=120}"
: "${RLRESTORE_GRACE_S:=300}"
: "${RLRESTORE_RESTARTS:=100}"
: "${RLRESTORE_HOSTS:=}"
: "${RLRESTORE_DASHBOARD:=http://127.0.0.1:8265}"
: "${RLRESTORE_NAME:=rlrestore}"
: "${RLRESTORE_IMAGE:=rlrestore:cuda}"
: "${RLRESTORE_CLAIM:=rlrestore-runs}"
: "${RLRESTORE_MEMORY_GB:=64}"
[[ -z $RLRESTORE_BIN ]] || PATH="$RLRESTORE_BIN:$PATH"

# shellcheck disable=SC2034  # for the scripts that source this
STOPPED=85 # rlrestore's exit code for "saved and stopped as asked"

say() { printf '%s launch: %s\n' "$(date -u +%FT%TZ)" "$*" >&2; }

# Ray's token in RLRESTORE_TOKEN_FILE, or, for this run alone, in the file $1; made with mode 600 if it is not there.
use_token() {
    # shellcheck disable=SC2034  # for the scripts that source this
    own_token=
    if [[ -z $RLRESTORE_TOKEN_FILE ]]; then
        # shellcheck disable=SC2034
        own_token=$1
        RLRESTORE_TOKEN_FILE=$1
    fi
    if [[ ! -s $RLRESTORE_TOKEN_FILE ]]; then
        mkdir -p "$(dirname "$RLRESTORE_TOKEN_FILE")"
        (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RLRESTORE_TOKEN_FILE")
    fi
    export RLRESTORE_TOKEN_FILE RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RLRESTORE_TOKEN_FILE
}

# Wait until something listens at HOST PORT.
wait_for() {
    local deadline=$((SECONDS + RLRESTORE_START_S))
    until (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; do
        if ((SECONDS >= deadline)); then
            say "nothing listens at $1:$2 after $RLRESTORE_START_S s (RLRESTORE_START_S)"
            return 69
        fi
        sleep 1
    done
}

# `ray start` options for what a node has.
node_options() {
    ((RLRESTORE_CPUS == 0)) || printf -- '--num-cpus=%s\n' "$RLRESTORE_CPUS"
    ((RLRESTORE_GPUS == 0)) || printf -- '--num-gpus=%s\n' "$RLRESTORE_GPUS"
}

# The training command for the cluster at ADDRESS, as words in the array `train_command`.
set_train_command() {
    local -a overrides
    read -r -a overrides <<<"$RLRESTORE_ARGS"
    # shellcheck disable=SC2034  # for the scripts that source this
    train_command=(rlrestore train "$RLRESTORE_CONFIG" "ray.address=$1" "run.dir=$RLRESTORE_RUNS" "${overrides[@]}")
}

# Run a command in the background, hand SIGTERM and SIGUSR1 on to it, and return its exit code. `asked` says whether one came.
run_and_forward() {
    # shellcheck disable=SC2034  # for the scripts that source this
    asked=
    "$@" &
    local child=$! code
    # shellcheck disable=SC2064  # this child
    trap "asked=USR1; kill -USR1 $child 2>/dev/null || true" USR1
    # shellcheck disable=SC2064
    trap "asked=TERM; kill -TERM $child 2>/dev/null || true" TERM
    while true; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # a signal ends `wait`, not the child
    done
    trap - USR1 TERM
    return "$code"
}
