#!/usr/bin/env bash
# What head.sh and worker.sh share: where this node is, its address on the VPN, and fixed ports.
# Sourced by both; run neither `bash common.sh` nor anything before README.md's network is up.
set -euo pipefail

# Region and zone are facts that only you know; Ray turns them into node labels.
: "${RAY_NODE_REGION:?set it to where this node is, such as eu-central-1}"
: "${RAY_NODE_ZONE:?set it to the zone in that region, such as eu-central-1a}"
: "${RAY_NODE_MARKET_TYPE:?set it to spot or on-demand}"
export RAY_NODE_REGION RAY_NODE_ZONE RAY_NODE_MARKET_TYPE

vpn_interface="${VPN_INTERFACE:-wg0}"
node_ip="$(ip -4 -oneline address show dev "$vpn_interface" | awk '{split($4, a, "/"); print a[1]; exit}')"
: "${node_ip:?interface $vpn_interface has no IPv4 address; is the VPN up?}"

# Tensors go over the VPN as well; without these gloo and NCCL pick an interface by themselves.
export GLOO_SOCKET_IFNAME="$vpn_interface" NCCL_SOCKET_IFNAME="$vpn_interface"

# Explicit on every process: left unset, Ray decides by whether ~/.ray/auth_token happens to exist.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray-train-geo/auth_token}"
if [[ "$RAY_AUTH_MODE" == token && ! -s "$RAY_AUTH_TOKEN_PATH" ]]; then
  echo "no token in $RAY_AUTH_TOKEN_PATH: make one on the head and copy it here (README.md)" >&2
  exit 2
fi

# SIGTERM (which a cloud sends before it takes a spot node) makes `ray start --block` drain this node
# for as long; AWS gives 120 s of notice, GCP 30 s.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-25}"

# Fixed ports, so that a firewall can be written. PORT_BASE moves them all (two nodes on one host).
port_base="${PORT_BASE:-6379}"
node_flags=(
  --block --disable-usage-stats
  --node-ip-address="$node_ip"
  --node-manager-port="$((port_base + 1))"
  --object-manager-port="$((port_base + 2))"
  --runtime-env-agent-port="$((port_base + 3))"
  --dashboard-agent-grpc-port="$((port_base + 4))"
  --dashboard-agent-listen-port="$((port_base + 5))"
  --metrics-export-port="$((port_base + 6))"
  --min-worker-port="$((port_base + 100))"
  --max-worker-port="$((port_base + 299))"
)
if [[ -n "${RAY_TEMP_DIR:-}" ]]; then
  node_flags+=(--temp-dir="$RAY_TEMP_DIR")
fi
