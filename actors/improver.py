"""Looks, while a run trains, for a better plan than the one in force.

    the plan was made in haste, for a failure, a join or a drain ─┐
    a device is persistently slower than it was ──────────────────┼─▶ search aside ─▶ does it pay?
    a link is persistently slower than it was ────────────────────┘                     │ yes
                                                     change at the next boundary of a step

In a thread of its own.  It asks the workers every second what they have measured all the
while; the search runs in another process.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable

from ray.exceptions import RayError

from ray_train_geo.actors.offers import Cause, Change, Offers, Situation
from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.actors.staffing import job_for
from ray_train_geo.errors import GeoError
from ray_train_geo.planning.background import Answer, Question, search_aside
from ray_train_geo.planning.corrections import Corrections
from ray_train_geo.planning.cost import backward_s, forward_s
from ray_train_geo.planning.policy import ChangeHistory, MovePolicy, Offer
from ray_train_geo.planning.slow_links import LinkChange, SlowLinkWatch
from ray_train_geo.planning.stragglers import Straggler, StragglerWatch
from ray_train_geo.training.gauge import carried_between
from ray_train_geo.training.mission import Mission

__all__ = ["Improver"]

_POLL_S = 0.5
_LOOK_S = 1.0
_SEARCH_S = 8.0
_SETTLE_S = 2.0
"""After a change training comes first: groups, caches and connections are cold."""

_AGAIN_S = 60.0
"""A better plan that does not pay now may do so in calmer times."""


class Improver:
    """Looks at what a run is at, and offers it better plans.

    Args:
        history: is told when devices have come or gone.
        corrections: of what was measured; others plan with them, too.
        corrected: called when they have changed.
        clock: in seconds, and never set.
    """

    def __init__(
        self,
        mission: Mission,
        recorder: Recorder,
        offers: Offers,
        history: ChangeHistory,
        corrections: Corrections,
        corrected: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mission = mission
        self._recorder = recorder
        self._offers = offers
        self._corrections = corrections
        self._corrected = corrected
        self._clock = clock
        self._policy = MovePolicy(clock(), history)
        self._generation = 0
        self._stragglers: StragglerWatch | None = None
        self._links = SlowLinkWatch()
        self._wanted: Cause | None = None
        self._search_from_s = 0.0
        self._look_from_s = 0.0
        self._again_s = _AGAIN_S
        self._thread = threading.Thread(target=self._keep, name="improver", daemon=True)

    def start(self) -> None:
        """Look all the while, until the offers are closed."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended; the offers are closed."""
        self._thread.join()

    def _keep(self) -> None:
        while not self._offers.closed.wait(_POLL_S):
            now = self._offers.situation()
            if now is None or now.waiting:
                continue
            try:
                self.attend(now)
            except (RayError, GeoError) as e:
                if not self._offers.closed.is_set():
                    self._recorder.event("improving", message=str(e).splitlines()[0])
            except Exception:
                self._recorder.traceback("improver", {}, traceback.format_exc())

    def attend(self, now: Situation) -> None:
        """One look, and a search if it is time for one.

        Raises:
            GeoError: the search failed.
        """
        if now.generation != self._generation:
            self._enter(now)
        now_s = self._clock()
        if now_s >= self._look_from_s:
            self._look_from_s = now_s + _LOOK_S
            self._look(now, now_s)
        if self._wanted is not None and now_s >= self._search_from_s:
            cause, self._wanted = self._wanted, None
            self._search(now, cause)

    def _enter(self, now: Situation) -> None:
        """Another plan is in force: what is usual begins anew."""
        self._generation = now.generation
        job, dims = self._mission.job, self._mission.dims
        devices = {d.id: d.at_precision(job.training.precision) for d in now.plan.devices}
        predicted_s = {
            s.device: sum(
                way(dims, job.training, s.layers, devices[s.device])
                for way in (forward_s, backward_s)
            )
            for p in now.plan.pipelines
            for s in p.stages
        }
        self._stragglers = StragglerWatch(now.plan, predicted_s, self._stragglers)
        self._links = SlowLinkWatch()
        self._wanted = None
        now_s = self._clock()
        self._look_from_s = now_s + _SETTLE_S
        if now.pause_s is not None:
            self._policy.paused(now.pause_s)
        if now.cause in ("failure", "join", "drain"):
            self._policy.history.happened(now_s)
            self._want("better plan", now_s + _SETTLE_S)
            self._again_s = _AGAIN_S

    def _want(self, cause: Cause, from_s: float) -> None:
        self._wanted, self._search_from_s = cause, from_s

    # ------------------------------------------------------------------ what has changed

    def _look(self, now: Situation, now_s: float) -> None:
        assert self._stragglers is not None
        seen = {
            device: observed
            for device, observed in now.crew.observed().items()
            if observed.generation == now.generation
        }
        infos = {device: now.crew.info(device) for device in seen}
        carried = carried_between(seen, {d: (i.node_id, i.address) for d, i in infos.items()})
        microbatch_s = {d: o.microbatch_s for d, o in seen.items() if o.microbatch_s is not None}
        self._corrections.confirm([*microbatch_s, *carried], now_s)
        for straggler in self._stragglers.add(now_s, microbatch_s):
            self._straggler(straggler, now, now_s)
        for link in self._links.add(now_s, carried):
            self._link(link, now, now_s)
        for key in self._corrections.expire(now_s):
            self._news("straggler" if isinstance(key, str) else "link", now_s)

    def _straggler(self, found: Straggler, now: Situation, now_s: float) -> None:
        if not self._corrections.straggler(found, now.topology, now_s):
            return
        known = self._corrections.apply(now.topology).device(found.device)
        self._recorder.event(
            "straggler",
            device=found.device,
            node=known.node,
            slower=found.ratio,
            microbatch_s=found.observed_s,
            predicted_s=found.predicted_s,
            flops_per_s=known.flops_per_s,
            generation=now.generation,
        )
        self._news("straggler", now_s)

    def _link(self, found: LinkChange, now: Situation, now_s: float) -> None:
        changed = self._corrections.link(found, now.topology, self._links.sound, now_s)
        if not changed:
            return
        self._recorder.event(
            "link",
            source=found.pair[0],
            target=found.pair[1],
            slower=found.ratio,
            bytes_per_s=found.bytes_per_s,
            node_pairs=len(changed),
            generation=now.generation,
        )
        self._news("link", now_s)

    def _news(self, cause: Cause, now_s: float) -> None:
        self._want(cause, now_s)
        self._corrected()

    # ------------------------------------------------------------------ a better plan

    def _search(self, now: Situation, cause: Cause) -> None:
        mission, devices = self._mission, now.topology.devices
        began_s = self._clock()
        question = Question(
            now.plan,
            self._corrections.apply(now.topology),
            job_for(mission.job, len(devices)),
            mission.vocab_size,
            self._policy.history.expected_s(devices, began_s),
            _SEARCH_S,
        )
        found = search_aside(question, lambda: self._is_over(now))
        if found is None or self._is_over(now):
            return
        if found.plan.pipelines == now.plan.pipelines:
            self._recorder.event(
                "search",
                cause=cause,
                seconds=self._clock() - began_s,
                adopted=False,
                reason="the plan in force stays the best",
                step_s=found.step_s,
            )
            return
        self._weigh(now, cause, found, self._clock() - began_s)

    def _is_over(self, then: Situation) -> bool:
        """Whether another plan is, or is about to be, in force."""
        now = self._offers.situation()
        return self._offers.closed.is_set() or now is None or now.generation != then.generation

    def _weigh(self, now: Situation, cause: Cause, found: Answer, seconds: float) -> None:
        better = found.plan
        now_s = self._clock()
        offer = Offer(better.pipelines, found.step_s, better.predicted_step_s, found.moving_s)
        verdict = self._policy.judge(offer, now.topology.devices, now_s)
        figures = {
            "step_s": found.step_s,
            "better_step_s": better.predicted_step_s,
            "gain_s": verdict.gain_s,
            "cost_s": verdict.cost_s,
            "moving_s": found.moving_s,
            "expected_s": verdict.expected_s,
        }
        self._recorder.event(
            "search",
            cause=cause,
            seconds=seconds,
            adopted=verdict.adopt,
            reason=verdict.reason,
            **figures,
        )
        if not verdict.adopt:
            self._want(cause, now_s + self._again_s)
            self._again_s *= 2
            return

        def change(by_now: Situation) -> Change | None:
            if by_now.generation != now.generation or by_now.waiting:
                return None
            return Change(cause, _sentence(cause, verdict.gain), now.plan, better, figures=figures)

        if self._offers.propose(change):
            self._policy.moved(now.plan.pipelines, verdict.cost_s, now_s)


def _sentence(cause: Cause, gain: float) -> str:
    whys = {"straggler": "a device is slower or faster", "link": "a link is slower or faster"}
    return f"{whys.get(cause, 'a better plan was found')}: {gain:.0%} less time a step"
