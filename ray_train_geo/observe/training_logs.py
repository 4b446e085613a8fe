"""Logs of training runs: iteration times, what the job was, how the run ended (level 0).

    Megatron-LM          iteration  20/1000 | ... elapsed time per iteration (ms): 1354.9 | ...
    DeepSpeed pipelines  steps: 20 loss: 5.55 iter time (s): 0.936 samples/sec: 136.7
    DeepSpeed's timer    [timer.py:215:stop] 0/20, RunningAvgSamplesPerSec=9.8, CurrSamplesPer...
    Hugging Face         {'train_runtime': 871.8, 'train_samples_per_second': 1.147, ...}
    ray_train_geo        metrics.jsonl, or the run directory that it is in

Where several of these write into one log, the first of them is read: it tells most.  Where one
file holds several runs (a job that was started again), the last one is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_train_geo.errors import InputError
from ray_train_geo.model.catalog import total_parameters
from ray_train_geo.observe.log_failures import Ending, EndingReader
from ray_train_geo.observe.log_settings import RunSettings, SettingsReader
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.spec import JobSpec, load_job

__all__ = ["Timing", "TrainingLog", "read_log"]

_NUMBER = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d{1,2})?)"
_MEGATRON = re.compile(
    rf"(?:elapsed time per iteration|\biteration\b.*?\btime) \((ms|s)\): *{_NUMBER}"
)
_MEGATRON_ITERATION = re.compile(r"\biteration +(\d+)")
_MEGATRON_BATCH = re.compile(r"\b\w+ batch size: *(\d+)")  # one fork prints "gloabl"
_PIPELINE = re.compile(rf"\bsteps?: *(\d+)\b.*?\biter time \(s\): *{_NUMBER}")
_TIMER = re.compile(
    r"(?:global_step=|\d/)(\d+), (?:RunningAvgSamplesPerSec=[^,]*, Curr)?SamplesPerSec=" + _NUMBER
)
_TRAINER = re.compile(rf"\btrain_samples_per_second'? *[:=] *{_NUMBER}")

_OURS = "ray_train_geo"
_NEW_RUN = re.compile(r"-{4,} arguments -{4,}")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_HEAD_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Timing:
    """One entry of a log: how long a step took, or how fast it was.

    Args:
        step_s: seconds of the step (the mean, where an entry covers several).
        samples_per_s: where the log has no seconds.
        global_batch: sequences of the step, where the entry has them.
        tokens: of the step, where the entry has them.
    """

    step_s: float | None = None
    samples_per_s: float | None = None
    global_batch: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """A log, as read; `run_speed` makes figures of it.

    Args:
        format: whose log it is; None where nothing was timed.
        timings: oldest first.
        ending: why the run went no further; None where the log just stops.
        notes: what is special about the file, in words.
    """

    path: Path
    format: str | None
    timings: tuple[Timing, ...]
    settings: RunSettings
    ending: Ending | None
    notes: tuple[str, ...] = ()


def read_log(path: Path) -> TrainingLog:
    """Read a log file, a ``metrics.jsonl``, or a run directory.

    Raises:
        InputError: it can't be read, is empty or binary, or is no log of a training run.
    """
    if path.is_dir():
        return _read_run(RunDirectory.open(path))
    if path.name == "metrics.jsonl" and (path.parent / "job.yaml").is_file():
        return _read_run(RunDirectory.open(path.parent))
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        if not head.strip():
            raise InputError(f"{path} is empty")
        if b"\0" in head:
            raise InputError(f"{path} is binary: give the log as text, unpacked")
        # Progress bars write over their line: universal newlines take each state as one.
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = (_COLOUR.sub("", line).rstrip() for line in file)
            log = _read_metrics(path, lines) if head.startswith(b'{"') else _read_text(path, lines)
    except OSError as e:
        raise InputError(f"can't read {path}: {(e.strerror or str(e)).lower()}") from None
    if log is None:
        raise InputError(
            f"{path} has no iteration times: it is no log of Megatron-LM, DeepSpeed or the "
            "Hugging Face Trainer, and no metrics.jsonl"
        )
    return log


@dataclass(slots=True)
class _Run:
    """What has been read so far of one run."""

    settings: SettingsReader = field(default_factory=SettingsReader)
    ending: EndingReader = field(default_factory=EndingReader)
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    _last: tuple[str, int] | None = None

    def line(self, text: str) -> None:
        entry = _entry(text)
        if entry is None:
            self.ending.line(text)
            self.settings.line(text)
            return
        format_, iteration, timing = entry
        self.ending.iteration()
        if (format_, iteration) != self._last:  # else another rank, or another copy, of the same
            self.timings.setdefault(format_, []).append(timing)
        self._last = format_, iteration


def _read_text(path: Path, lines: Iterable[str]) -> TrainingLog | None:
    run, runs = _Run(), 1
    for text in lines:
        if run.timings and _NEW_RUN.search(text):
            run, runs = _Run(), runs + 1
        run.line(text)
    settings, ending = run.settings.settings(), run.ending.ending
    if not run.timings and ending is None and settings == RunSettings():
        return None
    found = next((f for f in _FORMATS if f in run.timings), None)
    timings = tuple(run.timings.get(found or "", ()))
    notes = (f"the last of {runs} runs in this file",) if runs > 1 else ()
    return TrainingLog(path, found, timings, settings, ending, notes)


def _entry(text: str) -> tuple[str, int, Timing] | None:
    """Format, iteration and timing of a line, if it is one that times an iteration."""
    for format_, parse in _FORMATS.items():
        found = parse(text)
        # A zero is what clocks and integer milliseconds make of nothing.
        if found is not None and (found[1].step_s or found[1].samples_per_s):
            return format_, *found
    return None


def _megatron(text: str) -> tuple[int, Timing] | None:
    if "time" not in text or (time := _MEGATRON.search(text)) is None:
        return None
    seconds = float(time[2]) / (1000 if time[1] == "ms" else 1)
    iteration, batch = _MEGATRON_ITERATION.search(text), _MEGATRON_BATCH.search(text)
    timing = Timing(step_s=seconds, global_batch=int(batch[1]) if batch else None)
    return int(iteration[1]) if iteration else -1, timing


def _pipeline(text: str) -> tuple[int, Timing] | None:
    if "iter time" not in text or (found := _PIPELINE.search(text)) is None:
        return None
    return int(found[1]), Timing(step_s=float(found[2]))


def _timer(text: str) -> tuple[int, Timing] | None:
    if "SamplesPerSec" not in text or (found := _TIMER.search(text)) is None:
        return None
    return int(found[1]), Timing(samples_per_s=float(found[2]))


def _trainer(text: str) -> tuple[int, Timing] | None:
    """The whole run's mean; every rank prints it."""
    if "train_samples" not in text or (found := _TRAINER.search(text)) is None:
        return None
    return 0, Timing(samples_per_s=float(found[1]))


