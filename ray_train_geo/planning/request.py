"""Asking for a plan: by a job, or by a model on a named or described cluster.

What ``ray_train_geo.plan`` and ``ray-train-geo plan`` both do: make the job that is meant, refuse
what makes no sense before anything is searched, search, and measure how long that took.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ray_train_geo.cluster.scenarios import scenario as named_topology
from ray_train_geo.cluster.topology import Topology
from ray_train_geo.cluster.topology_file import load_topology
from ray_train_geo.errors import SpecError
from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.planning import planner
from ray_train_geo.planning.budget import Budget
from ray_train_geo.planning.codecs import CODECS
from ray_train_geo.planning.plan import Objective, Plan
from ray_train_geo.planning.problem import PlanOptions
from ray_train_geo.spec import (
    GradientSyncChoice,
    JobSpec,
    Precision,
    ScheduleChoice,
    load_job,
    parse_job,
)

__all__ = ["PlanRequest", "plan", "request"]

_BYTE_VOCAB = 257
"""Of the byte tokenizer: 256 byte values and the end of a document."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned, and how; it makes sense as far as can be told without planning.

    Args:
        vocab_size: in tokens; for models that don't name their own.
        budget_s: what the search may take, in seconds; None: until all moves are tried.
    """

    topology: Topology
    job: JobSpec
    vocab_size: int
    options: PlanOptions
    budget_s: float | None = None

    def plan(self) -> Plan:
        """Search.

        Raises:
            PlanError: no allowed plan fits the devices.
        """
        began = time.perf_counter()
        found = planner.plan(
            self.topology, self.job, self.vocab_size, self.options, Budget(self.budget_s)
        )
        return replace(found, search_s=time.perf_counter() - began)


def plan(
    job: JobSpec | str | Path | None = None,
    *,
    scenario: str | None = None,
    topology: Topology | str | Path | None = None,
    model: str | None = None,
    global_batch: int | None = None,
    seq_len: int | None = None,
    microbatch: int | None = None,
    precision: Precision | None = None,
    recompute: bool | None = None,
    stages: int | None = None,
    replicas: int | None = None,
    schedule: ScheduleChoice | None = None,
    gradient_sync: GradientSyncChoice | None = None,
    objective: Objective = "step-time",
    codecs: Sequence[str] | None = None,
    max_dollars_per_hour: float | None = None,
    moves: int | None = None,
    seed: int = 0,
    budget_s: float | None = None,
    vocab_size: int | None = None,
) -> Plan:
    """The best plan found: which layers run on which device, in which pipeline.

    ::

        plan(scenario="worldwide", model="gpt3-xl", global_batch=1024)
        plan("job.yaml", topology="cluster.yaml", objective="dollars")

    Either a ``job``, or a ``model`` with its ``global_batch``; on the devices either of a named
    ``scenario`` or of a ``topology``.  What is given beside a job takes the place of the job's.

    Args:
        job: a job spec, or its file.
        scenario: a name in ``ray_train_geo.cluster.scenarios.SCENARIOS``, or ``random-SEED``.
        topology: devices and links, or their file.
        model: a name in the catalog, such as ``gpt3-xl``.
        global_batch: sequences of one step, over all pipelines.
        seq_len: in tokens.  Default: the most that the model is made for.
        microbatch: sequences of one microbatch.  Default: 1.
        precision: of weights and activations.  Default: fp16.
        recompute: activations in the backward pass.  Default: true.
        stages: of each pipeline.  Default: searched.
        replicas: number of pipelines.  Default: searched.
        schedule: Default: 1f1b.
        gradient_sync: how pipelines sum gradients.  Default: the fastest.
        objective: what is minimised: seconds of a step, dollars per million tokens, or DT-FM's
            cost.
        codecs: those that a hop may use, of ``none``, ``bf16``, ``int8``, ``int4``.  Default: what
            the job allows.
        max_dollars_per_hour: of all used devices together.
        moves: changes that the local search tries.  Default: as the number of devices asks for.
        seed: of the local search; the same seed and moves give the same plan.
        budget_s: seconds after which the best plan so far is returned.  Default: no limit.
        vocab_size: the tokenizer's, in tokens.  Default: the model's, or the byte tokenizer's.

    Raises:
        SpecError: the request makes no sense: an unknown name, too much or too little said, a
            number out of range, a faulty job or topology.
        PlanError: no allowed plan fits the devices.
    """
    return request(
        job,
        scenario=scenario,
        topology=topology,
        model=model,
        global_batch=global_batch,
        seq_len=seq_len,
        microbatch=microbatch,
        precision=precision,
        recompute=recompute,
        stages=stages,
        replicas=replicas,
        schedule=schedule,
        gradient_sync=gradient_sync,
        objective=objective,
        codecs=codecs,
        max_dollars_per_hour=max_dollars_per_hour,
        moves=moves,
        seed=seed,
        budget_s=budget_s,
        vocab_size=vocab_size,
    ).plan()


def request(
    job: JobSpec | str | Path | None = None,
    *,
    scenario: str | None = None,
    topology: Topology | str | Path | None = None,
    model: str | None = None,
    objective: Objective = "step-time",
    codecs: Sequence[str] | None = None,
    max_dollars_per_hour: float | None = None,
    moves: int | None = None,
    seed: int = 0,
    budget_s: float | None = None,
    vocab_size: int | None = None,
    overrides: Sequence[str] = (),
    **fields: Any,
) -> PlanRequest:
    """Check what :func:`plan` takes, without planning.

    Args:
        overrides: ``section.field=value`` for the job, as ``--set`` on the command line.
        fields: those arguments of :func:`plan` that are fields of the job, None if not given.

    Raises:
        SpecError: as :func:`plan`.
    """
    _check_numbers(max_dollars_per_hour, moves, seed, budget_s, vocab_size)
    _check_names("objective", [objective], get_args(Objective))
    if codecs is not None:
        if isinstance(codecs, str) or not codecs:
            raise SpecError(f"codecs: give a list of {', '.join(CODECS)}; not {codecs!r}")
        _check_names("codec", codecs, CODECS)
    made = _job(job, model, overrides, fields)
    where = _topology(scenario, topology)
    _check_prices(where, objective, max_dollars_per_hour)
    options = PlanOptions(
        objective=objective,
        codecs=tuple(dict.fromkeys(codecs or ())),
        max_dollars_per_hour=max_dollars_per_hour,
        moves=moves,
        seed=seed,
    )
    return PlanRequest(where, made, _vocab(made, vocab_size), options, budget_s)


_FIELDS = {
    "global_batch": ("training", "global_batch"),
    "seq_len": ("training", "seq_len"),
    "microbatch": ("training", "microbatch"),
    "precision": ("training", "precision"),
    "recompute": ("training", "recompute"),
    "stages": ("parallelism", "stages"),
    "replicas": ("parallelism", "pipelines"),
    "schedule": ("parallelism", "schedule"),
    "gradient_sync": ("parallelism", "gradient_sync"),
}
"""Where in a job each argument of :func:`plan` belongs."""


def _job(
    job: JobSpec | str | Path | None,
    model: str | None,
    overrides: Sequence[str],
    fields: dict[str, Any],
) -> JobSpec:
    given = {_FIELDS[name]: value for name, value in fields.items() if value is not None}
    if job is not None and model is not None:
        raise SpecError(
            "a job and a model: the job names its model, so give one of the two (or override the "
            "job's, as in --set model.name=NAME)"
        )
    if isinstance(job, JobSpec):
        raw, source = job.model_dump(mode="json"), "job"
    elif job is not None:
        raw, source = load_job(job, overrides).model_dump(mode="json"), str(job)
    elif model is None:
        raise SpecError("nothing to plan: give a job, or a model and its global batch")
    else:
        raw, source = _raw_job(model), "plan"
        if ("training", "global_batch") not in given and not any(
            text.startswith("training.global_batch=") for text in overrides
        ):
            raise SpecError(f"model {model!r}: also give the global batch, in sequences of a step")
    for (section, field), value in given.items():
        raw[section][field] = value
    # Overrides of a file were applied when it was read; what is given here is stronger.
    return parse_job(raw, overrides if job is None or isinstance(job, JobSpec) else (), source)


def _raw_job(model: str) -> dict[str, Any]:
    """A job of ``model``; of its data and steps planning knows nothing."""
    dims = CATALOG.get(model)
    return {
        "model": {"name": model},
        "data": {"path": "python://stdlib"},
        "training": {
            "steps": 1,
            "global_batch": 1,
            "seq_len": dims.max_seq_len if dims else 1,
            "precision": "fp16",
            "recompute": True,
        },
        "parallelism": {},
    }


def _topology(scenario: str | None, topology: Topology | str | Path | None) -> Topology:
    if scenario is not None and topology is not None:
        raise SpecError("a scenario and a topology: both name the devices, so give one of the two")
    if scenario is not None:
        return named_topology(scenario)
    if topology is None:
        raise SpecError("no devices to plan for: give a scenario or a topology")
    return topology if isinstance(topology, Topology) else load_topology(topology)


def _vocab(job: JobSpec, vocab_size: int | None) -> int:
    if vocab_size is not None:
        return vocab_size
    open_vocab = job.model.name is None and job.model.vocab_size is None
    if open_vocab and job.data.tokenizer != "byte":
        raise SpecError(
            f"the model's vocabulary is that of {job.data.tokenizer}: give vocab_size, in tokens "
            "(or model.vocab_size in the job)"
        )
    return _BYTE_VOCAB


def _check_numbers(
    max_dollars_per_hour: float | None,
    moves: int | None,
    seed: int,
    budget_s: float | None,
    vocab_size: int | None,
) -> None:
    for name, value, unit in (
        ("max_dollars_per_hour", max_dollars_per_hour, "dollars"),
        ("budget_s", budget_s, "seconds"),
        ("vocab_size", vocab_size, "tokens"),
    ):
        if value is not None and not 0 < value < math.inf:
            raise SpecError(f"{name} is {value}: give {unit} above 0, or leave it out")
    for name, count in (("moves", moves), ("seed", seed)):
        if count is not None and count < 0:
            raise SpecError(f"{name} is {count}: give a whole number from 0 on")


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise SpecError(f"unknown {what} {name!r}{hint} (there are: {', '.join(names)})")


def _check_prices(
    topology: Topology, objective: Objective, max_dollars_per_hour: float | None
) -> None:
    if objective != "dollars" and max_dollars_per_hour is None:
        return
    wish = "objective 'dollars'" if objective == "dollars" else "max_dollars_per_hour"
    free = [d.id for d in topology.devices if not d.price_per_hour]
    if free:
        more = f" and {len(free) - 3} more" if len(free) > 3 else ""
        raise SpecError(
            f"{wish} needs a price for every device, but none is known for "
            f"{', '.join(free[:3])}{more}; give them price_per_hour"
        )
