#!/usr/bin/env bash
# Links of @SOURCE@ for the host @NAME@, which plays @NODE@.
# Made by `ray-train-geo shape`.
#
# Use: sudo bash @NAME@.sh up      shape (again); what does not work is undone
#      bash @NAME@.sh show         what is shaped, and what it carried
#      sudo bash @NAME@.sh clear   as it was before
set -Eeuo pipefail

interface=@INTERFACE@
incoming=geo-in
handle=9e0:

fail() {
  echo "$0: $*" >&2
  exit 1
}

# The handle of what shapes the interface; 0: is the kernel's default.
root_handle() {
  tc qdisc show dev "$interface" | awk '$4 == "root" { print $3; exit }'
}

ours_incoming() {
  ip link show dev "$incoming" >/dev/null 2>&1
}

clear() {
  if [[ "$(root_handle)" == "$handle" ]]; then
    tc qdisc del dev "$interface" root
  fi
  if ours_incoming; then
    tc qdisc del dev "$interface" ingress 2>/dev/null || true
    ip link del "$incoming"
  fi
}

check() {
  local found
  found="$(root_handle)"
  case "$found" in
    "" | 0: | "$handle") ;;
    *) fail "$interface is shaped by something else (qdisc $found); remove that first" ;;
  esac
  if ! ours_incoming && tc qdisc show dev "$interface" | grep -q '^qdisc ingress'; then
    fail "$interface has an ingress qdisc of something else; remove that first"
  fi
}

outgoing() {
  tc qdisc add dev "$interface" root handle "$handle" htb
  @OUTGOING@
}

incoming() {
  @INCOMING@
}

up() {
  check
  clear
  modprobe -qa sch_htb sch_netem cls_u32 sch_ingress act_mirred ifb 2>/dev/null || true
  trap 'clear; fail "tc refused, and all is as it was before; does this kernel have sch_netem and sch_htb?"' ERR
  outgoing
  incoming
  trap - ERR
}

show() {
  tc -s qdisc show dev "$interface"
  tc -s class show dev "$interface"
  if ours_incoming; then
    tc -s class show dev "$incoming"
  fi
}

[[ $# -eq 1 ]] || fail "usage: $0 up|show|clear"
for tool in tc ip awk; do
  command -v "$tool" >/dev/null || fail "$tool is not installed (Debian and Ubuntu: iproute2)"
done
ip link show dev "$interface" >/dev/null 2>&1 || fail "this host has no interface $interface"
case "$1" in
  show) show ;;
  up | clear)
    [[ "$(id -u)" -eq 0 ]] || fail "$1 takes root: sudo bash $0 $1"
    "$1"
    ;;
  *) fail "usage: $0 up|show|clear" ;;
esac
