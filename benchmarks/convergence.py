"""Final validation loss with each codec and sync mode, beside the exact run's, at equal tokens.

Each variant trains the quickstart's small GPT on the quickstart's text (less the last twentieth,
which is what it is validated on), in batches of a quarter of the size: two pipelines of two stages,
as local processes without Ray.
Which codecs and modes there are is read from the job spec's types.

    python benchmarks/convergence.py [--steps 1000] [--seeds 1] [--only int4] [--json]

The settings that ``benchmarks/worldwide.py`` times are among them, as ``worldwide: NAME``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from worldwide import BEST, DELAYED, MERGED

from ray_train_geo.cluster.topology import Device, Topology
from ray_train_geo.data.dataset import open_dataset
from ray_train_geo.errors import GeoError, SpecError
from ray_train_geo.model.stage import build_stage, next_token_loss
from ray_train_geo.planning.planner import plan
from ray_train_geo.spec import CodecSpec, JobSpec, LocalSGDSpec, ParallelismSpec, load_job
from ray_train_geo.spec_base import Section
from ray_train_geo.training.checkpoint import CheckpointStore, read_manifest, read_tensors
from ray_train_geo.training.local import run_local

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.yaml"
VOCAB = 257
HELD_OUT = 0.05
VALIDATED_SAMPLES = 512
INNER_STEPS = 20
LR = 1e-3
PIPELINES = 2


ISLANDS_LR = [f"training.lr={LR * PIPELINES**0.5}", f"training.min_lr={LR / 10 * PIPELINES**0.5}"]
"""Of islands that merge every other step.  AdamW's steps are as long with half a batch's noise, so
where noise prevails the mean of ``n`` islands' steps goes ``sqrt(n)`` times less far."""


@dataclass(frozen=True)
class Row:
    """What a variant came to.

    Args:
        loss: on the held-out text, in nats a token; a mean over seeds, as all of these.
        ratio: to the exact run's with the same seed.
        spread: of the ratio, from the least to the largest of all seeds.
        step_s: median; this machine's, with no slow link: it says what the variant computes more.
    """

    variant: str
    loss: float
    ratio: float
    spread: float
    step_s: float


def choices(section: type[Section], field: str) -> list[str]:
    """What a field can be, but for its default and ``auto``."""
    info = section.model_fields[field]
    kinds = typing.get_args(info.annotation)
    return [kind for kind in kinds if isinstance(kind, str) and kind not in ("auto", info.default)]


def variants() -> Iterator[tuple[str, list[str]]]:
    """Name and overrides of the quickstart's job, the exact run first."""
    yield "exact", []
    for name, settings in (("best", BEST), ("best, delayed", DELAYED), ("local SGD", MERGED)):
        sets = [f"{s}.{f}={v}" for s, fields in settings.items() for f, v in fields.items()]
        yield f"worldwide: {name}", sets + ISLANDS_LR * ("local_sgd" in settings)
    yield "gradients delayed", ["parallelism.delay_steps=1"]
    for mode in choices(ParallelismSpec, "gradient_sync"):
        yield f"gradient sync {mode}", [f"parallelism.gradient_sync={mode}"]
    for field in CodecSpec.model_fields:
        for codec in choices(CodecSpec, field):
            yield f"{field} {codec}", [f"codecs.{field}={codec}"]
            if field == "activations" and codec == "int4":
                yield (
                    "activations int4, rotated",
                    ["codecs.activations=int4", "codecs.rotation=true"],
                )
    diloco = [f"local_sgd.inner_steps={INNER_STEPS}"]
    streaming = [*diloco, "local_sgd.fragments=4", "local_sgd.delay_steps=2"]
    for codec in ("none", *choices(LocalSGDSpec, "codec")):
        yield f"DiLoCo, {codec}", [*diloco, f"local_sgd.codec={codec}"]
        yield f"Streaming DiLoCo, {codec}", [*streaming, f"local_sgd.codec={codec}"]


