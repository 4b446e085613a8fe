#!/usr/bin/env bash
# Starts the head of a cluster of several regions on this host: GCS, dashboard and coordinator, but no
# stage worker (no CPU is offered), so an on-demand or owned machine without a GPU is right.
#
# Use:     RAY_NODE_REGION=us-east-1 RAY_NODE_ZONE=us-east-1a RAY_NODE_MARKET_TYPE=on-demand bash head.sh
# Change:  VPN_INTERFACE (default wg0), PORT_BASE (default 6379; the GCS listens there),
#          DASHBOARD_PORT (default 8265), RAY_AUTH_TOKEN_PATH, RAY_TEMP_DIR.
# Risks:   who has the token runs code on every node. Losing this host ends the run: the newest
#          checkpoint in checkpoint.storage_path is what remains. See README.md.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec ray start --head --num-cpus=0 --num-gpus=0 "${node_flags[@]}" \
  --port="$port_base" --ray-client-server-port="$((port_base + 7))" \
  --dashboard-host="$node_ip" --dashboard-port="${DASHBOARD_PORT:-8265}"
