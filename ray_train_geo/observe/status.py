"""How far a run is, read from its directory, while it goes on or after (level 0)."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ray_train_geo.observe.run_directory import RunDirectory

__all__ = ["run_status"]

_RECENT_STEPS = 20


def run_status(run: RunDirectory) -> dict[str, Any]:
    """The run's phase, step, speed and newest checkpoint, as plain JSON.

    ``phase`` is what the last events say; a run that was killed still reads ``training``, with a
    growing ``idle_s`` (seconds since its last record).
    """
    records, events = run.metrics(), run.events()
    kinds = {e["event"]: e for e in events}
    # Only what came after the newest start belongs to the present session.
    start = max((i for i, e in enumerate(events) if e["event"] == "start"), default=0)
    session = {e["event"]: e for e in events[start:]}
    if "finish" in session:
        phase = session["finish"]["phase"]
    elif "stop" in session:
        phase = "stopping"
    else:
        # A generation ends a wait, and a wait a generation.
        last_of = {"waiting": "waiting", "generation": "training"}
        phase = "starting"
        for event in events[start:]:
            phase = last_of.get(event["event"], phase)
    last = records[-1] if records else None
    recent = [r["tokens_per_s"] for r in records[-_RECENT_STEPS:]]
    latest = max([r["time"] for r in records[-1:]] + [e["time"] for e in events[-1:]], default=0.0)
    return {
        "path": str(run.path),
        "phase": phase,
        "step": last["step"] if last else 0,
        "steps": session.get("start", {}).get("steps"),
        "loss": last["loss"] if last else None,
        "bits_per_byte": last.get("bits_per_byte") if last else None,
        "tokens_per_s": statistics.median(recent) if recent else None,
        "predicted_step_s": last["predicted_step_s"] if last else None,
        "generation": kinds.get("generation", {}).get("generation"),
        "workers": len(kinds.get("generation", {}).get("workers", ())),
        "checkpoint": kinds.get("checkpoint", {}).get("path"),
        "error": session.get("error", {}).get("message"),
        "idle_s": time.time() - latest if latest else None,
    }
