"""Round-trip times between workers, measured over the sockets' own path (TCP, not ICMP)."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from ray_train_geo.errors import DeadlineError

__all__ = ["PingServer", "round_trip_s"]

_BACKLOG = 64


class PingServer:
    """Answers every byte with itself, until it is closed."""

    def __init__(self, hostname: str) -> None:
        self._heard_s: float | None = None
        self._listener = socket.create_server((hostname, 0), backlog=_BACKLOG)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, name="ping", daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(1):
                self._heard_s = time.monotonic()
                connection.sendall(data)

    def silence_s(self) -> float | None:
        """Seconds since somebody was heard; None if nobody ever was."""
        return None if self._heard_s is None else time.monotonic() - self._heard_s

    def close(self) -> None:
        # A blocked accept() ends by shutdown only.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def round_trip_s(hostname: str, port: int, samples: int = 8, deadline_s: float = 10.0) -> float:
    """The shortest of ``samples`` round trips to a :class:`PingServer`, in seconds.

    The shortest one is the link's; what others took longer was waiting for a busy processor.

    Raises:
        DeadlineError: there was no answer.
    """
    shortest = float("inf")
    try:
        with socket.create_connection((hostname, port), timeout=deadline_s) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(samples):
                start_s = time.perf_counter()
                connection.sendall(b"p")
                if not connection.recv(1):
                    raise ConnectionError("closed")
                shortest = min(shortest, time.perf_counter() - start_s)
    except OSError as e:
        raise DeadlineError(f"no answer to a ping from {hostname}:{port}: {e}") from None
    return shortest
