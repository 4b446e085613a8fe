"""Whether the kernel lets this process make emulated hosts, found out by asking it for one.

``python -m ray_train_geo.lab.probe`` says so: exit code 0, or one line and exit code 1.  It asks
the kernel alone.  Where that agrees and there is still no lab, the fault is ours.
"""

from __future__ import annotations

import errno
import os
import sys

from ray_train_geo.lab import kernel

__all__ = ["no_lab"]

_REFUSALS = (
    errno.EPERM, errno.EACCES,  # no such right
    errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOSYS,  # no such thing: no TUN, no namespaces
)  # fmt: skip


def no_lab(reason: str) -> str:
    """What to tell who wants a lab and can't have one."""
    return (
        f"no lab can be made here: {reason}. It takes root (CAP_SYS_ADMIN and CAP_NET_ADMIN) and "
        "/dev/net/tun"
    )


def _make_a_host() -> None:
    """In this process, which is of no use for anything else then."""
    kernel.new_process_namespace()
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    kernel.new_namespaces()
    kernel.mount_proc()
    os.close(kernel.open_tun("probe0"))


def _main() -> None:
    if sys.platform != "linux":
        sys.exit(no_lab("this is no Linux"))
    try:
        _make_a_host()
    except OSError as e:
        if e.errno not in _REFUSALS:
            raise
        sys.exit(no_lab(str(e)))


if __name__ == "__main__":
    _main()
