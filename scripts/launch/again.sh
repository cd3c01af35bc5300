#!/usr/bin/env bash
# Run a command, and run it again as long as it saves and stops by itself (exit code 85, run.max_hours). A stop that came from outside
# is passed on and ends this, too: whoever sent it decides what comes next.
#
#   again.sh rlrestore train CONFIG run.max_hours=12
set -euo pipefail
# shellcheck source=scripts/launch/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

for ((restart = 0; ; restart++)); do
    code=0
    run_and_forward "$@" || code=$?
    if ((code != STOPPED)) || [[ -n $asked ]]; then
        exit "$code"
    fi
    if ((restart >= RLRESTORE_RESTARTS)); then
        say "stopped and saved; RLRESTORE_RESTARTS=$RLRESTORE_RESTARTS are used up"
        exit "$code"
    fi
    say "stopped and saved; starting again ($((restart + 1)) of $RLRESTORE_RESTARTS)"
done
