"""Spot traces: the shapes that are read, those of the package, and what is refused."""

from __future__ import annotations

import csv
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.cluster.traces import TRACES, SpotTrace, TraceEvent, load_trace
from ray_train_geo.errors import SpecError

OWN = """# a comment
time_s,op,node,region,gpu

0,add,a,ohio,V100-16G
0,add,b
600,notice,a
720.5,remove,a
"""
YAML = """
- {time_s: 0, op: add, node: a, region: ohio, gpu: V100-16G}
- {time_s: 0, op: add, node: b}
- {time_s: 600, op: notice, node: a}
- {time_s: 720.5, op: remove, node: a}
"""
EVENTS = (
    TraceEvent(0.0, "add", "a", "ohio", "V100-16G"),
    TraceEvent(0.0, "add", "b"),
    TraceEvent(600.0, "notice", "a"),
    TraceEvent(720.5, "remove", "a"),
)


def written(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def read(folder: Path, text: str, name: str = "trace.csv") -> SpotTrace:
    return load_trace(written(folder, text, name))


def up(trace: SpotTrace, time_s: float) -> int:
    """Nodes that are there at a moment."""
    ops = Counter(e.op for e in trace.events if e.time_s <= time_s)
    return ops["add"] - ops["remove"]


@pytest.mark.parametrize(("text", "name"), [(OWN, "mine.csv"), (YAML, "mine.yaml")])
def test_our_own_shape(tmp_path: Path, text: str, name: str) -> None:
    assert read(tmp_path, text, name) == SpotTrace("mine", EVENTS, 720.5)


def test_bamboos_events_are_in_milliseconds(tmp_path: Path) -> None:
    found = read(tmp_path, "0,add,n1\n1500,add,n2\n60000,remove,n1\n")
    assert [(e.time_s, e.op, e.node) for e in found.events] == [
        (0.0, "add", "n1"),
        (1.5, "add", "n2"),
        (60.0, "remove", "n1"),
    ]
    assert found.end_s == 60.0


def test_counts_become_nodes(tmp_path: Path) -> None:
    text = "2021-12-11, 11:00:00, 3\n2021-12-11, 11:01:00, 1\n2021-12-12, 11:00:00, 2\n"
    path = written(tmp_path, text + "2021-12-12, 12:00:00, 2\n", "gcp.txt")
    found = load_trace(path, seed=1)
    assert [(e.time_s, e.op) for e in found.events] == [
        *[(0.0, "add")] * 3,
        *[(60.0, "remove")] * 2,
        (86400.0, "add"),
    ]
    assert found.end_s == 90000.0, "the record goes on after the last change"
    assert load_trace(path, seed=1) == found
    assert len({load_trace(path, seed=s).events for s in range(9)}) > 1, "who goes is drawn by lot"


def test_the_aws_trace() -> None:
    found = load_trace("aws-p3")
    assert Counter(e.op for e in found.events) == {"add": 177, "remove": 167}
    assert found.end_s == pytest.approx(11.37 * 3600, rel=1e-3)
    assert max(up(found, e.time_s) for e in found.events) == 32


@pytest.mark.parametrize("seed", [0, 7])
def test_the_gcp_trace_keeps_to_its_counts(seed: int) -> None:
    found = load_trace("gcp-a100", seed)
    file = resources.files("ray_train_geo.cluster") / "data" / TRACES["gcp-a100"]
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    counts = [int(row[2]) for row in csv.reader(lines)]
    assert up(found, found.end_s) == counts[-1]
    assert {up(found, e.time_s) for e in found.events} == set(counts)
    assert found.end_s == pytest.approx(27.02 * 3600, rel=1e-3)


@pytest.mark.parametrize("name", TRACES.values())
def test_the_packed_files_say_where_they_are_from(name: str) -> None:
    text = (resources.files("ray_train_geo.cluster") / "data" / name).read_text()
    assert "# Source: Bamboo" in text
    assert "MIT" in text.splitlines()[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "trace.csv: the trace is empty; a trace is one of"),
        ("# only a comment\n", "the trace is empty"),
        ("time_s,op,node\n", "no events; add at least one node"),
        ("0,add,a\n5000,add,b\n4000,add,c\n", "line 3: time runs backwards, from 5 s to 4 s"),
        ("-1000,add,a\n", "line 1: the time is negative: -1 s"),
        ("0,add,a\n\n1,added,b\n", "line 3: unknown operation 'added'; there are add, remove"),
        ("0,add,a\n1,remove,b\n", "line 2: remove of b, which is not there"),
        ("0,add,a\n1,remove,a\n2,remove,a\n", "line 3: remove of a, which is not there"),
        ("0,add,a\n1,add,a\n", "line 2: a is added, but it is there already"),
        ("time_s,op,node\n0,notice,a\n", "line 2: notice of a, which is not there"),
        ("0,add,a\n1,add\n", "line 2: 2 columns, not 3"),
        ("0,add,a\nsoon,add,b\n", "line 2: 'soon' is no number of milliseconds"),
        ("0,add,\n", "line 1: it does not say node"),
        ("nan,add,a\n", "line 1: the time nan is no number"),
        ("time_s,op,name\n0,add,a\n", "line 1: unknown name; there are time_s, op, node"),
        ("time_s,op,op\n", "line 1: a column is named twice"),
        ("time_s,op,node\n0,add,a,ohio\n", "line 2: 4 columns, but the header has 3"),
        ("time_s,op,node\n0,add\n", "line 2: it does not say node"),
        (
            "time_s,op,node,region\n0,add,a,ohio\n1,remove,a,ohio\n",
            "line 3: region belong to the add, not to remove",
        ),
        ("one,two\n", "line 1: 'one,two' is of no known shape; a trace is one of"),
        ("2021-12-11, 11:00:00, 1\n2021-12-11, 10:00:00, 1\n", "line 2: time runs backwards"),
        ("2021-12-11, 11:00, 1\n", "line 1: '2021-12-11, 11:00' is no date and time"),
        ("2021-12-11, 11:00:00, -1\n", "line 1: '-1' is no number of nodes"),
        ("2021-12-11, 11:00:00, 1\n2021-12-11, 11:00:00\n", "line 2: 2 columns, not 3"),
        ("2021-12-11, 11:00:00, 0\n", "no node is ever up"),
    ],
)
def test_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SpecError) as refused:
        read(tmp_path, text)
    assert says in str(refused.value)
    assert "trace.csv: " in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the trace is empty"),
        ("a: [", "not valid YAML"),
        ("a: 1", "not a list of events"),
        ("- 3", "event 1: not a mapping"),
        (
            "- {time_s: 0, op: add, node: a}\n- {time_s: true, op: add, node: b}",
            "event 2: the time",
        ),
        ("- {time_s: 0, op: add, name: a}", "event 1: unknown name"),
    ],
)
def test_refused_yaml(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        read(tmp_path, text, "trace.yml")


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"can't read .*No such file.*aws-p3, gcp-a100"):
        load_trace(tmp_path / "nothing.csv")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\x80\xff\x00")
    with pytest.raises(SpecError, match="is not text"):
        load_trace(binary)


