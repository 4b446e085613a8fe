"""``ray-train-geo watch-node``: what it says and how it ends where there is nothing to watch."""

from __future__ import annotations

import signal

import fake_metadata as fake
import pytest
import typer
from fake_metadata import FakeMetadata, serving
from typer.testing import CliRunner, Result

from ray_train_geo.actors import node_watcher
from ray_train_geo.actors.node_watcher import RayNode
from ray_train_geo.watch_command import watch_node


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(watch_node)
    return CliRunner().invoke(app, arguments)


def test_no_cloud_is_said_once() -> None:
    with serving(FakeMetadata("router")) as server:
        result = run("--metadata-url", server.url)
    assert result.exit_code == 0
    assert result.stdout.count("no cloud") == len(result.stdout.splitlines()) == 1


def test_no_ray_is_one_message() -> None:
    with serving(fake.gcp()) as server:
        result = run("--metadata-url", server.url, "--address", "127.0.0.1:1", "--wait-s", "0")
    assert result.exit_code == 2
    assert ":1 does not answer" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_head_is_not_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    head = RayNode("ab", "10.0.0.1:6379", True)
    monkeypatch.setattr(node_watcher, "find_node", lambda address, node: head)
    result = run("--cloud", "aws")
    assert result.exit_code == 2
    assert "is the head of Ray" in result.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--metadata-url", "169.254.169.254"),
        ("--cloud", "fog"),
        ("--poll-s", "0"),
        ("--grace-s", "-1"),
    ],
)
def test_wrong_input_is_refused(wrong: tuple[str, str]) -> None:
    result = run(*wrong)
    assert result.exit_code == 2
    assert wrong[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_sigterm_while_waiting_for_the_node_ends_it() -> None:
    """The signal is blocked meanwhile and taken at the next wait; afterwards all is as before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.raise_signal(signal.SIGTERM)
    try:
        result = run("--cloud", "aws", "--address", "127.0.0.1:1")
    finally:
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert result.exit_code == 0
    assert "waiting for the node" in result.stdout
    assert signal.SIGTERM in mask
