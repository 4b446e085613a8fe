"""A network of its own for a chaos run, in which a node can be cut off and healed again.

Every node has a network namespace and in it one link to a bridge, which has a namespace too::

    node 1  eth0 ───┐
    node 2  eth0 ───┤ bridge
    node 3  eth0 ─┤ ├          cut off: its end is no longer a port of the bridge

Nobody is told of a cut: the link stays up and connections stay open, but what is sent vanishes, as
when a cable beyond the next switch is cut.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence

from ray_train_geo.errors import InputError

__all__ = ["Island", "island"]

_BRIDGE = "island"
_NEEDED = (
    "partitions take Linux with veth and bridge devices, the commands ip, unshare and nsenter, and "
    "root"
)


class _Namespace:
    """A network namespace; it lasts until :meth:`close`, or until this process dies."""

    def __init__(self) -> None:
        # ``cat`` ends with its standard input, and that with us, however we end.
        command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
        pipe = subprocess.PIPE
        try:
            self._keeper = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, text=True
            )
        except OSError as e:
            raise _refused(" ".join(command), str(e)) from None
        assert self._keeper.stdout is not None
        if not self._keeper.stdout.readline():
            _, said = self._keeper.communicate()
            raise _refused(" ".join(command), said)

    @property
    def pid(self) -> int:
        return self._keeper.pid

    def inside(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", *command]

    def ip(self, *arguments: str) -> None:
        command = self.inside(["ip", *arguments])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _refused(f"ip {' '.join(arguments)}", done.stderr)

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.communicate()


class Island:
    """Made by :func:`island`; nodes are known by their addresses."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._hub = self._namespace()
        self._hub.ip("link", "add", _BRIDGE, "type", "bridge")
        self._hub.ip("link", "set", _BRIDGE, "up")
        self._nodes: dict[str, tuple[_Namespace, str]] = {}

    def _namespace(self) -> _Namespace:
        made = _Namespace()
        self._stack.callback(made.close)
        return made

    def address(self) -> str:
        """The address of a new node."""
        number, node = len(self._nodes) + 1, self._namespace()
        address, port = f"10.77.{number // 250}.{number % 250 + 1}", f"port{number}"
        self._hub.ip(
            "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid)
        )
        self._hub.ip("link", "set", port, "master", _BRIDGE, "up")
        node.ip("link", "set", "lo", "up")
        node.ip("address", "add", f"{address}/16", "dev", "eth0")
        node.ip("link", "set", "eth0", "up")
        node.ip("route", "add", "default", "dev", "eth0")  # so that it knows its own address
        self._nodes[address] = node, port
        return address

    def inside(self, address: str, command: Sequence[str]) -> list[str]:
        """``command``, run on the node."""
        return self._nodes[address][0].inside(command)

    def cut(self, address: str) -> None:
        """Nothing gets through to the node or from it any more."""
        self._hub.ip("link", "set", self._nodes[address][1], "nomaster")

    def heal(self, address: str) -> None:
        """The node is reached again."""
        self._hub.ip("link", "set", self._nodes[address][1], "master", _BRIDGE)


@contextlib.contextmanager
def island() -> Iterator[Island]:
    """A new network.

    Raises:
        InputError: this machine does not let one be made.
    """
    with contextlib.ExitStack() as stack:
        yield Island(stack)


def _refused(command: str, said: str) -> InputError:
    reason = said.strip().splitlines()
    return InputError(
        f"can't make a network for partitions: {command}: {reason[0] if reason else 'it failed'}; "
        f"{_NEEDED}"
    )