_FORMATS = {
    "megatron": _megatron,
    "deepspeed-pipeline": _pipeline,
    "deepspeed-timer": _timer,
    "huggingface-trainer": _trainer,
}


def _read_run(run: RunDirectory) -> TrainingLog:
    """A run of ours; its directory tells of the job, and how it ended."""
    settings, ending = RunSettings(), None
    if run.job_path.is_file():
        settings = _job_settings(load_job(run.job_path), run.read_json("plan.json"))
    for event in run.events():  # the last session's count
        if event.get("event") == "start":
            ending = None
        elif event.get("event") == "error":
            ending = Ending("failed", str(event.get("message")))
    return TrainingLog(run.path, _OURS, _step_timings(run.metrics()), settings, ending)


def _read_metrics(path: Path, lines: Iterable[str]) -> TrainingLog | None:
    """A ``metrics.jsonl`` away from its run directory."""
    timings = _step_timings(_records(lines))
    return TrainingLog(path, _OURS, timings, RunSettings(), None) if timings else None


def _step_timings(records: Iterable[dict[str, Any]]) -> tuple[Timing, ...]:
    return tuple(
        Timing(step_s=r["step_s"], tokens=r.get("tokens"))
        for r in records
        if isinstance(r.get("step_s"), float | int) and 0 < r["step_s"] < math.inf
    )


def _records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for text in lines:
        try:
            record = json.loads(text)
        except ValueError:
            continue  # torn by a kill, or not ours
        if isinstance(record, dict):
            yield record


def _job_settings(job: JobSpec, plan: Any) -> RunSettings:
    """Only a tokenizer's file tells some vocabularies: their models' sizes stay unknown."""
    vocabulary = 257 if job.data.tokenizer == "byte" else job.model.vocab_size
    known = job.model.name is not None or vocabulary is not None
    return RunSettings(
        size_b=total_parameters(job.dims(vocabulary or 0)) / 1e9 if known else None,
        seq_len=job.training.seq_len,
        global_batch=job.training.global_batch,
        gpus=sum(len(p["stages"]) for p in plan["pipelines"]) if plan else None,
        recompute=job.training.recompute,
    )
