"""What the event engine cannot predict less than for a given plan: thousands of plans a second.

Whatever the order of messages, each stage computes all its microbatches, each hop and each NIC or
uplink carries all its messages, and a microbatch has a way to go before and after each.  So plans
can be compared by the engine without simulating those that can't be the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ray_train_geo.planning.pipeline_cost import hop_and_stage_times, message_sizes
from ray_train_geo.planning.plan import PipelinePlan
from ray_train_geo.planning.predict import after_backwards
from ray_train_geo.planning.problem import Problem
from ray_train_geo.planning.shared_flows import SharedFlows
from ray_train_geo.planning.warmup import StageTimes
from ray_train_geo.spec import GradientSyncName

__all__ = ["least_step_s"]


def least_step_s(
    problem: Problem, pipelines: Sequence[PipelinePlan], gradient_sync: GradientSyncName
) -> float:
    """No more than :func:`~ray_train_geo.planning.predict.predict` gives, in seconds.

    Under the schedule of the job; of 1f1b and gpipe under either.
    """
    index = problem.table.index
    chains = [[index[stage.device] for stage in p.stages] for p in pipelines]
    cuts = [(0, *(stage.layers[1] for stage in p.stages)) for p in pipelines]
    shared = _Shared(problem)
    ends, starts = [], []
    for p, chain, cut in zip(pipelines, chains, cuts, strict=True):
        codecs = [stage.codec for stage in p.stages[:-1]]
        times = hop_and_stage_times(problem, chain, cut, codecs, problem.schedules[0])
        shared.add(chain, message_sizes(problem, codecs), times, p.microbatches)
        ends.append(_ends_s(times, p.microbatches))
        starts.append([end - last for end, last in zip(ends[-1], times.last_s, strict=True)])
    if problem.job.parallelism.delay_steps:  # what is not hidden may shrink as backwards end later
        return max(max(map(max, ends)), shared.busy_s())
    _, step_s = after_backwards(problem, pipelines, starts, ends, gradient_sync)
    return max(step_s, shared.busy_s())


def _ends_s(times: StageTimes, microbatches: int) -> list[float]:
    """``[stages]``; before which a stage's last action does not end."""
    head, tail = times.head_s, times.tail_s
    # The last message over a hop has all others before it; down, and then the way to the stage.
    slowest_down = max((hop.transfer_s for hop in times.down), default=0.0)
    until_all = times.round_s + (microbatches - 1) * slowest_down
    ends = []
    for s in reversed(range(len(head))):
        busy = head[s] + microbatches * (times.forward_s[s] + times.backward_s[s])
        # A backward comes from below, so what holds for the end of all there holds here.
        if s < len(times.up):
            over_hop = times.round_s + (microbatches - 1) * times.up[s].transfer_s
            until_all = max(until_all, over_hop)
        until_all = max(until_all, busy + tail[s])
        end = until_all - tail[s]
        if times.weight_s is not None:
            end = max(end + times.weight_s[s], head[s] + microbatches * times.work_s[s])
        ends.append(end)
    return ends[::-1]


class _Shared:
    """What pipelines put on each NIC and uplink, and when that can begin and what must follow."""

    def __init__(self, problem: Problem) -> None:
        self._flows = SharedFlows(problem.table)
        self._bytes: dict[int, float] = {}
        self._before_s: dict[int, float] = {}
        self._after_s: dict[int, float] = {}

    def add(
        self, chain: Sequence[int], sizes: Sequence[float], times: StageTimes, microbatches: int
    ) -> None:
        for s, ((a, b), size) in enumerate(zip(pairwise(chain), sizes, strict=True)):
            below = s + 1
            sent_s = times.head_s[s] + times.forward_s[s]
            computed_s = times.forward_s[below] + times.backward_s[below]
            left_s = computed_s + times.tail_s[below]
            answered_s = times.head_s[below] + computed_s
            self._add(a, b, size * microbatches, sent_s, left_s)
            self._add(b, a, size * microbatches, answered_s, times.backward_s[s] + times.tail_s[s])

    def _add(self, a: int, b: int, carried: float, before_s: float, after_s: float) -> None:
        for r in self._flows.flow(a, b, carried).resources:
            self._bytes[r] = self._bytes.get(r, 0.0) + carried
            self._before_s[r] = min(self._before_s.get(r, before_s), before_s)
            self._after_s[r] = min(self._after_s.get(r, after_s), after_s)

    def busy_s(self) -> float:
        """The latest that any of them lets the last pipeline be done."""
        rates = self._flows.seconds_per_byte
        return max(
            (
                self._before_s[r] + carried * rates[r] + self._after_s[r]
                for r, carried in self._bytes.items()
            ),
            default=0.0,
        )
