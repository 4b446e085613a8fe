"""The few system calls that emulated hosts need, by ctypes (Linux).

Python has ``unshare`` and ``setns`` from 3.12 on, and ``mount`` and ``prctl`` not at all.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct

__all__ = [
    "bind",
    "configure_interface",
    "die_with_parent",
    "enter",
    "mount_proc",
    "new_namespaces",
    "new_process_namespace",
    "open_tun",
]

_NEW_MOUNTS, _NEW_HOSTNAME, _NEW_PROCESSES, _NEW_NETWORK = (
    0x20000,
    0x4000000,
    0x20000000,
    0x40000000,
)
_PRIVATE_FROM_HERE_DOWN = 0x4000 | 1 << 18
_BIND = 0x1000
_SET_PARENT_DEATH_SIGNAL = 1

_TUN, _NO_PACKET_INFO, _OFFLOAD_HEADER = 0x1, 0x1000, 0x4000
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
_OFFLOAD_CHECKSUM, _OFFLOAD_TCP4, _OFFLOAD_TCP_ECN = 0x1, 0x2, 0x8

_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8922, 0x8943
_UP_AND_RUNNING = 0x1 | 0x40

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def new_namespaces() -> None:
    """Give this process a network, a hostname and mounts of its own; mounts stay private.

    Raises:
        OSError: not permitted here; as the other functions of this module.
    """
    flags = _NEW_NETWORK | _NEW_MOUNTS | _NEW_HOSTNAME
    _check(_libc.unshare(flags), "making network, mount and hostname namespaces")
    private = ctypes.c_ulong(_PRIVATE_FROM_HERE_DOWN)
    _check(_libc.mount(b"none", b"/", None, private, None), "making mounts private")


def new_process_namespace() -> None:
    """The next child is process 1 of a namespace of its own: all in it die with that child."""
    with open("/proc/self/ns/pid", "rb") as own:
        _check(_libc.setns(own.fileno(), _NEW_PROCESSES), "leaving a process namespace")
    _check(_libc.unshare(_NEW_PROCESSES), "making a process namespace")


def mount_proc() -> None:
    """Show the processes of this process namespace in /proc."""
    _check(_libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(0), None), "mounting /proc")


def bind(source: str, target: str) -> None:
    """Show the file ``source`` in the place of ``target``, in this mount namespace."""
    flags = ctypes.c_ulong(_BIND)
    done = _libc.mount(source.encode(), target.encode(), None, flags, None)
    _check(done, f"mounting {source} on {target}")


def enter(pid: int) -> None:
    """Join all namespaces of a process; its process namespace counts for the next child.

    Raises:
        ProcessLookupError: the process is gone.
    """
    try:
        found = [
            (os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), kind)
            for name, kind in (
                ("pid", _NEW_PROCESSES),
                ("net", _NEW_NETWORK),
                ("uts", _NEW_HOSTNAME),
                ("mnt", _NEW_MOUNTS),
            )
        ]
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} is gone") from None
    for fd, kind in found:
        _check(_libc.setns(fd, kind), f"entering the namespaces of process {pid}")
        os.close(fd)


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that made it ends."""
    kill = ctypes.c_ulong(signal.SIGKILL)
    _check(_libc.prctl(_SET_PARENT_DEATH_SIGNAL, kill), "asking to die with the parent")


def open_tun(name: str) -> int:
    """A TUN device in this network namespace: a file of IP packets, each after 10 bytes.

    Those say what the kernel left to be done (``virtio_net_hdr``): packets of up to 64 KiB that a
    network card would cut up, with checksums that it would compute.
    """
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = _TUN | _NO_PACKET_INFO | _OFFLOAD_HEADER
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(tun, _TUNSETVNETHDRSZ, struct.pack("i", 10))
    fcntl.ioctl(tun, _TUNSETOFFLOAD, _OFFLOAD_CHECKSUM | _OFFLOAD_TCP4 | _OFFLOAD_TCP_ECN)
    return tun


def configure_interface(
    name: str, address: str = "", netmask: str = "", mtu: int = 0, queue_packets: int = 0
) -> None:
    """Bring a network interface up, with what is given."""
    who = name.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for request, dotted in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, netmask)):
            if dotted:
                inet = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(dotted))
                fcntl.ioctl(any_socket, request, struct.pack("16s16s8x", who, inet))
        for request, number in ((_SIOCSIFMTU, mtu), (_SIOCSIFTXQLEN, queue_packets)):
            if number:
                fcntl.ioctl(any_socket, request, struct.pack("16si20x", who, number))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", who, _UP_AND_RUNNING))
