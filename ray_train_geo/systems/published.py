"""The public measurements that predictions are held against."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib import resources

__all__ = ["CASES", "MODELS", "Measured", "measured"]

CASES = {
    "case1": "datacenter",
    "case2": "datacenter-spot",
    "case3": "universities",
    "case4": "regional",
    "case5": "worldwide",
    "fluidstack2": "fluidstack-2",
    "fluidstack3": "fluidstack-3",
}
"""Scenarios by the data's names of cases."""

MODELS = {
    ("GPT3-XL", "24"): "gpt3-xl-24",
    ("GPT3-XL", "32"): "gpt3-xl-32",
    ("GPT3-XL", "40"): "gpt3-xl-40",
    ("GPT3-6.7B", "32"): "gpt3-6.7b",
    ("GPT3-13B", "40"): "gpt3-13b",
}
"""Catalog names by the data's names and layers."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One published figure, with all of its repetitions."""

    scenario: str
    system: str
    model: str
    layers: int
    global_batch: int
    seconds: tuple[float, ...]

    @property
    def mean_s(self) -> float:
        return sum(self.seconds) / len(self.seconds)


def measured(scenario: str | None = None) -> list[Measured]:
    """The public rows (of one scenario), as DT-FM's experiment notes have them."""
    return [row for row in _rows() if scenario in (None, row.scenario)]


@cache
def _rows() -> tuple[Measured, ...]:
    found: dict[tuple[str, str, str, int, int], list[float]] = defaultdict(list)
    path = resources.files("ray_train_geo.systems").joinpath("data", "dtfm_iteration_seconds.csv")
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = (
                CASES[row["case"]],
                row["system"],
                MODELS[row["model"], row["layers"]],
                int(row["layers"]),
                int(row["batch"]),
            )
            found[key].append(float(row["seconds"]))
    return tuple(Measured(*key, tuple(seconds)) for key, seconds in found.items())


@dataclass(frozen=True, slots=True)
class PipelineRow:
    """One figure of the single-pipeline document that was measured (no failure, no blank).

    Args:
        network: as the document names it.
        latency_s, bandwidth_bytes_per_s: of every link; 0 and infinity inside one instance.
    """

    system: str
    model: str
    devices: int
    replicas: int
    tensor: int
    stages: int
    global_batch: int
    microbatch: int
    precision: str
    recompute: bool
    network: str
    latency_s: float
    bandwidth_bytes_per_s: float
    mean_s: float


def pipeline_rows() -> list[PipelineRow]:
    """Those of GPT-3 XL over five networks, and of PyTorch Pipe and Megatron-LM on instances."""
    found = []
    path = resources.files("ray_train_geo.systems").joinpath("data", "gpt3_xl_pipeline.csv")
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] != "ok":
                continue
            named = bool(row["gbps"])
            found.append(
                PipelineRow(
                    row["system"],
                    MODELS["GPT3-XL", row["layers"]],
                    int(row["gpus"]),
                    int(row["dp"]),
                    int(row["tp"]),
                    int(row["pp"]),
                    int(row["batch"]),
                    int(row["micro_batch"]),
                    row["precision"].rstrip("?") or "fp32",
                    row["recompute"] != "0",
                    row["network"],
                    float(row["delay_ms"]) / 1e3 if named else 0.0,
                    float(row["gbps"]) * 1e9 / 8 if named else 0.0,
                    float(row["seconds"]),
                )
            )
    return found
