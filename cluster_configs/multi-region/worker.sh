#!/usr/bin/env bash
# Joins this host (any region, any cloud, owned or spot) to the cluster that head.sh started. Run it
# again after a preemption: the job takes the node in while it trains on.
#
# Use:     RAY_NODE_REGION=eu-central-1 RAY_NODE_ZONE=eu-central-1b RAY_NODE_MARKET_TYPE=spot \
#            bash worker.sh 10.99.0.1:6379
# Change:  the head's VPN address; VPN_INTERFACE (default wg0), PORT_BASE (default 6379),
#          NUM_CPUS and NUM_GPUS (default: what the host has), RAY_AUTH_TOKEN_PATH, RAY_TEMP_DIR.
# Risks:   billed until you stop it, in every region. See README.md.
set -euo pipefail
head_address="${1:?usage: worker.sh HEAD_VPN_IP:PORT}"
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -n "${NUM_CPUS:-}" ]]; then
  node_flags+=(--num-cpus="$NUM_CPUS")
fi
if [[ -n "${NUM_GPUS:-}" ]]; then
  node_flags+=(--num-gpus="$NUM_GPUS")
fi
# Tells Ray when the cloud is about to take this host; where there is no cloud it says so and ends.
if [[ "$RAY_NODE_MARKET_TYPE" == spot ]]; then
  ray-train-geo watch-node --address="$head_address" --node="$node_ip" &
fi
exec ray start --address="$head_address" "${node_flags[@]}"
