"""Fit the constants of the published comparison on its public rows, and print what is left.

    .venv/bin/python benchmarks/fit_systems.py [--keep] [--write] [--leave-out case|batch]

Constants are fitted in groups, each on the systems that name it; a group's later ones see the
earlier ones' values.  Residuals are relative, in logarithms; every (case, system) counts the same.
``--leave-out`` fits again without each case (each batch size), from round figures, and predicts
what was left out.  A fit takes some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import yaml
from scipy.optimize import least_squares

from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.observe.metrics import step_pflop
from ray_train_geo.systems.constants import Constants, constants
from ray_train_geo.systems.networks import instances, single_pipeline_topology
from ray_train_geo.systems.published import Measured, PipelineRow, measured, pipeline_rows
from ray_train_geo.systems.simulate import simulate

FILE = Path(__file__).resolve().parents[1] / "ray_train_geo" / "systems" / "constants.yaml"
DTFM = ("dtfm_scheduled", "dtfm_random", "dtfm_random_fair", "dtfm_random_complete")
MEGATRON = (
    "megatron_p8",
    "megatron_p8_random",
    "megatron_p4t2",
    "megatron_p2t4",
    "megatron_t8",
)
WEIGHT = {"megatron_p4t2": 0.3, "megatron_p2t4": 0.3, "megatron_t8": 0.3}
"""Shapes of which single figures are known count less."""

_INERTIA = 1e-2
"""Of a constant, in parts of a residual: a change by a factor of e is worth 1 % of error."""

NOMINAL = {
    "hardware.v100_fp16_tflops": 50.0,
    "hardware.eight_process_nic_share": 1.0,
    "hardware.shaped_rate_factor": 1.0,
    "hardware.flow_gbps": 5.0,
    "hardware.collective_window_bytes": 16.6e6,
    "hardware.a40_fp16_tflops": 60.0,
    "hardware.nvlink_gbytes_per_s": 40.0,
    "megatron.compute_factor": 0.7,
    "megatron.transfer_factor": 1.0,
    "megatron.latency_factor": 1.0,
    "megatron.shared_nic_factor": 1.0,
    "deepspeed_pipeline.compute_factor": 0.7,
    "deepspeed_pipeline.transfer_factor": 1.0,
    "deepspeed_pipeline.shared_nic_factor": 1.0,
    "zero_3.compute_factor": 0.7,
    "zero_3.bandwidth_share": 1.0,
}
"""Where fits begin that must not have seen a row: data sheets, documents, round figures."""

_P3_16XLARGE = 25e9 / 8
"""Bytes per second of the instance's NIC."""

Row = Measured | PipelineRow


def predicted_s(row: Row, figures: Constants, known: dict[object, tuple[float, float]]) -> float:
    """A row's step time; steps are affine in the batch, so that two of them are enough."""
    if isinstance(row, PipelineRow):
        return _pipeline_s(row, figures)
    key = row.system, row.model, row.scenario
    if key not in known:
        # One round of DT-FM's, or one of ZeRO's microbatches, and twice as many.
        batch = {"fluidstack-3": 768}.get(row.scenario, 512)
        few, many = (
            simulate(
                row.system, row.model, n * batch, scenario=row.scenario, figures=figures
            ).step_s
            for n in (1, 2)
        )
        known[key] = (many - few) / batch, 2 * few - many
    per_sequence_s, rest_s = known[key]
    return per_sequence_s * row.global_batch + rest_s


def _pipeline_s(row: PipelineRow, figures: Constants) -> float:
    if row.bandwidth_bytes_per_s:
        cluster = single_pipeline_topology(
            row.devices, row.latency_s, row.bandwidth_bytes_per_s, figures
        )
    else:
        cluster = instances(row.devices, 8, _P3_16XLARGE)
    settings = {
        "stages": str(row.stages),
        "replicas": str(row.replicas),
        "microbatch": str(row.microbatch),
        "precision": row.precision,
    }
    if row.system == "megatron_lm":
        settings |= {"tensor": str(row.tensor), "recompute": "yes" if row.recompute else "no"}
    found = simulate(
        row.system,
        row.model,
        row.global_batch,
        topology=cluster,
        settings=settings,
        figures=figures,
    )
    return found.step_s


