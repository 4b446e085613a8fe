#!/usr/bin/env bash
# Starts the cluster of local-multi-node.yaml on this machine and stays in the foreground; Ctrl-C (or
# SIGTERM) ends every process of it, and of no other Ray.
#
# Use:     bash cluster_configs/local-multi-node.sh
# Change:  RTG_PORT (default 26379; Ray client and dashboard take the next two), RTG_TEMP_DIR (default
#          /tmp/rtg; keep it short, socket paths are limited to 107 bytes), RTG_DASHBOARD=false.
# Risks:   the token in $RTG_TEMP_DIR/auth_token is all that guards the cluster: keep it private.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
port="${RTG_PORT:-26379}"
temp_dir="${RTG_TEMP_DIR:-/tmp/rtg}"

# Always explicit: a forgotten ~/.ray/auth_token would otherwise decide which mode Ray runs in.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$temp_dir/auth_token"
mkdir -p "$temp_dir"
[[ -s "$RAY_AUTH_TOKEN_PATH" ]] || (
  umask 077
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
)

config="$temp_dir/autoscaling.yaml"
sed "s/127\.0\.0\.1:26379/127.0.0.1:$port/" "$here/local-multi-node.yaml" >"$config"

# What Ray's fake provider and autoscaler v2 need to know the head by.
head_id=fffffffffffffffffffffffffffffffffffffffffffffffffff00000
export RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1 AUTOSCALER_UPDATE_INTERVAL_S=1
export RAY_CLOUD_INSTANCE_ID="$head_id" RAY_OVERRIDE_NODE_ID_FOR_TESTING="$head_id"
export RAY_NODE_TYPE_NAME=ray.head.default

# The fake provider's nodes would outlive the head, and Ray gives each worker a process group of its
# own; a session holds them all, and is ended as a whole.
setsid ray start --head --block --disable-usage-stats --num-cpus=0 --object-store-memory=80000000 \
  --node-ip-address=127.0.0.1 --port="$port" --ray-client-server-port="$((port + 1))" \
  --include-dashboard="${RTG_DASHBOARD:-true}" --dashboard-port="$((port + 2))" \
  --dashboard-agent-listen-port=0 --temp-dir="$temp_dir" --autoscaling-config="$config" \
  --labels=ray.io/availability-region=region-a,ray.io/availability-zone=region-a-1,ray.io/market-type=on-demand &
cluster=$!

# Zombies don't count: a container's init may leave them.
alive() { pgrep --session "$cluster" --runstates D,R,S,T >/dev/null; }

end_cluster() {
  trap '' INT TERM
  for stop in TERM KILL; do
    mapfile -t members < <(pgrep --session "$cluster")
    ((${#members[@]})) || return 0
    kill "-$stop" "${members[@]}" 2>/dev/null || true
    for _ in $(seq 20); do
      alive || return 0
      sleep 0.1
    done
  done
}
trap end_cluster EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "In another terminal:"
echo "  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH"
echo "  ray-train-geo train $here/local-job.yaml --address 127.0.0.1:$port"
wait "$cluster"
