#!/usr/bin/env bash
# elastic.sh HOSTFILE RECIPE RANKS [--set key=value ...]: workers that come and go, RANKS ranks on each of some hosts.
# HOSTFILE has a line a host, `NAME slots=...`. A lighthouse runs here, at PORT (29510) of this host, and `qsr train
# --elastic` on every host, by ssh without a password; the same checkout and environment on all of them, and one folder
# for the run. A worker that dies is started again RESTARTS (100) times on each host. A host that is lost is left out,
# and `TORCHFT_LIGHTHOUSE=... qsr train RECIPE --elastic --ranks N` on another one joins. docs/elastic.md says what is
# promised. GRACE is the recipe's membership.grace_seconds, which the lighthouse must know.
# NCCL_..., GLOO_... and DS_ACCELERATOR of this shell are handed on.
set -euo pipefail
hostfile=${1:?hostfile} recipe=${2:?recipe} ranks=${3:?ranks on each host}
port=${PORT:-29510}
here=$(hostname -f)
export TORCHFT_LIGHTHOUSE=http://$here:$port
qsr lighthouse --port "$port" ${GRACE:+--grace-seconds "$GRACE"} &
lighthouse=$!
trap 'kill $lighthouse' EXIT
mapfile -t given < <(env | grep -E '^(PATH|PYTHONPATH|DS_ACCELERATOR|OMP_NUM_THREADS|TORCHFT_.*|NCCL_.*|GLOO_.*)=')
train=(env "${given[@]}" qsr train "$recipe" --elastic --ranks "$ranks" --restarts "${RESTARTS:-100}" "${@:4}")
pids=()
while read -r host _; do
  [[ -n $host && $host != \#* ]] || continue
  ssh -n "$host" "cd $(printf %q "$PWD") && $(printf '%q ' "${train[@]}")" &
  pids+=($!)
done <"$hostfile"
code=1
for pid in "${pids[@]}"; do
  wait "$pid" && code=0 # the run is done where one host has come to its end
done
exit "$code"
