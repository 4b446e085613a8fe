"""One node's measurement of the way to another: round trip, one flow, several flows, a cold one."""

from __future__ import annotations

from dataclasses import dataclass

from ray_train_geo.cluster.probing import Reading
from ray_train_geo.transport.bandwidth import BandwidthServer, carried
from ray_train_geo.transport.ping import PingServer, round_trip_s

__all__ = ["Station", "StationServer", "read", "reading_s"]

_ROUND_TRIPS = 20
"""A flow is given at least so many: slow start takes about ten to fill 1 Gbit/s over 200 ms."""


@dataclass(frozen=True, slots=True)
class Station:
    """Where a node answers pings and swallows what is sent to it."""

    address: str
    ping_port: int
    bandwidth_port: int


class StationServer:
    """Both servers of one node, until they are closed."""

    def __init__(self, hostname: str) -> None:
        self._ping = PingServer(hostname)
        self._bandwidth = BandwidthServer(hostname)
        self.station = Station(hostname, self._ping.port, self._bandwidth.port)

    def silence_s(self) -> float | None:
        """Seconds since somebody pinged; None if nobody ever did."""
        return self._ping.silence_s()

    def close(self) -> None:
        self._ping.close()
        self._bandwidth.close()


def read(target: Station, flows: int, seconds: float) -> Reading:
    """Measure the way from here to ``target``.

    Args:
        flows: how many TCP connections to use at once, after one alone; 1: no others.
        seconds: to send for, each time; longer where round trips are long.

    Raises:
        DeadlineError: it does not answer.
    """
    trip_s = round_trip_s(target.address, target.ping_port)
    sending_s = _sending_s(trip_s, seconds)
    one = carried(target.address, target.bandwidth_port, 1, sending_s)
    several = one
    if flows > 1:
        several = carried(target.address, target.bandwidth_port, flows, sending_s)
    return Reading(
        round_trip_s=trip_s,
        flow_bytes_per_s=one.warm_bytes_per_s,
        path_bytes_per_s=several.warm_bytes_per_s,
        cold_s=one.cold_s + trip_s / 2,
        cold_bytes=one.cold_bytes,
    )


def reading_s(round_trip_s: float, flows: int, seconds: float) -> float:
    """About what :func:`read` takes, in seconds: opening flows, sending, and asking for the end."""
    turns = 1 if flows == 1 else 2
    return turns * (_sending_s(round_trip_s, seconds) + 4 * round_trip_s)


def _sending_s(trip_s: float, seconds: float) -> float:
    return max(seconds, _ROUND_TRIPS * trip_s)
