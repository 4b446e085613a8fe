"""Searching for a better plan in a process of its own, at a low priority.

In a thread the search would hold the interpreter's lock while heartbeats and reports wait for it.
The process has a time limit of its own, so it ends also when whoever started it was killed::

    coordinator ──pickled question──▶ python -m ray_train_geo.planning.background
                ◀──pickled answer───
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import GeoError, RunError
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.predict import predict_plan
from ray_train_geo.planning.problem import PlanOptions
from ray_train_geo.planning.replan import replan
from ray_train_geo.spec import JobSpec

__all__ = ["Answer", "Question", "answer", "main", "search_aside"]

_NICENESS = 10
"""A tenth of a processor that others want, all of one that is idle."""

_POLL_S = 0.1
_GRACE_S = 60.0
"""Beyond the budget: for the interpreter's start on a loaded machine."""


@dataclass(frozen=True, slots=True)
class Question:
    """Is there a better plan than the one in force?

    Args:
        topology: as it is now; has all devices of ``plan``.
        expected_s: until the next change.
        budget_s: that the search may take.
    """

    plan: Plan
    topology: Topology
    job: JobSpec
    vocab_size: int
    expected_s: float
    budget_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The best plan that was found; maybe the one in force itself.

    Args:
        step_s: what the plan in force is predicted to take on the topology as it is now.
        moving_s: for the layers of the found plan to be where they must be.
    """

    plan: Plan
    step_s: float
    moving_s: float


def answer(question: Question) -> Answer:
    """Search, here and now.

    Raises:
        PlanError: nothing fits any more.
    """
    q = question
    budget = Budget(q.budget_s)
    options = PlanOptions()
    found = replan(
        q.plan,
        q.topology,
        q.job,
        q.vocab_size,
        options,
        budget,
        expected_s=q.expected_s,
        moves=options.moves_for(len(q.topology.devices)),
    )
    in_force = predict_plan(q.plan, q.topology, q.job, q.vocab_size).step_s
    return Answer(found.plan, in_force, found.transition.seconds)


def search_aside(question: Question, given_up: Callable[[], bool]) -> Answer | None:
    """:func:`answer`, from another process.

    Args:
        given_up: asked all the while; once it is so, the process is ended.

    Returns:
        None where nothing fits, or it was given up.

    Raises:
        RunError: the process failed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    over, limit = threading.Event(), Budget(question.budget_s + _GRACE_S)

    def watch() -> None:
        while not over.wait(_POLL_S):
            if given_up() or limit.spent():
                process.kill()
                return

    watching = threading.Thread(target=watch, name="search-aside", daemon=True)
    watching.start()
    try:
        out, err = process.communicate(pickle.dumps(question))
    finally:
        over.set()
        watching.join()
    if process.returncode < 0:
        return None
    if process.returncode:
        raise RunError(f"the search for a better plan failed: {err.decode().strip()[-500:]}")
    found: Answer | None = pickle.loads(out)
    return found


def main() -> None:
    """The process: reads a question, writes an answer."""
    os.nice(_NICENESS)
    question: Question = pickle.load(sys.stdin.buffer)
    try:
        found: Answer | None = answer(question)
    except GeoError:
        found = None
    sys.stdout.buffer.write(pickle.dumps(found))


if __name__ == "__main__":
    # By its name: what is pickled here must be known by the same name elsewhere.
    from ray_train_geo.planning import background

    background.main()