def make_job(folder: Path, name: str, steps: int, overrides: list[str], seed: int = 1) -> JobSpec:
    return load_job(
        QUICKSTART,
        [
            f"data.path={folder / 'train.bin'}",
            f"training.steps={steps}",
            f"training.seed={seed}",
            f"training.lr_decay_steps={steps}",
            f"training.lr={LR}",
            f"training.min_lr={LR / 10}",
            "training.global_batch=16",
            "training.microbatch=2",
            "training.seq_len=64",
            "checkpoint.interval=0",
            f"run.name={''.join(c if c.isalnum() else '-' for c in name)}",
            f"run.storage_path={folder}",
            "run.trace_steps=0",
            *overrides,
        ],
    )


def split_text(folder: Path) -> None:
    """The quickstart's tokens, cut in two files."""
    job = load_job(QUICKSTART)
    tokens = open_dataset(job.data, job.training.seq_len).tokens
    cut = int(len(tokens) * (1 - HELD_OUT))
    np.asarray(tokens[:cut]).astype(np.uint16).tofile(folder / "train.bin")
    np.asarray(tokens[cut:]).astype(np.uint16).tofile(folder / "held-out.bin")


@torch.no_grad()
def validation_loss(job: JobSpec, folder: Path) -> float:
    """Of the job's last checkpoint, over evenly spread samples of the held-out text."""
    dims = job.dims(VOCAB)
    model = build_stage(dims, 0, dims.layers, seed=0).eval()
    where = CheckpointStore(str(job.run.directory / "checkpoints")).newest()
    assert where is not None
    weights = {f"model.{name}": p.data for name, p in model.named_parameters()}
    read_tensors(where, read_manifest(where), weights)
    spec = job.data.model_copy(update={"path": str(folder / "held-out.bin")})
    data = open_dataset(spec, job.training.seq_len)
    chosen = np.linspace(0, data.samples - 1, min(VALIDATED_SAMPLES, data.samples)).astype(int)
    total = 0.0
    for part in np.array_split(chosen, max(1, len(chosen) // 32)):
        inputs, targets = (torch.from_numpy(a) for a in data.batch(part))
        total += float(next_token_loss(model(inputs), targets))
    return total / (len(chosen) * job.training.seq_len)


def train(job: JobSpec, folder: Path) -> tuple[float, float]:
    """Validation loss, and the median step in seconds."""
    topology = Topology(tuple(Device(f"d{i}", f"n{i}") for i in range(4)))
    made = plan(topology, job, VOCAB)
    records = run_local(job, job.dims(VOCAB), made, deadline_s=600.0).records
    return validation_loss(job, folder), float(np.median([r.step_s for r in records]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    parser.add_argument("--only", action="append", help="variants whose names hold this; repeat")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows: list[Row] = []
    exact: list[float] = []
    with tempfile.TemporaryDirectory(prefix="convergence") as temporary:
        folder = Path(temporary)
        split_text(folder)
        for name, overrides in variants():
            if rows and args.only and not any(part in name for part in args.only):
                continue
            began = time.perf_counter()
            try:
                jobs = [
                    make_job(folder, f"{name} {seed}", args.steps, overrides, seed)
                    for seed in range(1, args.seeds + 1)
                ]
            except SpecError as e:
                print(f"{name}: {e}", file=sys.stderr)
                continue
            job = jobs[0]
            losses, steps_s = zip(*(train(job, folder) for job in jobs), strict=True)
            exact = exact or list(losses)
            ratios = [loss / alike for loss, alike in zip(losses, exact, strict=True)]
            loss, step_s = statistics.mean(losses), statistics.mean(steps_s)
            spread = max(ratios) - min(ratios)
            rows.append(Row(name, loss, statistics.mean(ratios), spread, step_s))
            if not args.json:
                if len(rows) == 1:
                    tokens = args.steps * job.training.tokens_per_step
                    print(f"{args.steps} steps, {tokens:,} tokens; loss on held-out text, nats\n")
                    print(
                        f"{'variant':32} {'loss':>8} {'vs exact':>9} {'spread':>7} "
                        f"{'step, ms':>9} {'took, s':>8}"
                    )
                print(
                    f"{name:32} {loss:8.4f} {rows[-1].ratio - 1:+9.2%} {spread:7.2%} "
                    f"{1000 * step_s:9.1f} "
                    f"{time.perf_counter() - began:8.1f}",
                    flush=True,
                )
    if args.json:
        print(
            json.dumps(
                {"steps": args.steps, "seeds": args.seeds, "rows": [asdict(row) for row in rows]}
            )
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GeoError as e:
        sys.exit(str(e))