def fit(figures: Constants, names: Sequence[str], rows: Sequence[Row]) -> Constants:
    """The constants ``names`` (``section.field``) that suit ``rows`` best."""
    if not rows:
        return figures
    counts = Counter(_kind(row) for row in rows)
    weights = [math.sqrt(WEIGHT.get(row.system, 1.0) / counts[_kind(row)]) for row in rows]
    start = np.log([_get(figures, name) for name in names])

    def residuals(x: np.ndarray) -> list[float]:
        tried = _with(figures, names, np.exp(x).tolist())
        known: dict[object, tuple[float, float]] = {}
        found = [
            w * math.log(predicted_s(row, tried, known) / row.mean_s)
            for row, w in zip(rows, weights, strict=True)
        ]
        # What no row depends on stays where it is.
        return [*found, *(_INERTIA * (x - start))]

    found = least_squares(
        residuals, start, loss="soft_l1", f_scale=0.05, diff_step=[3e-3] * len(names), max_nfev=12
    )
    return _with(figures, names, np.exp(found.x).tolist())


HARDWARE = (
    "hardware.v100_fp16_tflops",
    "hardware.eight_process_nic_share",
    "hardware.shaped_rate_factor",
    "hardware.flow_gbps",
    "hardware.collective_window_bytes",
)


def of_cases(rows: Sequence[Row], systems: Sequence[str]) -> list[Measured]:
    """Rows of systems on DT-FM's five clusters."""
    return [
        row
        for row in rows
        if isinstance(row, Measured)
        and row.system in systems
        and not row.scenario.startswith("fluidstack")
    ]


def fit_all(rows: Sequence[Row], figures: Constants) -> Constants:
    """All groups, one after the other."""
    single = [row for row in rows if isinstance(row, PipelineRow)]
    stack = [
        row
        for row in rows
        if isinstance(row, Measured)
        and row.system in DTFM
        and row.scenario.startswith("fluidstack")
    ]
    instance = [row for row in single if row.system == "megatron_lm" and row.replicas == 1]
    megatron = [f"megatron.{f.name}" for f in fields(figures.megatron) if "fp32" not in f.name]
    deepspeed = [f"deepspeed_pipeline.{f.name}" for f in fields(figures.deepspeed_pipeline)]
    groups: list[tuple[Sequence[str], Sequence[Row]]] = [
        (HARDWARE, of_cases(rows, DTFM)),
        (("hardware.a40_fp16_tflops",), stack),
        ((*megatron, "hardware.nvlink_gbytes_per_s"), of_cases(rows, MEGATRON)),
        (deepspeed, of_cases(rows, ("deepspeed_pp",))),
        (("zero_3.compute_factor", "zero_3.bandwidth_share"), of_cases(rows, ("zero_s3",))),
        (("hardware.v100_fp32_tflops",), [r for r in single if r.system == "dtfm_gpipe"]),
        (("megatron.fp32_compute_factor",), instance),
        (("pytorch_pipe.compute_factor",), [r for r in single if r.system == "torch_pipe"]),
    ]
    for names, some in groups:
        figures = fit(figures, names, some)
    return figures


def simplest(rows: Sequence[Measured], others: Sequence[Measured]) -> list[float]:
    """Errors of one constant: all devices compute at the rate that suits ``others`` best."""

    def work(row: Measured) -> float:
        return step_pflop(dims=CATALOG[row.model], seq_len=2048, global_batch=row.global_batch)

    rate = math.exp(fmean(math.log(work(row) / row.mean_s) for row in others))
    return [abs(work(row) / rate / row.mean_s - 1) for row in rows]


def report(title: str, rows: Sequence[Row], figures: Constants) -> None:
    """Measured beside predicted, and errors by system and case."""
    known: dict[object, tuple[float, float]] = {}
    errors: dict[tuple[str, str], list[float]] = {}
    print(f"\n{title}")
    for row in rows:
        step_s = predicted_s(row, figures, known)
        error = step_s / row.mean_s - 1
        errors.setdefault(_kind(row), []).append(error)
        where = row.scenario if isinstance(row, Measured) else row.network
        print(
            f"  {row.system:22} {where:38} {row.model:11} {row.global_batch:5} "
            f"{row.mean_s:8.2f} s {step_s:8.2f} s {100 * error:+6.1f} %"
        )
    for (system, where), found in errors.items():
        print(
            f"  {system:22} {where:18} mean {100 * fmean(map(abs, found)):5.1f} %  "
            f"median {100 * median(map(abs, found)):5.1f} %"
        )
    both = [e for (s, w), f in errors.items() if s in DTFM[:2] and "fluid" not in w for e in f]
    known_s = {
        (row.system, row.scenario, row.model, row.global_batch): (
            predicted_s(row, figures, known),
            row.mean_s,
        )
        for row in rows
        if isinstance(row, Measured) and row.system in DTFM
    }
    ratios = []
    for (system, *where), (slow_s, measured_s) in known_s.items():
        best = known_s.get((DTFM[0], *where))
        if system != DTFM[0] and best:
            ratios.append(slow_s / best[0] / (measured_s / best[1]) - 1)
    if ratios:
        print(
            f"  random / scheduled: median error {100 * median(map(abs, ratios)):.1f} %, "
            f"largest {100 * max(map(abs, ratios)):.1f} %"
        )
    if both:
        print(
            f"  DT-FM, five cases: mean {100 * fmean(map(abs, both)):.1f} %, "
            f"median {100 * median(map(abs, both)):.1f} %"
        )


