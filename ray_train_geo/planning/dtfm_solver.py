"""One CP-SAT run that takes the same path on any machine, and stops early at a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ortools.sat.python import cp_model

from ray_train_geo.planning.dtfm_classes import Group

__all__ = ["Result", "run"]

_ASK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Result:
    """What a model says of one piece of the problem.

    Args:
        lower_bound_s: no placement of the piece costs less (or none less than the known one).
        groups: the best placement that was found, if any.
        finished: whether nothing is left to find.
        effort: spent, in CP-SAT's deterministic seconds.
    """

    lower_bound_s: float
    groups: tuple[Group, ...] | None
    finished: bool
    effort: float


def run(
    model: cp_model.CpModel,
    effort: float,
    deadline: Callable[[], bool] | None,
    linearization: int = 1,
    prove: bool = False,
) -> tuple[cp_model.CpSolver, str]:
    """Solve ``model`` in ``effort`` deterministic seconds at most.

    Args:
        linearization: how much of the model enters the linear relaxation, from 0 to 2.
        prove: branch for the bound, and not for solutions.

    Returns:
        The solver, and the name of its status.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = linearization
    solver.parameters.optimize_with_lb_tree_search = prove
    solver.parameters.max_deterministic_time = effort
    with _stopping(solver, deadline):
        return solver, solver.status_name(solver.solve(model))


@contextmanager
def _stopping(solver: cp_model.CpSolver, deadline: Callable[[], bool] | None) -> Iterator[None]:
    """Ask ``deadline`` from a second thread while the solver runs, and stop it once it passed."""
    if deadline is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_ASK_EVERY_S):
            if deadline():
                solver.stop_search()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