def test_cut_and_prolonged() -> None:
    trace = SpotTrace("t", EVENTS, 720.5)
    assert trace.until(600).events == EVENTS[:2]
    assert trace.until(600).end_s == 600
    assert trace.until(9000) == SpotTrace("t", EVENTS, 9000)


def test_notice_before_each_removal() -> None:
    events = (
        TraceEvent(0, "add", "a"),
        TraceEvent(0, "add", "b"),
        TraceEvent(100, "remove", "a"),
        TraceEvent(150, "add", "a"),
        TraceEvent(160, "remove", "a"),
        TraceEvent(200, "notice", "b"),
        TraceEvent(210, "remove", "b"),
    )
    found = SpotTrace("t", events, 300).with_notice(30)
    assert [(e.time_s, e.op, e.node) for e in found.events] == [
        (0, "add", "a"),
        (0, "add", "b"),
        (70, "notice", "a"),
        (100, "remove", "a"),
        (150, "add", "a"),
        (150, "notice", "a"),  # it comes too late for 30 s
        (160, "remove", "a"),
        (200, "notice", "b"),  # its own stays
        (210, "remove", "b"),
    ]


def test_the_same_but_faster() -> None:
    found = SpotTrace("t", EVENTS, 720.5).faster(10)
    assert [e.time_s for e in found.events] == [0, 0, 60, 72.05]
    assert found.end_s == 72.05
    assert found.events[0].region == "ohio"


def test_a_share_of_the_market() -> None:
    """Four nodes up at most, of which two places are followed: the second and the fourth."""
    names = "abcd"
    come = [TraceEvent(i, "add", n) for i, n in enumerate(names)]
    go = [TraceEvent(10 + i, "remove", n) for i, n in enumerate(names)]
    back = [TraceEvent(20, "add", "e"), TraceEvent(21, "add", "b"), TraceEvent(22, "notice", "b")]
    trace = SpotTrace("t", (*come, *go, *back), 30)
    found = trace.thinned(2)
    assert [(e.op, e.node) for e in found.events] == [
        *(("add", "b"), ("add", "d"), ("remove", "b"), ("remove", "d")),
        *(("add", "b"), ("notice", "b")),
    ]
    assert trace.thinned(4) == trace


@pytest.mark.parametrize("nodes", [4, 8, 16])
def test_a_share_changes_as_often(nodes: int) -> None:
    """As the whole trace, by node and hour."""
    whole = load_trace("aws-p3")
    share = whole.thinned(nodes)
    assert max(up(share, e.time_s) for e in share.events) <= nodes
    assert removals_per_node_s(share) == pytest.approx(removals_per_node_s(whole), rel=0.2)


def removals_per_node_s(trace: SpotTrace) -> float:
    removals, node_s, added = 0, 0.0, {}
    for e in trace.events:
        if e.op == "add":
            added[e.node] = e.time_s
        else:
            removals += 1
            node_s += e.time_s - added.pop(e.node)
    return removals / (node_s + sum(trace.end_s - time_s for time_s in added.values()))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 5))
def test_any_counts_are_kept(counts: list[int], seed: int) -> None:
    from tempfile import TemporaryDirectory

    rows = [f"2021-12-11, 11:{i:02}:00, {n}" for i, n in enumerate(counts)]
    with TemporaryDirectory() as folder:
        path = written(Path(folder), "\n".join(rows))
        if not any(counts):
            with pytest.raises(SpecError, match="no node is ever up"):
                load_trace(path, seed)
            return
        found = load_trace(path, seed)
    assert [up(found, 60 * i) for i in range(len(counts))] == counts
    there: set[str] = set()
    for e in found.events:
        assert (e.node in there) == (e.op == "remove")
        there ^= {e.node}
