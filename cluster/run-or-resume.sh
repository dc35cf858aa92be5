#!/bin/bash
# Starts a sweep, or goes on with it where its run folder exists: the same command for a cluster's
# first job and for the one after a lost node. The image of the Dockerfile has it as `run-or-resume`.
#
#   cluster/run-or-resume.sh /shared/cars.yaml /shared/runs/cars --address auto
#
# Change: nothing. Further arguments go to both `foldrace run` and `foldrace resume`. The run folder is
# your own, so its plugins are trusted: the node that knew them from the config may be gone.
set -euo pipefail

config=${1:?"usage: $0 CONFIG RUN_FOLDER [--address ...] [--set KEY=VALUE ...]"}
run=${2:?"usage: $0 CONFIG RUN_FOLDER [--address ...] [--set KEY=VALUE ...]"}
shift 2
if foldrace status "$run" >/dev/null 2>&1; then
  exec foldrace resume "$run" --trust-plugins "$@"
fi
exec foldrace run "$config" --out "$run" "$@"
