"""Averaging pseudogradients over islands, on the wire while the islands go on.

Of each island the first holder of a layer talks to those of the others, and passes on what came::

    island 0   rank 0 ──┐ shards, encoded      ┌─▶ rank 0 ──▶ rank 1      encoded once more,
    island 1   rank 2 ──┼▶ each averages one, ─┼─▶ rank 2 ──▶ rank 3      so all decode the
    island 2   rank 4 ──┘ weighted by tokens   └─▶ rank 4                 same bytes

Everything is in host memory, and in a thread of its own; sums are fp32, in the islands' order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ray_train_geo.codecs.base import Codec
from ray_train_geo.codecs.make import make_codec
from ray_train_geo.codecs.workspace import Workspace, noise_key
from ray_train_geo.model.catalog import ModelDims
from ray_train_geo.planning.codecs import CodecName
from ray_train_geo.planning.islands import Island
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.sync_routes import even_shards
from ray_train_geo.training.buckets import depth, holders_of, packed
from ray_train_geo.training.rounds import fragment_of
from ray_train_geo.transport.base import Pending, Transport

__all__ = ["Learned", "OuterBucket", "OuterSync", "outer_buckets"]


@dataclass(frozen=True, slots=True)
class OuterBucket:
    """Pseudogradients that travel as one message.

    Args:
        holders: ranks that hold these weights, on all islands.
        names: weights in the order of the flat pseudogradient.
        sizes: their elements.
    """

    fragment: int
    holders: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Learned:
    """What an island has to say of one bucket.

    Args:
        pseudogradient: fp32, flat.
        tokens: fp64 ``[names]``; what it rests on.
        key: of the codec's rounding; names step and bucket.
    """

    bucket: OuterBucket
    pseudogradient: torch.Tensor
    tokens: torch.Tensor
    key: str


def outer_buckets(
    sizes: Mapping[str, int], plan: Plan, dims: ModelDims, fragments: int, bucket_bytes: int
) -> list[OuterBucket]:
    """A rank's weights (name -> elements), by fragment and holders, in one order for all ranks."""

    def key(name: str) -> tuple[int, tuple[int, ...]]:
        return fragment_of(name, dims, fragments), holders_of(name, plan, dims)

    names = sorted(sizes, key=lambda n: (fragment_of(n, dims, fragments), -depth(n, dims), n))
    return [
        OuterBucket(fragment, holders, run, tuple(sizes[n] for n in run))
        for (fragment, holders), run in packed(names, key, sizes, bucket_bytes)
    ]


class OuterSync:
    """One worker's part in it.

    Args:
        transports: by holders, the group of all holders of a bucket (those with more than one).
        codec: of what travels between islands, and inside of them.
        deadline_s: longest wait for one message.
    """

    def __init__(
        self,
        rank: int,
        among: Sequence[Island],
        transports: Mapping[tuple[int, ...], Transport],
        codec: CodecName,
        deadline_s: float,
    ) -> None:
        self._packing = _Packing(codec)
        self._rank = rank
        self._among = among
        self._transports = transports
        self._deadline_s = deadline_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outer-sync")

    def start(self, learned: Sequence[Learned]) -> Future[list[torch.Tensor]]:
        """Average some buckets: the means, fp32 and flat, the same bits on every holder.

        All holders start the same buckets in the same order.  The future raises a TransportError
        if an island is gone.
        """
        return self._thread.submit(self._average, learned)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _average(self, learned: Sequence[Learned]) -> list[torch.Tensor]:
        exchanges = [self._exchange(each) for each in learned]
        # Latencies hide behind one another: no bucket waits for an earlier one's way back.
        for exchange in exchanges:
            exchange.scatter()
        for exchange in exchanges:
            exchange.average()
        return [exchange.mean() for exchange in exchanges]

    def _exchange(self, learned: Learned) -> _Exchange:
        holders = learned.bucket.holders
        on_islands = [[r for r in holders if r in island.ranks] for island in self._among]
        speakers = [ranks[0] for ranks in on_islands if ranks]
        mates = next(ranks for ranks in on_islands if self._rank in ranks)
        transport = self._transports.get(holders) if len(speakers) > 1 else None
        return _Exchange(
            learned,
            transport,
            [holders.index(speaker) for speaker in speakers],
            [holders.index(mate) for mate in mates],
            self._packing,
            self._deadline_s,
        )


