"""Hands a job to a running Ray head through Ray's job API."""

from __future__ import annotations

import asyncio
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_train_geo.errors import ClusterError
from ray_train_geo.spec import JobSpec

__all__ = ["Submitted", "submit_job"]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A submitted job; ``status`` is Ray's (PENDING, RUNNING, SUCCEEDED, STOPPED, FAILED)."""

    id: str
    status: str
    run_directory: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def submit_job(
    job: JobSpec,
    address: str,
    *,
    resume: bool = False,
    wait: bool = True,
    python: str = "python",
    echo: Callable[[str], None] = lambda text: None,
) -> Submitted:
    """Submit ``job``; relative paths in it are taken from here, so they must exist on the head.

    Args:
        address: the head's dashboard, ``http://HOST:8265``.
        wait: follow the job's log (through ``echo``) until it ends.
        python: the Python that has ray_train_geo on the head.

    Raises:
        ClusterError: the head can't be reached, or refuses the job.
    """
    from ray.job_submission import JobSubmissionClient

    raw = job.model_dump(mode="json")
    raw["run"]["storage_path"] = str(job.run.directory.parent)
    if "://" not in job.data.path:
        raw["data"]["path"] = str(Path(job.data.path).expanduser().absolute())
    if job.data.tokenizer != "byte":
        raw["data"]["tokenizer"] = str(Path(job.data.tokenizer).expanduser().absolute())
    if job.scaling.topology is not None:
        raw["scaling"]["topology"] = str(Path(job.scaling.topology).expanduser().absolute())
    try:
        client = JobSubmissionClient(address)
        with tempfile.TemporaryDirectory(prefix="rtg-submit-") as folder:
            Path(folder, "job.yaml").write_text(JobSpec.model_validate(raw).to_yaml())
            command = [python, "-m", "ray_train_geo", "train", "job.yaml"]
            job_id = client.submit_job(
                entrypoint=shlex.join([*command, *(["--resume"] if resume else [])]),
                runtime_env={"working_dir": folder},
                metadata={"job_submission": "ray_train_geo", "run": job.run.name},
            )
            status = str(client.get_job_status(job_id).value)
            if wait:
                echo(f"submitted as {job_id}\n")
                asyncio.run(_tail(client, job_id, echo))
                status = str(client.get_job_status(job_id).value)
    except (ConnectionError, RuntimeError, ValueError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ClusterError(f"can't submit to the Ray head at {address}: {reason}") from None
    return Submitted(job_id, status, str(job.run.directory))


async def _tail(client: Any, job_id: str, echo: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(job_id):
        echo(lines)
