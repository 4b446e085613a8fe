"""Heartbeats: who of many workers has stopped answering (a thread, and one socket a worker).

A worker whose process ends closes its socket, which shows at once.  One that is frozen or cut off
just stops answering: it is lost after a deadline that grows with its measured round trips.  Time
in which this process itself got no processor does not count, so that a loaded machine gives no
false alarm.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass

__all__ = ["Pulse"]

_INTERVAL_S = 0.25
_PATIENCE_S = 3.0
_ROUND_TRIPS = 4.0
_LONGEST_PATIENCE_S = 10.0
_CONNECT_S = 5.0
_AGAIN_S = 1.0
_FADING = 0.9


@dataclass(slots=True)
class _Watched:
    host: str
    port: int
    connection: socket.socket
    slowest_s: float = 0.0
    waiting: bool = False
    silent_s: float = 0.0
    quiet_s: float = 0.0

    def patience_s(self) -> float:
        return min(_LONGEST_PATIENCE_S, _PATIENCE_S + _ROUND_TRIPS * self.slowest_s)


class Pulse:
    """Watches :class:`~ray_train_geo.transport.ping.PingServer` s; safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._watched: dict[str, _Watched] = {}
        self._lost: dict[str, str] = {}
        self._silence: dict[str, float] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def watch(self, name: str, host: str, port: int) -> None:
        """Watch the worker that answers at ``host`` and ``port``."""
        try:
            connection = _connect(host, port, _CONNECT_S)
        except OSError as e:
            with self._lock:
                self._lost[name] = f"it can't be reached: {e}"
            return
        with self._lock:
            self._lost.pop(name, None)
            self._watched[name] = _Watched(host, port, connection)
            self._selector.register(connection, selectors.EVENT_READ, name)

    def forget(self, name: str) -> None:
        """``name`` is not to be watched any more."""
        with self._lock:
            self._drop(name)
            self._lost.pop(name, None)

    def lost(self) -> dict[str, str]:
        """Who is lost, and how that showed."""
        with self._lock:
            return dict(self._lost)

    def silence_s(self, name: str) -> float:
        """How long the worker ``name`` had been silent when it was found to be lost."""
        with self._lock:
            return self._silence.get(name, 0.0)

    def close(self) -> None:
        """End the thread and all connections."""
        self._closed.set()

    def _beat(self) -> None:
        last_s = time.monotonic()
        while not self._closed.is_set():
            ready = self._selector.select(_INTERVAL_S / 2)
            now_s = time.monotonic()
            # What this thread overslept, its workers may have, too.
            elapsed_s, last_s = min(now_s - last_s, 2 * _INTERVAL_S), now_s
            with self._lock:
                # An answer that is there counts, however late this thread looks.
                for key, _ in ready:
                    if key.data in self._watched:
                        self._hear(key.data)
                for name in list(self._watched):
                    self._tick(name, elapsed_s)
            if not ready:
                continue
            self._closed.wait(_INTERVAL_S / 10)
        with self._lock:
            for name in list(self._watched):
                self._drop(name)
            self._selector.close()

    def _hear(self, name: str) -> None:
        watched = self._watched[name]
        try:
            answer = watched.connection.recv(64)
        except OSError:
            answer = b""
        if not answer:
            self._reconnect(name)
            return
        watched.slowest_s = max(watched.silent_s, _FADING * watched.slowest_s)
        watched.waiting, watched.silent_s, watched.quiet_s = False, 0.0, 0.0

    def _tick(self, name: str, elapsed_s: float) -> None:
        watched = self._watched[name]
        if watched.waiting:
            watched.silent_s += elapsed_s
            if watched.silent_s > watched.patience_s():
                self._lose(name, f"it has not answered for {watched.silent_s:.1f} s")
            return
        watched.quiet_s += elapsed_s
        if watched.quiet_s >= _INTERVAL_S:
            watched.waiting = True
            try:
                watched.connection.send(b"p")
            except OSError:
                self._reconnect(name)

    def _reconnect(self, name: str) -> None:
        """The connection broke.  Is it the process that ended?"""
        watched = self._watched[name]
        self._drop(name)
        try:
            watched.connection = _connect(watched.host, watched.port, _AGAIN_S)
        except OSError:
            self._silence[name] = watched.silent_s
            self._lost[name] = "its process is gone"
            return
        watched.waiting = False
        self._watched[name] = watched
        self._selector.register(watched.connection, selectors.EVENT_READ, name)

    def _lose(self, name: str, why: str) -> None:
        self._silence[name] = self._watched[name].silent_s
        self._drop(name)
        self._lost[name] = why

    def _drop(self, name: str) -> None:
        watched = self._watched.pop(name, None)
        if watched is not None:
            self._selector.unregister(watched.connection)
            with contextlib.suppress(OSError):
                watched.connection.close()


def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)
    return connection
