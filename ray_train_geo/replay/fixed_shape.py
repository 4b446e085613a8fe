"""Plans of one fixed shape: as many pipelines as suit the devices, all equally deep.

What systems do that don't re-plan: the depth is chosen once, for the devices that are usually
there, and only the number of pipelines follows the fleet.  It is the largest that fits, or less
where slow links make less faster.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from ray_train_geo.errors import PlanError
from ray_train_geo.planning.cost import lower_bound_s
from ray_train_geo.planning.plan import Plan
from ray_train_geo.replay.plan_book import PlanBook

__all__ = ["FixedShape"]


class FixedShape:
    """Pipelines of the depth that is the fastest on usual devices, or that the job fixes.

    Args:
        usual: nodes.

    Raises:
        PlanError: no such depth fits them.
    """

    def __init__(self, book: PlanBook, usual: Collection[str]) -> None:
        self.book = book
        self._job = book.asked.job
        self.stages = 0
        best_s = math.inf
        for bound_s, depth in sorted(self._bounds(usual)):
            if bound_s >= best_s:
                break
            plan = self._fastest(usual, depth)
            if plan is not None and plan.predicted_step_s < best_s:
                best_s, self.stages = plan.predicted_step_s, depth
        if not self.stages:
            raise PlanError(
                f"no pipelines of equal depth fit the {len(book.devices(usual))} devices that are "
                "usually there; choose a smaller model or other GPUs, or leave out the policies of "
                "a fixed shape"
            )

    def plan(self, nodes: Collection[str]) -> Plan | None:
        """The fastest of this depth; None if not even one pipeline fits on ``nodes``."""
        return self._fastest(nodes, self.stages)

    def plan_of(self, pipelines: int, nodes: Collection[str]) -> Plan | None:
        """So many pipelines of this depth; None if they don't fit on ``nodes``."""
        return self.book.shaped(nodes, self.stages, pipelines)

    def _bounds(self, usual: Collection[str]) -> Iterator[tuple[float, int]]:
        """``(step_s, depth)``: no step of that depth on these devices is shorter."""
        training = self._job.training
        devices = self.book.topology(usual).at_precision(training.precision).devices
        fastest = sorted(devices, key=lambda d: -d.flops_per_s)
        for depth in self._depths():
            used = max(self._counts(len(devices), depth), default=0) * depth
            if used:
                yield lower_bound_s(self.book.dims, training, fastest[:used]), depth

    def _depths(self) -> Sequence[int]:
        boundaries = self._job.stage_boundaries()
        if self._job.parallelism.stages is not None:
            return [self._job.parallelism.stages]
        if boundaries is not None:
            return [len(boundaries[0]) - 1]
        return range(1, self.book.dims.layers + 1)

    def _counts(self, devices: int, stages: int) -> Sequence[int]:
        fixed, limit = self._job.fixed_pipelines(), self._job.scaling.max_devices
        most = min(devices, limit or devices) // stages
        if fixed is not None:
            return [fixed] if fixed <= most else []
        return range(min(most, self._job.training.total_microbatches), 0, -1)

    def _fastest(self, nodes: Collection[str], stages: int) -> Plan | None:
        """From the most pipelines down, as long as fewer are faster."""
        best: Plan | None = None
        for count in self._counts(len(self.book.devices(nodes)), stages):
            plan = self.book.shaped(nodes, stages, count)
            if plan is not None:
                if best is not None and plan.predicted_step_s >= best.predicted_step_s:
                    break
                best = plan
        return best
