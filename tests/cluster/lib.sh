# Settings and functions shared by all scripts here, for cluster $DAGGER_CLUSTER (a number, 0 to 255; clusters can run side by side).
# shellcheck shell=bash disable=SC2034
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
N=${DAGGER_CLUSTER:-0}
NAME=dagger-test-$N # network interface on the host, and cgroup
CACHE=${DAGGER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dagger-operator}
STATE=$CACHE/cluster/$N
IMAGES=$CACHE/images/node-$N # the node's images outlive the cluster: unpacking gigabytes takes a minute
HOST=172.30.$N.1 # this machine, as pods and the node see it
NODE=172.30.$N.2 # the node, as this machine sees it
NOWHERE=172.30.$N.254 # an unused address: as the default route, it lets nothing leave the machine
PODS=10.244.$N.0/24
SERVICES=10.96.$N.0/24
IMAGE=localhost/busybox:1 # the pods' pause container, and a shell for tests

fail() { printf '%s: %s\n' "$(basename "$0")" "$1" >&2; exit 1; }

# Prints the pid of the running cluster's first process, as seen on this machine; nothing if it does not run. Its parent is found by its
# command line.
first_process() { pgrep -P "$(pgrep -f "^unshare .*/tests/cluster/node $N -\$" || echo none)" 2>/dev/null; }

kubectl() { "$(tools kubectl)/kubectl" --kubeconfig="$STATE/kubeconfig" "$@"; }

# Prints the folder with the given Kubernetes programs, which are built if missing.
tools() { "$ROOT/scripts/build-tool" kubernetes "$@"; }

# patiently SECONDS COMMAND...: retries until the command succeeds; fails after SECONDS.
patiently() {
  local deadline=$((SECONDS + $1)) && shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.2
  done
}

# keep NAME COMMAND...: runs a daemon in the background and restarts it whenever it ends, as an init system would.
keep() {
  local name=$1 && shift
  while :; do
    "$@" >>"$LOG/$name.log" 2>&1 || true
    sleep 0.5
  done &
}
