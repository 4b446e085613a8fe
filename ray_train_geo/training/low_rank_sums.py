"""PowerSGD: the sum of the gradients of a matrix, as the product of two thin ones.

Vogels et al. (NeurIPS 2019), algorithm 1, as each holder ``i`` with its gradient and residual
``M_i`` (rows x columns) sees it::

    P_i = M_i Q          summed:  sent to one holder, which makes its columns orthonormal
    Q_i = M_i' P         summed:  by all-reduce
    sum of M_i  ~  P Q'          and the residual is M_i - P Q_i'

Both sums are linear in ``M_i``, so what is left out is the same as if one worker had everything.
``Q`` at the start of a step is drawn from the seed and turned towards AdamW's first moment, which
all holders have: the method has no state of its own but the residual.  Vectors (norms, biases) and
matrices that would not become smaller are summed as they are, along with ``P``.

``P`` and the summed ``Q`` have the same bits everywhere, and ``P Q'`` is made of them value by
value, in an order that no library chooses: so the sums have, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ray_train_geo.codecs.workspace import noise_key
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.residuals import Residuals
from ray_train_geo.transport.base import Pending, Transport

__all__ = ["LowRankSums"]

_PART = 2**18
"""Values of a product that are made at once."""


class _Matrix(NamedTuple):
    """A weight's place in its bucket; ``columns`` is 0 if it is summed as it is."""

    name: str
    first: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * max(self.columns, 1)


class LowRankSums:
    """See :class:`~ray_train_geo.training.gradient_sync.Sums`.

    Args:
        weights: by name.
        moments: AdamW's first, of the weight of a name.
        central: the lowest rank does what the holders would otherwise share.
        rank: of the product.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        buffers: Mapping[int, torch.Tensor],
        transports: Mapping[tuple[int, ...], Transport],
        weights: Mapping[str, torch.Tensor],
        moments: Callable[[str], torch.Tensor],
        central: bool,
        rank: int,
        seed: int,
        residuals: Residuals,
    ) -> None:
        self._buckets = buckets
        self._buffers = buffers
        self._transports = transports
        self._moments = moments
        self._central = central
        self._rank = rank
        self._seed = seed
        self._residuals = residuals
        self._matrices = {
            index: self._split(buckets[index], weights)
            for index in buffers
            if buckets[index].holders in transports
        }
        self._step, self._scale = 0, 1.0

    def _split(self, bucket: Bucket, weights: Mapping[str, torch.Tensor]) -> list[_Matrix]:
        found, first = [], 0
        for name in bucket.names:
            weight = weights[name]
            rows, columns = weight.shape[0], weight[0].numel() if weight.dim() > 1 else 0
            if self._rank * (rows + columns) >= weight.numel():
                rows, columns = weight.numel(), 0
            found.append(_Matrix(name, first, rows, columns))
            first += weight.numel()
        return found

    def begin(self, step: int, scale: float) -> None:
        self._step, self._scale = step, scale

    def rounds(self, index: int) -> Iterator[Pending]:
        transport = self._transports[self._buckets[index].holders]
        buffer, matrices = self._buffers[index], self._matrices[index]
        self._residuals.feed(index, buffer, self._scale)
        sizes = [m.rows * (self._rank if m.columns else 1) for m in matrices]
        flat = torch.empty(sum(sizes), device=buffer.device)
        pieces = flat.split(sizes)
        for m, piece in zip(matrices, pieces, strict=True):
            values = buffer[m.first : m.first + m.elements]
            if m.columns:
                torch.mm(values.view(m.rows, -1), self._start(m), out=piece.view(m.rows, -1))
            else:
                piece.copy_(values)
        shards = _whole_shards(sizes, transport.size, self._central)
        yield transport.reduce_scatter(flat, shards)

        begin = sum(shards[: transport.rank])
        end = begin + shards[transport.rank]
        for m, piece in zip(matrices, pieces, strict=True):
            if m.columns and begin <= piece.storage_offset() < end:
                left = piece.view(m.rows, -1)
                left.copy_(torch.linalg.qr(left).Q)
        yield transport.all_gather(flat, shards)

        leftover = self._residuals.leftover(index)
        right = torch.empty(sum(m.columns * self._rank for m in matrices), device=buffer.device)
        rights = right.split([m.columns * self._rank for m in matrices])
        for m, piece, q in zip(matrices, pieces, rights, strict=True):
            place = slice(m.first, m.first + m.elements)
            if not m.columns:
                buffer[place].copy_(piece)
                leftover[place].zero_()
                continue
            matrix, left = buffer[place].view(m.rows, -1), piece.view(m.rows, -1)
            mine = q.view(m.columns, -1)
            torch.mm(matrix.t(), left, out=mine)
            torch.addmm(matrix, left, mine.t(), alpha=-1, out=leftover[place].view(m.rows, -1))
        self._residuals.settle(index, self._scale)
        yield transport.all_reduce(right)

        for m, piece, q in zip(matrices, pieces, rights, strict=True):
            if m.columns:
                matrix = buffer[m.first : m.first + m.elements].view(m.rows, -1)
                _product(piece.view(m.rows, -1), q.view(m.columns, -1), matrix)

    def _start(self, m: _Matrix) -> torch.Tensor:
        """``Q`` at the start of the step: ``[columns, rank]``."""
        generator = torch.Generator().manual_seed(noise_key(self._seed, self._step, m.name) >> 1)
        moment = self._moments(m.name).view(m.rows, -1)
        drawn = torch.randn(m.columns, self._rank, generator=generator).to(moment.device)
        turned = moment.t() @ (moment @ drawn)
        norm = turned.norm(dim=0, keepdim=True)
        return drawn + turned * torch.where(norm > 0, drawn.norm(dim=0) / norm, 0.0)


def _whole_shards(sizes: Sequence[int], ranks: int, central: bool) -> list[int]:
    """Contiguous shards of whole pieces, about equal; or all for the first rank."""
    shards, total, before = [0] * ranks, sum(sizes), 0
    for size in sizes:
        middle = before + size / 2
        shards[0 if central else int(middle * ranks / total)] += size
        before += size
    return shards


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """``left @ right.T``, with the same bits on every device."""
    out.zero_()
    # A few rows at a time, which stay in the cache while the columns are added.
    rows = max(1, _PART // out.shape[1])
    for some, sums in zip(left.split(rows), out.split(rows), strict=True):
        for p, q in zip(some.t(), right.t(), strict=True):
            sums.add_(p.unsqueeze(1) * q)
