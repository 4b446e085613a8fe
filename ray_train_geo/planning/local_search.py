"""Local search on real devices: moves that keep a plan a plan, and a threshold that shrinks.

A move is one of

- *swap* two devices, of one pipeline or of two, or with one that is not in use;
- *turn* a run of stages of one pipeline around;
- *cross* two pipelines: exchange what follows a stage (another pairing across stages);
- *hand over* a device: a pipeline gets one stage less, another one more (or one leaves, or joins);
- *dissolve* a pipeline, or *found* one from devices that are not in use;
- *leave* a region, or *fill* one with pipelines;

and afterwards layers and codecs are looked at one by one (:func:`polish`).  Threshold accepting
(Dueck & Scheuer, 1990): a little worse is taken, ever less so.  Half of the moves touch the
pipeline that the step waits for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from ray_train_geo.planning.constructions import Shape
from ray_train_geo.planning.evaluate import Candidate, Chain, Evaluation, Evaluator

__all__ = ["improve", "polish"]

_THRESHOLD = 0.02
"""How much worse a move may be at first, relative; it shrinks linearly to nothing."""

_POLISHED, _LEAST_POLISHED = 50_000, 50
"""Devices in all plans that boundaries are moved in: 780 of 64 devices; and so many at least."""

_CODEC_WORTH = 5e-4
"""A codec stays only where it makes the objective better by this much: it costs precision."""


def improve(
    evaluator: Evaluator,
    start: Evaluation,
    spare: Sequence[int],
    moves: int,
    seed: int,
    expired: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """The best plan that ``moves`` moves from ``start`` find; never a worse one.

    Args:
        spare: devices that may be used and are not in ``start``.
        expired: whether time is up; checked before every move.
    """
    search = _Search(evaluator, start, spare, random.Random(seed))
    for i in range(moves):
        if expired():
            break
        search.step(_THRESHOLD * (1 - i / moves))
    return search.best


class _Search:
    def __init__(
        self, evaluator: Evaluator, start: Evaluation, spare: Sequence[int], rng: random.Random
    ) -> None:
        self._evaluate = evaluator
        self._rng = rng
        self._shape = Shape.of(evaluator.problem)
        self._free = self._shape.stages is None and self._shape.cuts is None
        self._twin = evaluator.problem.twins
        self._chains = [list(p.devices) for p in start.pipelines]
        self._spare = list(spare)
        self._current = self.best = start
        self._modes = (start.gradient_sync,)

    def step(self, threshold: float) -> None:
        """Try one move; take it if it is not worse by more than ``threshold``."""
        chains, spare = [list(c) for c in self._chains], list(self._spare)
        if not self._move(chains, spare):
            return
        candidate: Candidate = tuple(
            Chain(tuple(c), self._shape.cut(i)) for i, c in enumerate(chains)
        )
        found = self._evaluate(candidate, self._modes)
        if found is None or found.value > self._current.value * (1 + threshold):
            return
        self._chains, self._spare, self._current = chains, spare, found
        if found.rank < self.best.rank:
            # Another mode may suit the new best better; all later moves are judged by it.
            self.best = self._evaluate(candidate) or found
            self._modes = (self.best.gradient_sync,)

    def _move(self, chains: list[list[int]], spare: list[int]) -> bool:
        rng, shape = self._rng, self._shape
        moves: list[Callable[[list[list[int]], list[int]], bool]] = [self._swap] * 6
        moves += [self._turn, self._cross, self._cross]
        if self._free:
            moves += [self._hand_over] * 2
            if shape.pipelines is None:
                moves += [self._dissolve_or_found, self._leave_or_fill_region]
        return rng.choice(moves)(chains, spare)

    def _pick(self, chains: Sequence[Sequence[int]]) -> int:
        if self._rng.random() < 0.5:
            firsts = accumulate((len(c) for c in self._chains[:-1]), initial=0)
            done_s = [float(self._current.synced_s[stage]) for stage in firsts]
            return done_s.index(max(done_s))
        return self._rng.randrange(len(chains))

    def _swap(self, chains: list[list[int]], spare: list[int]) -> bool:
        rng = self._rng
        a = chains[self._pick(chains)]
        i = rng.randrange(len(a))
        other = rng.randrange(len(chains) + bool(spare))
        b = spare if other == len(chains) else chains[other]
        j = rng.randrange(len(b))
        if self._twin[a[i]] == self._twin[b[j]]:
            return False
        a[i], b[j] = b[j], a[i]
        return True

    def _turn(self, chains: list[list[int]], spare: list[int]) -> bool:
        chain = chains[self._pick(chains)]
        if len(chain) < 2:
            return False
        i, j = sorted(self._rng.sample(range(len(chain)), 2))
        chain[i : j + 1] = reversed(chain[i : j + 1])
        return True

    def _cross(self, chains: list[list[int]], spare: list[int]) -> bool:
        if len(chains) < 2:
            return False
        p = self._pick(chains)
        q = self._rng.randrange(len(chains) - 1)
        a, b = chains[p], chains[q + (q >= p)]
        i = j = self._rng.randrange(1, len(a) + 1)
        if self._free:
            j = min(len(b), max(1, i + self._rng.randint(-1, 1)))
        elif len(a) != len(b):
            return False
        if (i, j) == (len(a), len(b)):
            return False
        a[i:], b[j:] = b[j:], a[i:]
        return True

    def _hand_over(self, chains: list[list[int]], spare: list[int]) -> bool:
        rng = self._rng
        a = chains[self._pick(chains)]
        options: list[list[int]] = [c for c in chains if c is not a]
        giver, taker = a, spare
        way = rng.randrange(4)
        if way == 0 and spare:
            giver, taker = spare, a
        elif way < 3 and options:
            other = rng.choice(options)
            giver, taker = (a, other) if rng.random() < 0.5 else (other, a)
        if giver is not spare and len(giver) < 2:
            return False
        device = giver.pop(rng.randrange(len(giver)))
        taker.insert(rng.randint(0, len(taker)), device)
        return True

    def _dissolve_or_found(self, chains: list[list[int]], spare: list[int]) -> bool:
        rng = self._rng
        depth = len(chains[rng.randrange(len(chains))])
        if len(spare) >= depth and rng.random() < 0.7:
            chains.append(spare[:depth])
            del spare[:depth]
            return True
        if len(chains) < 2:
            return False
        spare += chains.pop(rng.randrange(len(chains)))
        return True

    def _leave_or_fill_region(self, chains: list[list[int]], spare: list[int]) -> bool:
        """Dissolve all pipelines that touch a region, or found many of one depth in it."""
        rng, region = self._rng, self._evaluate.problem.table.region
        depth = len(chains[rng.randrange(len(chains))])
        if spare and rng.random() < 0.5:
            here = region[spare[rng.randrange(len(spare))]]
            inside = [d for d in spare if region[d] == here]
            founded = [inside[i : i + depth] for i in range(0, len(inside) - depth + 1, depth)]
            taken = {d for chain in founded for d in chain}
            chains += founded
            spare[:] = [d for d in spare if d not in taken]
            return bool(founded)
        chain = chains[self._pick(chains)]
        here = region[chain[rng.randrange(len(chain))]]
        touching = [c for c in chains if any(region[d] == here for d in c)]
        if len(touching) == len(chains):
            return False
        chains[:] = [c for c in chains if not any(region[d] == here for d in c)]
        spare += [d for c in touching for d in c]
        return True


def polish(
    evaluator: Evaluator, start: Evaluation, expired: Callable[[], bool] = lambda: False
) -> Evaluation:
    """Move boundaries by a layer, and drop codecs that gain nothing, while that helps.

    Pipelines that are cut (or compressed) alike change together: one alone rarely helps.
    """
    best = _drop_codecs(evaluator, _led_from_the_middle(evaluator, start))
    if Shape.of(evaluator.problem).cuts is not None:
        return best
    left = max(_LEAST_POLISHED, _POLISHED // len(best.synced_s))
    improved = True
    while improved:
        improved = False
        for cut, moved in _shifts(best):
            if left <= 0 or expired():
                return best
            left -= 1
            candidate = tuple(replace(c, cut=moved) if c.cut == cut else c for c in best.candidate)
            found = evaluator(candidate)
            if found is not None and found.rank < best.rank:
                best, improved = found, True
                break
    return best


def _led_from_the_middle(evaluator: Evaluator, start: Evaluation) -> Evaluation:
    """With another pipeline first: from its first stage all others are told of every commit."""
    problem = evaluator.problem
    if problem.job.parallelism.microbatches or Shape.of(problem).cuts is not None:
        return start  # what the job says of pipelines, it says in their order
    sites = problem.table.site.tolist()
    leaders = {sites[p.devices[0]]: i for i, p in reversed(list(enumerate(start.pipelines)))}
    best, candidate = start, start.candidate
    for i in sorted(leaders.values()):
        found = evaluator((candidate[i], *candidate[:i], *candidate[i + 1 :]))
        if found is not None and found.rank < best.rank:
            best = found
    return best


def _shifts(plan: Evaluation) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """``(cut, cut with one boundary moved by a layer)``, of those who are done last first."""
    firsts = accumulate((len(p.devices) for p in plan.pipelines[:-1]), initial=0)
    done_s: dict[tuple[int, ...], float] = {}
    for p, first in zip(plan.pipelines, firsts, strict=True):
        last_s = float(plan.synced_s[first : first + len(p.devices)].max())
        done_s[p.cut] = max(done_s.get(p.cut, 0.0), last_s)
    for cut in sorted(done_s, key=lambda c: (-done_s[c], c)):
        for boundary in range(1, len(cut) - 1):
            for by in (-1, 1):
                moved = (*cut[:boundary], cut[boundary] + by, *cut[boundary + 1 :])
                if moved[boundary - 1] < moved[boundary] < moved[boundary + 1]:
                    yield cut, moved


def _drop_codecs(evaluator: Evaluator, start: Evaluation) -> Evaluation:
    allowed = evaluator.problem.codecs
    if len(allowed) == 1:
        return start
    best = start
    gentlest = allowed[0] if "none" not in allowed else "none"
    for codecs in sorted({p.codecs for p in start.pipelines}):
        kept = codecs
        for hop in range(len(codecs)):
            if kept[hop] == gentlest:
                continue
            gentler = (*kept[:hop], gentlest, *kept[hop + 1 :])
            candidate = tuple(
                replace(c, codecs=gentler) if c.codecs == kept else c for c in best.candidate
            )
            found = evaluator(candidate)
            if found is not None and found.value <= best.value * (1 + _CODEC_WORTH):
                best, kept = found, gentler
    return best
