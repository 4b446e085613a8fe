"""Changing a lab while it runs: links that break, heal, slow down; hosts that die and come back."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ray_train_geo.errors import ClusterError, SpecError
from ray_train_geo.lab.fabric import Shape, Traffic

__all__ = ["Control"]

_ANSWER_S = 20.0
_DEATH_S = 20.0
_POLL_S = 0.02
_MOST_MESSAGE_BYTES = 1 << 20


class Control:
    """A connection to a lab's switch, from this process or another one of the machine.

    Hosts are named by themselves or, all of a region at once, by their region.

    Args:
        path: the control socket; ``ray-train-geo lab`` prints it, and commands inside find it in
            the environment as GEO_LAB.

    Raises:
        ClusterError: no lab is there; and from each method, when it has ended.
    """

    def __init__(self, path: str | Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_S)
        try:
            self._socket.connect(str(path))
        except OSError as e:
            self._socket.close()
            raise ClusterError(f"no lab answers at {path}: {e.strerror or e}") from None

    @classmethod
    def from_environment(cls) -> Control:
        """The lab that this process runs in.

        Raises:
            ClusterError: it runs in none.
        """
        path = os.environ.get("GEO_LAB")
        if path is None:
            raise ClusterError("GEO_LAB is not set: this process does not run in a lab")
        return cls(path)

    def cut(self, a: str, b: str | None = None) -> None:
        """Nothing arrives any more between ``a`` and ``b`` (or all others), nor is it refused.

        Raises:
            SpecError: no such host or region; as the other methods.
        """
        self._cut(a, b, True)

    def heal(self, a: str, b: str | None = None) -> None:
        """Undo :meth:`cut`."""
        self._cut(a, b, False)

    def shape(self, a: str, b: str, **changes: float) -> None:
        """Change links from ``a`` to ``b``, one way: fields of :class:`~.fabric.Shape`.

        Raises:
            SpecError: no field of it, or out of range.
        """
        known = Shape.__slots__
        for name, value in changes.items():
            if name not in known:
                raise SpecError(f"a link has no {name!r}; it has {', '.join(known)}")
            above_zero = value > 0 if name.endswith("bytes_per_s") else value >= 0
            if not above_zero or (name == "loss" and value > 1):
                raise SpecError(f"{name}={value:g} is out of range")
        self._ask({"do": "shape", "from": a, "to": b, "changes": changes})

    def kill(self, host: str) -> None:
        """Cut a host's power: it is gone from the network, then all of its processes are."""
        self._ask({"do": "kill", "host": host})
        ends_s = time.monotonic() + _DEATH_S
        while host in (pids := self.pids()) and pids[host] is not None:
            if time.monotonic() > ends_s:
                raise ClusterError(f"host {host} does not die")
            time.sleep(_POLL_S)

    def boot(self, host: str) -> None:
        """Start a killed host again; nothing runs on it."""
        self._ask({"do": "boot", "host": host})

    def pids(self) -> dict[str, int | None]:
        """The process that each host is, as seen from outside; None: it is dead."""
        return dict(self._ask({"do": "hosts"}))

    def shapes(self) -> dict[tuple[str, str], Shape]:
        """Each link as it is now."""
        return {(a, b): Shape(**s) for a, b, s in self._ask({"do": "shapes"})}

    def traffic(self) -> dict[tuple[str, str], Traffic]:
        """What each link has carried."""
        return {(a, b): Traffic(**t) for a, b, t in self._ask({"do": "traffic"})}

    def close(self) -> None:
        """End the connection; the lab goes on."""
        self._socket.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self, a: str, b: str | None, down: bool) -> None:
        self._ask({"do": "cut", "a": a, "b": b, "down": down})

    def _ask(self, request: Mapping[str, Any]) -> Any:
        with _lab_errors():
            self._socket.send(json.dumps(request).encode())
            text = self._socket.recv(_MOST_MESSAGE_BYTES)
        if not text:
            raise ClusterError("the lab has ended")
        answer = json.loads(text)
        if "error" in answer:
            raise SpecError(answer["error"])
        return answer["result"]


@contextlib.contextmanager
def _lab_errors() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise ClusterError(f"the lab's switch did not answer for {_ANSWER_S:g} s") from None
    except OSError as e:
        raise ClusterError(f"the lab has ended: {e.strerror or e}") from None
