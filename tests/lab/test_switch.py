"""What the switch reads from packets, and writes into them."""

from __future__ import annotations

import struct

import pytest

from ray_train_geo.lab.switch import congested, size_on_wire

OFFLOAD = bytes(10)


def ip_header(size: int, tos: int = 0) -> bytes:
    source, target = bytes([10, 90, 0, 1]), bytes([10, 90, 0, 2])
    header = struct.pack("!BBHHHBBH", 0x45, tos, size, 7, 0, 64, 6, 0) + source + target
    return header[:10] + struct.pack("!H", ~total(header) & 0xFFFF) + header[12:]


def total(header: bytes) -> int:
    """The ones' complement sum of the header: all ones where the checksum is right."""
    found = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while found >> 16:
        found = (found & 0xFFFF) + (found >> 16)
    return found


def tcp(payload: int, options: int = 12) -> bytes:
    ports = struct.pack("!HH", 1234, 80)
    return ports + bytes(8) + bytes([(20 + options) // 4 << 4]) + bytes(7 + options + payload)


@pytest.mark.parametrize("tos", [1, 2, 0x29, 0xFE])
def test_congestion_is_marked_with_a_right_checksum(tos: int) -> None:
    for size in range(40, 1500):
        packet = OFFLOAD + ip_header(size, tos) + bytes(20)
        header = congested(packet)[10:30]
        assert header[1] == tos | 3
        assert total(header) == 0xFFFF
        assert congested(packet)[30:] == packet[30:]


@pytest.mark.parametrize("tos", [0, 3, 0xFC, 0xFF])
def test_only_who_understands_it_is_told(tos: int) -> None:
    packet = OFFLOAD + ip_header(100, tos) + bytes(80)
    assert congested(packet) == packet


def test_a_whole_packet_is_as_long_as_it_is() -> None:
    body = tcp(1000)
    packet = OFFLOAD + ip_header(20 + len(body)) + body
    size, count, flow = size_on_wire(packet)
    assert (size, count) == (20 + len(body), 1)
    assert flow == bytes([10, 90, 0, 1, 10, 90, 0, 2]) + struct.pack("!HH", 1234, 80)


def test_an_uncut_packet_has_its_headers_in_each_piece() -> None:
    body = tcp(10_000)
    offload = struct.pack("<BBHHHH", 1, 1, 52, 1448, 20, 16)
    packet = offload + ip_header(20 + len(body)) + body
    size, count, _ = size_on_wire(packet)
    assert count == 7
    assert size == 10_000 + 7 * 52
