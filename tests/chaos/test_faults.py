"""The language of faults: what it says, and that what it can't say is refused in one line."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_train_geo.chaos.faults import KINDS, PHASES, Fault, Moment, parse_faults
from ray_train_geo.errors import InputError


def test_what_it_says() -> None:
    text = (
        "kill-worker@step:10, kill-node@time:30, freeze:5@random, 3*kill-worker@phase:backward,join"
    )
    backward = Fault("kill-worker", None, Moment("phase", phase="backward"))
    assert parse_faults(text) == (
        Fault("kill-worker", None, Moment("step", 10)),
        Fault("kill-node", None, Moment("time", 30.0)),
        Fault("freeze", 5.0, Moment()),
        backward,
        backward,
        backward,
        Fault("join", None, Moment()),
    )


def test_lengths_have_defaults_and_nothing_is_nothing() -> None:
    assert [f.seconds for f in parse_faults("freeze,partition,drain,kill-node")] == [
        KINDS["freeze"],
        KINDS["partition"],
        KINDS["drain"],
        None,
    ]
    assert parse_faults("  , ") == ()


moments = st.one_of(
    st.just(Moment()),
    st.integers(1, 10**6).map(lambda n: Moment("step", n)),
    st.floats(0, 1e5).map(lambda s: Moment("time", float(f"{s:g}"))),
)
faults = st.builds(
    lambda kind, seconds, moment: Fault(kind, seconds if KINDS[kind] else None, moment),
    st.sampled_from(list(KINDS)),
    st.floats(0.001, 1e5).map(lambda s: float(f"{s:g}")),
    moments,
) | st.builds(
    lambda kind, phase: Fault(kind, KINDS[kind], Moment("phase", phase=phase)),
    st.sampled_from(["kill-worker", "kill-node", "freeze"]),
    st.sampled_from(PHASES),
)


@given(st.lists(faults, max_size=5))
def test_what_a_fault_says_of_itself_is_how_to_ask_for_it(wanted: list[Fault]) -> None:
    assert parse_faults(", ".join(map(str, wanted))) == tuple(wanted)


@given(st.text(max_size=40))
def test_any_text_is_faults_or_one_message(text: str) -> None:
    with contextlib.suppress(InputError):
        assert all(fault.kind in KINDS for fault in parse_faults(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kill-wroker", "'kill-wroker' is no fault; did you mean kill-worker?"),
        ("earthquake", "there are kill-worker, kill-node"),
        ("kill-worker:5", "kill-worker has no length; leave :5 out"),
        ("freeze:soon", "seconds 'soon' is no number of seconds"),
        ("freeze:-1", "no number of seconds"),
        ("freeze:nan", "no number of seconds"),
        ("freeze@step:0", "'0' is no step"),
        ("freeze@step:1.5", "'1.5' is no step"),
        ("freeze@phase:backwards", "did you mean backward?"),
        ("join@phase:backward", "join befalls no single worker"),
        ("freeze@noon", "'noon' is no moment; a fault is [COUNT*]KIND"),
        ("0*join", "the count '0' is none of 1 to"),
        ("many*join", "the count 'many'"),
        ("1000*join,join", "more than 1000 faults"),
    ],
)
def test_what_it_can_not_say(text: str, message: str) -> None:
    with pytest.raises(InputError) as e:
        parse_faults(text)
    assert message in str(e.value)
    assert "\n" not in str(e.value)
