# What every script here knows of cluster $DAGGER_CLUSTER (a number, 0 to 255; clusters live side by side).
# shellcheck shell=bash disable=SC2034
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
N=${DAGGER_CLUSTER:-0}
NAME=dagger-test-$N # network interface on the host, and cgroup
CACHE=${DAGGER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dagger-operator}
STATE=$CACHE/cluster/$N
IMAGES=$CACHE/images/node-$N # the node's images outlive it: gigabytes take a minute to unpack
HOST=172.30.$N.1 # this machine, as pods and the node see it
NODE=172.30.$N.2 # the node, as this machine sees it
NOWHERE=172.30.$N.254 # nobody has it: the default route, so nothing leaves the machine
PODS=10.244.$N.0/24
SERVICES=10.96.$N.0/24
IMAGE=localhost/busybox:1 # the pods' pause container, and a shell for tests

fail() { printf '%s: %s\n' "$(basename "$0")" "$1" >&2; exit 1; }

# The first process of the running cluster, as this machine counts; nothing if it does not run. Its parent is known by its command line.
first_process() { pgrep -P "$(pgrep -f "^unshare .*/tests/cluster/node $N -\$" || echo none)" 2>/dev/null; }

kubectl() { "$(tools kubectl)/kubectl" --kubeconfig="$STATE/kubeconfig" "$@"; }

# The folder with these programs of Kubernetes, built where they are missing.
tools() { "$ROOT/scripts/build-tool" kubernetes "$@"; }

# patiently SECONDS COMMAND...: until it succeeds.
patiently() {
  local deadline=$((SECONDS + $1)) && shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.2
  done
}

# keep NAME COMMAND...: runs a daemon in the background, and again whenever it ends, as an init system would.
keep() {
  local name=$1 && shift
  while :; do
    "$@" >>"$LOG/$name.log" 2>&1 || true
    sleep 0.5
  done &
}
