#!/usr/bin/env bash
# One run on several nodes under SLURM. In the repository's root:
#
#   RLRESTORE_CONFIG=configs/quickstart.yaml RLRESTORE_RUNS=/shared/runs RLRESTORE_GPUS=8 \
#       sbatch --nodes=2 --gres=gpu:8 --time=24:00:00 scripts/launch/slurm.sh
#
# Ray runs on all nodes of the allocation and ends with it; the training command runs on the first one. SLURM asks it to stop 5 minutes
# before the time limit, and when the job is preempted: it saves and exits with 85, and the job goes back into the queue.
#SBATCH --job-name=rlrestore
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=rlrestore-%j.log
set -euo pipefail
root=${RLRESTORE_ROOT:-${SLURM_SUBMIT_DIR:?run it with sbatch}} # SLURM runs a copy of this file from elsewhere
# shellcheck source=scripts/launch/settings.sh
source "$root/scripts/launch/settings.sh"

# On each node (`srun` runs this file again): its part of Ray, in the foreground.
if [[ ${1:-} == node ]]; then
    head_address=$2
    mapfile -t options < <(node_options)
    if ((SLURM_NODEID == 0)); then
        export RAY_JOB_STOP_WAIT_TIME_S=$RLRESTORE_GRACE_S
        exec ray start --head --block --node-ip-address="$head_address" --port="$RLRESTORE_PORT" --include-dashboard=false \
            --disable-usage-stats "${options[@]}"
    fi
    wait_for "$head_address" "$RLRESTORE_PORT"
    exec ray start --block --address="$head_address:$RLRESTORE_PORT" --disable-usage-stats "${options[@]}"
fi

use_token "$RLRESTORE_RUNS/.ray-token-$SLURM_JOB_ID"
export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID # short: Ray's sockets lie in it
head_address=${RLRESTORE_HEAD_ADDRESS:-$(hostname -I | cut -d' ' -f1)}
say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NNODES nodes ($SLURM_JOB_NODELIST), head $head_address:$RLRESTORE_PORT"

srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash "$root/scripts/launch/slurm.sh" node "$head_address" &
ray_step=$!
# shellcheck disable=SC2317,SC2329  # called by the trap
finish() {
    kill -TERM "$ray_step" 2>/dev/null || true
    wait "$ray_step" 2>/dev/null || true
    [[ -z $own_token ]] || rm -f "$own_token"
}
trap finish EXIT

code=0
wait_for "$head_address" "$RLRESTORE_PORT" || code=$?
if ((code == 0)); then
    set_train_command "$head_address:$RLRESTORE_PORT"
    run_and_forward "${train_command[@]}" || code=$?
fi
say "training ended with exit code $code"
if ((code == STOPPED)); then
    if ((${SLURM_RESTART_COUNT:-0} < RLRESTORE_RESTARTS)); then
        scontrol requeue "$SLURM_JOB_ID" || say "not requeued by us: SLURM does it itself after a preemption"
    else
        say "not requeued: RLRESTORE_RESTARTS=$RLRESTORE_RESTARTS are used up"
    fi
fi
exit "$code"
