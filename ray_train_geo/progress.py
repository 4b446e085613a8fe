"""Live progress of a run on a terminal (or as plain lines where there is none)."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

__all__ = ["ConsoleProgress"]

_LINE_EVERY_S = 2.0


class ConsoleProgress:
    """Shows step, loss, speed, and predicted beside measured step time."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._live: Live | None = None
        self._shown_s = 0.0
        self._last: dict[str, Any] | None = None
        self._printed_step = 0

    def __enter__(self) -> ConsoleProgress:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._last is not None and self._last["step"] != self._printed_step:
            self._print(self._last)

    def on_step(self, record: dict[str, Any]) -> None:
        self._last = record
        if self._live is not None:
            self._live.update(self._table(record))
        elif time.monotonic() - self._shown_s >= _LINE_EVERY_S:
            self._print(record)

    def _print(self, record: dict[str, Any]) -> None:
        self._shown_s, self._printed_step = time.monotonic(), record["step"]
        self._console.print(self._line(record), highlight=False, soft_wrap=True)

    def on_event(self, event: dict[str, Any]) -> None:
        text = _describe(event)
        if text:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _line(self, r: dict[str, Any]) -> str:
        bits = f"  {r['bits_per_byte']:.3f} bits/byte" if r.get("bits_per_byte") else ""
        skipped = "  skipped (overflow)" if r.get("skipped") else ""
        return (
            f"step {r['step']:>5}/{self._steps}  loss {r['loss']:.4f}{bits}  "
            f"{r['tokens_per_s']:,.0f} tokens/s  step {r['step_s']:.3f} s "
            f"(predicted {r['predicted_step_s']:.3f}){skipped}"
        )

    def _table(self, r: dict[str, Any]) -> Table:
        table = Table.grid(padding=(0, 3))
        columns = {
            "step": f"{r['step']}/{self._steps}",
            "loss": f"{r['loss']:.4f}",
            "bits/byte": f"{r['bits_per_byte']:.3f}" if r.get("bits_per_byte") else "-",
            "tokens/s": f"{r['tokens_per_s']:,.0f}",
            "step time": f"{r['step_s']:.3f} s",
            "predicted": f"{r['predicted_step_s']:.3f} s",
            "generation": str(r["generation"]),
        }
        table.add_row(*(f"[dim]{name}[/dim]" for name in columns))
        table.add_row(*columns.values())
        return table


def _describe(event: dict[str, Any]) -> str:
    match event["event"]:
        case "resume":
            return f"resuming after step {event['step']} from {event['path']}"
        case "plan":
            notes = "".join(f"\n  note: {note}" for note in event.get("notes", ()))
            return f"planned: {event['predicted_step_s']:.3f} s a step predicted{notes}"
        case "generation":
            workers = event["workers"]
            nodes = len({w["node_id"] for w in workers})
            return (
                f"generation {event['generation']}: {len(workers)} stage workers on {nodes} "
                f"node{'s' if nodes > 1 else ''}, {event['transport']}"
            )
        case "checkpoint":
            return (
                f"checkpoint of step {event['step']}: {event['bytes'] / 2**20:.1f} MiB in "
                f"{event['seconds']:.2f} s"
            )
        case "failure":
            return f"lost: {event['message']}"
        case "restore":
            lost = f"; {event['lost_steps']} steps are redone" if event["lost_steps"] else ""
            return f"going on after step {event['step']}, from {event['source']}{lost}"
        case "recovery" | "reshape":
            return f"training again {event['first_commit_s']:.1f} s later"
        case "straggler":
            change = _times(event["slower"])
            return f"device {event['device']} is {change} than it was, for good"
        case "link":
            rate = event["bytes_per_s"] * 8 / 1e6
            return (
                f"the link {event['source'][:8]} -> {event['target'][:8]} is "
                f"{_times(event['slower'])} than it was, for good: {rate:.3g} Mbit/s"
            )
        case "search" if event.get("better_step_s") is not None:
            verdict = "adopted" if event["adopted"] else "not adopted"
            return (
                f"a better plan, {event['better_step_s']:.3f} s a step instead of "
                f"{event['step_s']:.3f}, is {verdict}: {event['reason']}"
            )
        case "waiting":
            return f"waiting for devices: {event['message']}"
        case "stop":
            return f"stopping ({event['reason']}): one checkpoint, then the end"
    return ""


def _times(slower: float) -> str:
    return f"{slower:.1f} times slower" if slower > 1 else f"{1 / slower:.1f} times faster"
