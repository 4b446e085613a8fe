"""One system's step on one cluster, predicted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from ray_train_geo.cluster.scenarios import scenario as named
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.observe.metrics import dollars_per_million_tokens, step_pflop
from ray_train_geo.planning.link_table import LinkTable
from ray_train_geo.systems.case import Case
from ray_train_geo.systems.catalog import SYSTEMS
from ray_train_geo.systems.constants import Constants, constants
from ray_train_geo.systems.networks import as_run, peak_flops_per_s, sustained
from ray_train_geo.systems.settings import read
from ray_train_geo.systems.simulated import Simulated

__all__ = ["simulate"]


def simulate(
    system: str,
    model: str,
    global_batch: int,
    *,
    scenario: str | None = None,
    topology: Topology | None = None,
    settings: Mapping[str, str] | None = None,
    trace: bool = False,
    figures: Constants | None = None,
) -> Simulated:
    """Predict one step.

    Args:
        system: a name in ``SYSTEMS``.
        model: a name in the model catalog.
        global_batch: sequences of a step.
        scenario, topology: the cluster; one of the two.
        settings: what ``SYSTEMS[system].settings`` lists, as text.
        trace: keep the actions' times.
        figures: in the place of the fitted constants.

    Raises:
        SpecError: an unknown name, or a combination that cannot be; with the valid choices.
        PlanError: no plan fits the devices.
    """
    _check("system", system, SYSTEMS)
    _check("model", model, CATALOG)
    if global_batch < 1:
        raise SpecError(f"a global batch is at least 1 sequence, not {global_batch}")
    if (scenario is None) == (topology is None):
        raise SpecError("give either a scenario or a topology")
    values = read(system, SYSTEMS[system].options, settings or {})
    if figures is None:
        figures = constants()
    if scenario is not None:
        nominal, cluster = named(scenario), as_run(scenario, figures)
        for_collectives = as_run(scenario, figures, collectives=True)
    else:
        assert topology is not None
        nominal = topology
        cluster = topology.with_devices(sustained(d, figures.hardware) for d in topology.devices)
        for_collectives = cluster
    dims = CATALOG[model]
    case = Case(
        scenario or "",
        nominal,
        cluster,
        LinkTable.of(cluster),
        LinkTable.of(for_collectives),
        model,
        dims,
        global_batch,
        figures,
        values,
        trace,
    )
    outcome = SYSTEMS[system].run(case)
    step_s = sum(outcome.breakdown.values())
    pflop = step_pflop(
        dims=dims,
        seq_len=case.seq_len,
        global_batch=global_batch,
        recompute=values.flag("recompute"),
    )
    peak = peak_flops_per_s(cluster, case.precision)
    tokens_per_s = global_batch * case.seq_len / step_s
    price = sum(d.price_per_hour for d in cluster.devices)
    dollars = (
        dollars_per_million_tokens(dollars_per_hour=price, tokens_per_s=tokens_per_s)
        if price
        else 0.0
    )
    return Simulated(
        system=system,
        scenario=scenario or "",
        model=model,
        global_batch=global_batch,
        devices=len(cluster.devices),
        step_s=step_s,
        pflop=pflop,
        efficiency=pflop * 1e15 / step_s / peak if peak else 0.0,
        breakdown=outcome.breakdown,
        tokens_per_s=tokens_per_s,
        dollars_per_million_tokens=dollars,
        trace=outcome.trace,
        sync_s=outcome.sync_s,
        notes=outcome.notes,
    )


def _check(what: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SpecError(f"no {what} {name!r}: {hint}there are {', '.join(names)}")
