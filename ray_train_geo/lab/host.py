"""An emulated host: process 1 of namespaces of its own.

It has a network (``wan0``, whose packets the switch carries), a host name, a /proc and an
/etc/hosts.  What runs on the host are its descendants: when it is killed the kernel kills them all
at once, as a power cut would.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

from ray_train_geo.lab import kernel

__all__ = ["INTERFACE", "boot"]

INTERFACE = "wan0"
_NETMASK = "255.255.0.0"
_MTU = 1500
_QUEUE_PACKETS = 4000

# As a host is tuned that sends gigabytes across continents: buffers for a round trip of 300 ms at
# 3 Gbit/s, and no slow start after each pause.
_SYSCTLS = {
    "net/ipv4/tcp_rmem": "4096 131072 134217728",
    "net/ipv4/tcp_wmem": "4096 65536 134217728",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/tcp_ecn": "1",
    "net/ipv6/conf/all/disable_ipv6": "1",
}


def boot(name: str, address: str, names: Path) -> tuple[int, int]:
    """Start a host; to be called in a process with a single thread.

    Args:
        names: an /etc/hosts of all hosts.

    Returns:
        The pid of its process 1, which dies with the caller; and its end of the network.

    Raises:
        OSError: the kernel refuses.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        kernel.new_process_namespace()
        pid = os.fork()
        if pid == 0:
            _live(theirs, name, address, names)
        theirs.close()
        said, fds, _, _ = socket.recv_fds(ours, 4096, 1)
    if not fds:
        os.waitpid(pid, 0)
        raise OSError(f"host {name} does not start: {said.decode() or 'its process died'}")
    return pid, fds[0]


def _live(parent: socket.socket, name: str, address: str, names: Path) -> None:
    """The life of process 1; it never returns."""
    try:
        kernel.die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the lab's user
        kernel.new_namespaces()
        kernel.mount_proc()
        kernel.bind(str(names), "/etc/hosts")
        socket.sethostname(name)
        for key, value in _SYSCTLS.items():
            setting = Path("/proc/sys", key)
            if setting.exists():
                setting.write_text(value)
        tun = kernel.open_tun(INTERFACE)
        kernel.configure_interface("lo")
        kernel.configure_interface(INTERFACE, address, _NETMASK, _MTU, _QUEUE_PACKETS)
        socket.send_fds(parent, [b"up"], [tun])
        _reap_for_ever()
    except BaseException as e:
        parent.send(str(e).encode())
    finally:
        os._exit(1)


def _reap_for_ever() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)
    # The other hosts' networks and the switch's sockets must not live on in here.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