GROUPS = {
    "DT-FM": DTFM,
    "Megatron P8": MEGATRON[:2],
    "DeepSpeed PP": ("deepspeed_pp",),
    "ZeRO-3": ("zero_s3",),
}


def leave_out(what: str, rows: Sequence[Row]) -> None:
    """Rows of every case (every batch size), predicted by what was fitted on the others."""

    def key(row: Measured) -> object:
        return row.scenario if what == "case" else row.global_batch

    published = [row for row in rows if isinstance(row, Measured)]
    total: dict[tuple[str, str], list[float]] = {}
    print(f"\nmean errors with one {what} left out: this model, and one rate for all")
    for left_out in dict.fromkeys(map(key, published)):
        others = [row for row in published if key(row) != left_out]
        start = _with(constants(), tuple(NOMINAL), tuple(NOMINAL.values()))
        fitted = fit_all([*others, *(r for r in rows if isinstance(r, PipelineRow))], start)
        known: dict[object, tuple[float, float]] = {}
        for group, systems in GROUPS.items():
            left = [r for r in published if key(r) == left_out and r.system in systems]
            if not left:
                continue
            errors = [abs(predicted_s(row, fitted, known) / row.mean_s - 1) for row in left]
            simple = simplest(left, [row for row in others if row.system in systems])
            print(
                f"  {left_out!s:16} {group:14} {100 * fmean(errors):5.1f} %  "
                f"{100 * fmean(simple):5.1f} %",
                flush=True,
            )
            for model, found in (("this model", errors), ("one rate", simple)):
                total.setdefault((group, model), []).extend(found)
    for (group, model), found in total.items():
        print(
            f"  {group:14} {model:12} mean {100 * fmean(found):5.1f} %, "
            f"median {100 * median(found):5.1f} %"
        )


def write(figures: Constants) -> None:
    """Put the values into the file; its comments and fixed figures stay."""
    text = FILE.read_text("utf-8")
    values = dataclasses.asdict(figures)
    lines, section = [], ""
    for line in text.splitlines():
        name = line.strip().partition(":")[0]
        if line and not line.startswith((" ", "#")):
            section = name
        elif section and name in values.get(section, {}):
            value = values[section][name]
            line = f"  {name}: {value if isinstance(value, int) else float(f'{value:.4g}')}"
        lines.append(line)
    FILE.write_text("\n".join(lines) + "\n", "utf-8")
    yaml.safe_load(FILE.read_text("utf-8"))


def _kind(row: Row) -> tuple[str, str]:
    return row.system, row.scenario if isinstance(row, Measured) else "pipeline"


def _get(figures: Constants, name: str) -> float:
    section, field = name.split(".")
    return float(getattr(getattr(figures, section), field))


def _with(figures: Constants, names: Sequence[str], values: Sequence[float]) -> Constants:
    for name, value in zip(names, values, strict=True):
        section, field = name.split(".")
        part = replace(getattr(figures, section), **{field: float(value)})
        figures = replace(figures, **{section: part})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the constants into the package")
    parser.add_argument("--leave-out", choices=["case", "batch"])
    parser.add_argument("--keep", action="store_true", help="the package's constants, not fitted")
    options = parser.parse_args()
    rows: list[Row] = [*measured(), *pipeline_rows()]
    began = time.perf_counter()
    figures = constants() if options.keep else fit_all(rows, constants())
    report("constants of the package" if options.keep else "fitted on all", rows, figures)
    for section in fields(figures):
        print(section.name, getattr(figures, section.name))
    if options.write:
        write(figures)
    if options.leave_out:
        leave_out(options.leave_out, rows)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
