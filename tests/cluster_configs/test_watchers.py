"""Every spot node that can see its cloud's notices starts a node watcher, beside Ray."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ray_train_geo.watch_command import watch_node

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
CLOUDS = {"aws-spot.yaml": "aws", "gcp-spot.yaml": "gcp"}


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """The environment of a node on which `ray` and `ray-train-geo` note how they were called."""
    for name in ("ray", "ray-train-geo"):
        program = tmp_path / name
        program.write_text(
            '#!/bin/sh\nexec >"$0.called"\ncut -d" " -f6 /proc/$$/stat\necho "$RAY_AUTH_MODE"\n'
            'printf "%s\\n" "$@"\necho done\n'
        )
        program.chmod(0o755)
    vpn = tmp_path / "ip"
    vpn.write_text('#!/bin/sh\necho "7: wg0    inet 10.99.0.7/24 scope global wg0"\n')
    vpn.chmod(0o755)
    token = tmp_path / "token"
    token.write_text("secret")
    return {
        "HOME": str(tmp_path),
        "PATH": f"{tmp_path}:/usr/bin:/bin:/usr/sbin:/sbin",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }


def called(name: str, env: dict[str, str]) -> tuple[int, str, list[str]]:
    """Session, auth mode and arguments of the program's call, once it is over."""
    path = Path(env["HOME"]) / f"{name}.called"
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text().endswith("done\n")):
        assert time.monotonic() < deadline, f"{name} was not called"
        time.sleep(0.01)
    session, mode, *arguments, _ = path.read_text().splitlines()
    return int(session), mode, arguments


def options(arguments: list[str]) -> dict[str, Any]:
    """What `ray-train-geo watch-node` understands."""
    assert arguments[0] == "watch-node"
    app = typer.Typer()
    app.command()(watch_node)
    command: Any = typer.main.get_command(app)
    return dict(command.make_context("watch-node", arguments[1:]).params)


@pytest.mark.parametrize("name", CLOUDS)
def test_cloud_workers_start_it_and_the_head_does_not(name: str, node: dict[str, str]) -> None:
    config = yaml.safe_load((CONFIGS / name).read_text())
    assert not any("watch-node" in c for c in config["head_start_ray_commands"])
    *_, start, watch = config["worker_start_ray_commands"]
    assert "ray start" in start
    # As Ray's node updater runs it: a shell that ends while the watcher goes on.
    shell = f"export RAY_HEAD_IP=10.0.0.1; ({watch})"
    subprocess.run(["bash", "-c", shell], env=node, check=True, timeout=5)
    session, mode, arguments = called("ray-train-geo", node)
    assert session != os.getsid(0), "it would end with the shell's terminal"
    assert mode == "token"
    told = options(arguments)
    assert told["cloud"] == CLOUDS[name]
    assert told["address"] == "10.0.0.1:6379"
    assert not told["rebalance"]


@pytest.mark.parametrize(("market", "watched"), [("spot", True), ("on-demand", False)])
def test_multi_region_workers_start_it_on_spot(
    market: str, watched: bool, node: dict[str, str]
) -> None:
    place = {"RAY_NODE_REGION": "r", "RAY_NODE_ZONE": "r-1", "RAY_NODE_MARKET_TYPE": market}
    subprocess.run(
        ["bash", str(CONFIGS / "multi-region" / "worker.sh"), "10.99.0.1:6379"],
        env=node | place,
        check=True,
        timeout=10,
    )
    assert called("ray", node)[2][0] == "start"
    if watched:
        told = options(called("ray-train-geo", node)[2])
        assert told["cloud"] == "auto"
        assert (told["address"], told["node"]) == ("10.99.0.1:6379", "10.99.0.7")
    else:
        assert not (Path(node["HOME"]) / "ray-train-geo.called").exists()