class _Exchange:
    """One bucket's messages.

    Args:
        transport: None: there is one island only, and nobody to talk to.
        speakers: each island's, by their ranks in the group.
        mates: holders on this island; the first one speaks.
    """

    def __init__(
        self,
        learned: Learned,
        transport: Transport | None,
        speakers: Sequence[int],
        mates: Sequence[int],
        packing: _Packing,
        deadline_s: float,
    ) -> None:
        self._packing = packing
        self._learned = learned
        self._transport = transport
        self._speakers = speakers
        self._mates = mates
        self._deadline_s = deadline_s
        elements = learned.pseudogradient.numel()
        self._shards = even_shards(elements, len(speakers))
        self._sent: list[Pending] = []
        self._coming: list[Pending] = []
        self._received: dict[int, torch.Tensor] = {}
        self._result: list[torch.Tensor] = []
        if transport is None:
            return
        self._me = transport.rank
        self._speaks = self._me == mates[0]
        self._result = [torch.empty(packing.wire_bytes(n), dtype=torch.uint8) for n in self._shards]
        if self._speaks:
            mine = self._shards[speakers.index(self._me)]
            size = learned.tokens.nbytes + packing.wire_bytes(mine)
            for peer in self._others():
                self._received[peer] = torch.empty(size, dtype=torch.uint8)
                self._coming.append(transport.recv(self._received[peer], peer))

    def _others(self) -> list[int]:
        """The other speakers, each starting behind itself: not all send to the first one first."""
        at = self._speakers.index(self._me)
        return [*self._speakers[at + 1 :], *self._speakers[:at]]

    def _send(self, wire: torch.Tensor, peer: int) -> None:
        assert self._transport is not None
        self._sent.append(self._transport.send(wire, peer))

    def _encode(self, values: torch.Tensor, reader: int) -> torch.Tensor:
        """For one speaker, or for all: then ``reader`` is oneself."""
        return self._packing.encode(values, f"{self._learned.key}/{self._me}/{reader}")

    def _wait(self, pending: list[Pending]) -> None:
        for each in pending:
            each.wait(self._deadline_s)
        pending.clear()

    def scatter(self) -> None:
        """Send every other speaker its shard of what this island has learned."""
        if self._transport is None or not self._speaks:
            return
        shards = self._learned.pseudogradient.split(self._shards)
        tokens = self._learned.tokens.view(torch.uint8)
        for peer in self._others():
            shard = shards[self._speakers.index(peer)]
            self._send(torch.cat([tokens, self._encode(shard, peer)]), peer)

    def average(self) -> None:
        """Average one's own shard, once all of it has come, and hand the mean around."""
        if self._transport is None or not self._speaks:
            return
        self._wait(self._coming)
        at = self._speakers.index(self._me)
        self._result[at] = self._encode(self._mean_of_own_shard(at), self._me)
        for peer in self._others():
            place = self._result[self._speakers.index(peer)]
            self._coming.append(self._transport.recv(place, peer))
        for peer in self._others():
            self._send(self._result[at], peer)

    def _mean_of_own_shard(self, at: int) -> torch.Tensor:
        """Weighted by tokens, in the islands' order: who arrived first does not matter."""
        own, header = self._learned, self._learned.tokens.nbytes
        tokens = torch.stack(
            [
                own.tokens if peer == self._me
                else self._received[peer][:header].view(torch.float64)
                for peer in self._speakers
            ]
        )  # fmt: skip
        shares = (tokens / tokens.sum(0).clamp_min(1.0)).float()
        first = sum(self._shards[:at])
        last = first + self._shards[at]
        sizes = torch.tensor(own.bucket.sizes)
        mean = torch.zeros(last - first)
        for share, peer in zip(shares, self._speakers, strict=True):
            if peer == self._me:
                part = own.pseudogradient[first:last]
            else:
                part = self._packing.decode(self._received[peer][header:], last - first)
            mean += part * share.repeat_interleave(sizes)[first:last]
        return mean

    def mean(self) -> torch.Tensor:
        """What all holders have agreed on, fp32 and flat."""
        if self._transport is None:
            return self._learned.pseudogradient
        if not self._speaks:
            for wire in self._result:
                self._coming.append(self._transport.recv(wire, self._mates[0]))
        self._wait(self._coming)
        if self._speaks:
            for mate in self._mates[1:]:
                for wire in self._result:
                    self._send(wire, mate)
        self._wait(self._sent)
        pairs = zip(self._result, self._shards, strict=True)
        return torch.cat([self._packing.decode(wire, elements) for wire, elements in pairs])


class _Packing:
    """Pseudogradients as bytes; for one thread."""

    def __init__(self, codec: CodecName) -> None:
        self._codec = codec
        self._workspace = Workspace(torch.device("cpu"))
        self._made: dict[int, Codec] = {}

    def wire_bytes(self, elements: int) -> int:
        return self._of(elements).wire_bytes if self._rounds(elements) else 4 * elements

    def encode(self, values: torch.Tensor, key: str) -> torch.Tensor:
        """uint8 ``[wire_bytes]``; without a codec the values' own memory."""
        if not self._rounds(values.numel()):
            return values.view(torch.uint8)
        codec = self._of(values.numel())
        wire = torch.empty(codec.wire_bytes, dtype=torch.uint8)
        codec.encode(values, wire, noise_key(key))
        return wire

    def decode(self, wire: torch.Tensor, elements: int) -> torch.Tensor:
        """fp32 ``[elements]``."""
        if not self._rounds(elements):
            return wire.view(torch.float32)
        values = torch.empty(elements)
        self._of(elements).decode(wire, values, key=0)  # these look at all values
        return values

    def _rounds(self, elements: int) -> bool:
        return self._codec != "none" and elements > 0

    def _of(self, elements: int) -> Codec:
        if elements not in self._made:
            self._made[elements] = make_codec(self._codec, elements, self._workspace)
        return self._made[elements]
