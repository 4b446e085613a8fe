"""The report: complete, self-contained, safe, and there for broken runs too."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import observe_example as example
import pytest

from ray_train_geo.errors import StorageError
from ray_train_geo.observe.report import write_report
from ray_train_geo.observe.run_directory import RunDirectory
from ray_train_geo.observe.trace import Span, chrome_trace, worker_name

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects tags and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] != ["style"]:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)

    def tile(self, label: str) -> str:
        found = re.search(rf"<span>{label}</span><b>([^<]*)</b><span>([^<]*)</span>", self.html)
        assert found is not None
        return " | ".join(found.groups())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "job")


def test_a_full_run(run: RunDirectory) -> None:
    example.fill(run)
    path = write_report(run)
    assert path == run.report_path
    page = Page(path)
    assert page.count("svg") == 5
    records = example.records()
    assert page.tile("Final loss") == f"{records[-1]['loss']:.4f} | first {records[0]['loss']:.4f}"
    assert page.tile("Bits per byte").startswith(f"{records[-1]['bits_per_byte']:.4f} | first 8.0")
    assert page.tile("Steps") == "300 | "
    assert page.tile("Tokens") == "2.46 M | "
    assert page.tile("Step time") == "428 ms | predicted 410 ms, measured +4%"
    assert page.tile("Wall time") == "2 min 25 s | "
    assert page.tile("Workers") == "2 | 1 pipeline"
    assert page.tile("Generations") == "2 | "
    assert page.tile("Checkpoints") == "2 | last at step 200"
    for said in ("finished", "generation 1: 2 workers", "10.0.0.3", "6-11", "bytes: 3 MiB",
                 "errors/rank-3.txt", "name: gpt3-small"):  # fmt: skip
        assert said in page.text


def test_what_users_and_errors_say_stays_text(run: RunDirectory) -> None:
    example.fill(run)
    evil = "</pre></svg><script>alert(1)</script><img src=x onerror=alert(1)>"
    run.append_event(evil, message=evil)
    run.append_event("error", message=evil, traceback=evil)
    run.append_event("generation", generation=2, workers=[{"rank": 0, "host": evil}])
    run.write_error("x", evil)
    run.write_text("job.yaml", evil)
    plan = example.plan().to_json()
    for device in plan["devices"]:
        device["region"] = device["type"] = evil
    run.write_json("plan.json", plan)
    page = Page(write_report(run))
    assert page.count("script") == page.count("img") == page.count("i") == 0
    assert page.text.count(evil) >= 7


def test_the_page_needs_no_network(run: RunDirectory) -> None:
    example.fill(run)
    page = Page(write_report(run))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", page.html)


def test_an_empty_run(run: RunDirectory) -> None:
    page = Page(write_report(run))
    for said in ("no step has been recorded", "There is no trace.json", "There is no plan.json",
                 "No worker has been recorded", "No event has been recorded"):  # fmt: skip
        assert said in page.text
    assert page.tile("Final loss") == "- | "
    assert page.tile("Steps") == "0 | "


def test_a_run_that_failed_before_its_first_step(run: RunDirectory) -> None:
    run.append_event("start")
    run.append_event("error", message="no devices", traceback="")
    page = Page(write_report(run))
    assert "failed" in page.text
    assert page.text.count("no devices") == 2


def test_records_with_holes(run: RunDirectory) -> None:
    run.append_metrics({"step": 0, "loss": float("nan"), "bits_per_byte": None, "skipped": True})
    run.append_metrics({"step": 1, "loss": 2.5, "bits_per_byte": None, "step_s": 0.5})
    page = Page(write_report(run))
    assert page.tile("Final loss") == "2.5000 | first 2.5000"
    assert page.tile("Bits per byte") == "- | "
    assert page.tile("Steps") == "2 | 1 skipped (overflow)"
    assert page.tile("Step time") == "500 ms | median"


@pytest.mark.parametrize(
    ("events", "status"),
    [
        (["start", "finish"], "finished"),
        (["start", "finish", "resume", "stop"], "stopped"),
        (["start", "error"], "failed"),
        (["start", "error", "generation"], "no end recorded"),
    ],
)
def test_status_is_how_the_last_session_ended(
    run: RunDirectory, events: list[str], status: str
) -> None:
    for event in events:
        run.append_event(event)
    assert re.search(rf'<span class="\w+">{status}', write_report(run).read_text())


@pytest.mark.parametrize("content", ["{", "[]", '{"traceEvents": [{"ph": "X", "cat": "send"}]}'])
def test_a_damaged_file_costs_its_picture_only(run: RunDirectory, content: str) -> None:
    example.fill(run)
    run.write_text("trace.json", content)
    run.write_text("plan.json", content)
    page = Page(write_report(run))
    assert page.count("svg") == 3
    notes = [line for line in page.html.splitlines() if 'class="note"' in line]
    assert len(notes) == 2
    assert "plan.json" in notes[1]


def test_size_stays_moderate(run: RunDirectory) -> None:
    """300 steps, 4 workers, 8 microbatches each."""

    def spans(step: int) -> list[Span]:
        t = example.T0 + step
        return [
            Span(category, f"{category} {m}", t + 0.1 * m + 0.02 * i, 0.015, step, m)
            for m in range(8)
            for i, category in enumerate(("forward", "backward", "send", "receive"))
        ]

    example.fill(run)
    workers: dict[int, Any] = {
        r: (worker_name(r, 0, r, (r, r + 1), "n"), [s for step in range(4) for s in spans(step)])
        for r in range(4)
    }
    run.write_json("trace.json", chrome_trace(workers), indent=None)
    assert write_report(run).stat().st_size < 300_000


def test_only_the_newest_of_very_many_events_are_shown(run: RunDirectory) -> None:
    run.events_path.write_text("".join(f'{{"event": "tick{i}"}}\n' for i in range(600)))
    page = Page(write_report(run))
    assert "The first 100 events are left out" in page.text
    assert "tick599" in page.text
    assert "tick99<" not in page.html


def test_an_unwritable_report_says_where(run: RunDirectory) -> None:
    run.report_path.mkdir()
    with pytest.raises(StorageError, match=r"can't write .*report\.html"):
        write_report(run)
