"""What no plan can beat: lower bounds on step time and on dollars per million tokens.

The question is asked the other way round.  In a step of ``T`` seconds, a pipeline of given devices
does at most so many microbatches; are there enough devices for pipelines that do all of them?  If
not, no plan steps in ``T``.  Bisection gives the largest such ``T``::

    T -> layers that a device can take, by microbatches and place     certify_time
      -> the cheapest chain of devices for each count of microbatches  certify_chains
      -> most microbatches of all pipelines together                   certify_packing

How much of ``T`` goes to summing gradients depends on where pipelines are, which depends on
their hops: `certify_sync` lists the cases, and the bound is the least of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ray_train_geo.errors import PlanError
from ray_train_geo.planning.certify_chains import DeviceClasses
from ray_train_geo.planning.certify_numbers import Numbers, least_over_all
from ray_train_geo.planning.certify_ranges import pipeline_ranges
from ray_train_geo.planning.certify_search import FOR_EVER_S, TOLERANCE, CaseSearch
from ray_train_geo.planning.certify_time import chains_in_time
from ray_train_geo.planning.cost import lower_bound_s
from ray_train_geo.planning.problem import Problem
from ray_train_geo.spec import GradientSyncName

__all__ = ["Bound", "dollars_bound", "step_time_bound"]

_TIMES = 1500
"""Step times that the bound on dollars looks at."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What no plan that the job allows can beat, and why.

    Args:
        value: seconds, or dollars per million tokens.
        argument: one sentence on what the bound rests on, and on what makes it weak.
    """

    value: float
    argument: str


def step_time_bound(
    problem: Problem,
    modes: Sequence[GradientSyncName],
    codecs: Sequence[str],
    expired: Callable[[], bool] = lambda: False,
    enough_s: float = np.inf,
) -> Bound:
    """The shortest step that any plan could have.

    Args:
        modes: of gradient sync, that a plan may use.
        codecs: that a hop may use.
        expired: whether time is up; then the bound is what is known so far, compute at least.
        enough_s: the step of a known plan: larger bounds are not looked for.

    Raises:
        PlanError: no chain of devices has memory for the model, or is allowed.
    """
    search = CaseSearch(problem, codecs, expired)
    if problem.job.local_sgd is not None:
        return Bound(
            search.compute_s,
            "all devices compute all the time; weak: local SGD's communication is not looked at",
        )
    ranges = [
        Numbers(search.compute_s, pipelines, mode)
        for pipelines in reversed(pipeline_ranges(*search.pipelines()))
        for mode in modes
    ]
    best, complete = least_over_all(ranges, search.least_of, enough_s)
    if not np.isfinite(best):
        raise PlanError("no plan keeps the job's limits: allow more devices or dollars per hour")
    argument = search.argument(modes)
    if not complete:
        argument += "; weak because there was no time to look at all plans"
    return Bound(best * (1 - TOLERANCE), argument)


def dollars_bound(
    problem: Problem, modes: Sequence[GradientSyncName], codecs: Sequence[str]
) -> Bound:
    """The fewest dollars per million tokens that any plan could cost.

    All devices are paid for the whole step, so a plan costs at least the sum over pipelines of
    what each costs until it is done itself.  A microbatch is never cheaper than in a pipeline that
    does all of them, because what comes before the first and after the last counts once.

    Raises:
        PlanError: no chain of devices has memory for the model.
    """
    search = CaseSearch(problem, codecs)
    if problem.job.local_sgd is not None:
        alone = [
            lower_bound_s(problem.dims, problem.job.training, [d]) * d.price_per_hour
            for d in problem.topology.devices
        ]
        tokens = problem.job.training.tokens_per_step
        return Bound(
            min(alone) / 3600 / (tokens / 1e6) * (1 - TOLERANCE),
            "the device that computes the cheapest does all; weak: memory and communication are "
            "not looked at under local SGD",
        )
    training, classes = problem.job.training, DeviceClasses.of(problem, largest_node=0)
    classes = classes.merged([0] * len(classes.count))
    price = classes.price_per_hour
    most = search.most_microbatches()
    cheapest = np.inf
    low_s = most * search.layer_s
    for tail in {search.tail(mode, search.pipelines()) for mode in modes}:
        times = np.append(np.geomspace(low_s, search.slowest_s(tail), _TIMES), FOR_EVER_S)
        chains = chains_in_time(
            problem, classes, times, np.full(len(times), most), tail, lasting=True
        )
        # Between two of the times: the price of the later one, for as long as the earlier one.
        cheapest = min(cheapest, float((times[:-1] * chains.cheapest(price).cost[1:]).min()))
    tokens = most * training.microbatch * training.seq_len
    dollars = cheapest / 3600 / (tokens / 1e6)
    argument = (
        "the cheapest pipeline that does all microbatches by itself, with whole layers, memory, "
        "fill and drain; weak where the cheapest devices are too few for a pipeline or the job "
        "asks for several pipelines"
    )
    if not price.all():
        argument = "some devices are free, so that the bound is weak: " + argument
    return Bound(dollars * (1 - TOLERANCE), argument)
