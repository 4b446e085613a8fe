"""The command line: ``ray-train-geo train | plan | simulate | compare | replay | ...``.

Wrong input is one message on stderr and exit code 2; a run that fails, exit code 1.  With
``--json`` a command prints one JSON object on stdout and nothing else there.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ray_train_geo.attach_command import attach, stop, tell
from ray_train_geo.chaos_command import chaos
from ray_train_geo.compare_command import compare
from ray_train_geo.console import Address, AsJson, JobPath, Overrides, errors, print_json
from ray_train_geo.lab_command import lab, lab_do
from ray_train_geo.logs_command import logs
from ray_train_geo.plan_command import plan
from ray_train_geo.probe_command import probe
from ray_train_geo.replay_command import replay
from ray_train_geo.shape_command import shape
from ray_train_geo.simulate_command import simulate
from ray_train_geo.spec import JobSpec, load_job
from ray_train_geo.watch_command import watch_node

__all__ = ["app", "main"]

app = typer.Typer(
    name="ray-train-geo",
    help="Train one model over GPUs that are far apart, unequal, and come and go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def train(
    job_path: JobPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest complete checkpoint.")
    ] = False,
    resume_from: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Go on from this checkpoint (or this run's newest)."),
    ] = None,
    stop_after: Annotated[
        int | None,
        typer.Option(
            metavar="STEP",
            min=1,
            help="Stop after this step, with a checkpoint; the learning rate still follows "
            "training.steps.",
        ),
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Train a job to its end; SIGTERM or Ctrl-C stop it in good order, with a checkpoint."""
    with errors(as_json):
        job = load_job(job_path, overrides or ())
        # Ray and torch take seconds to import: a wrong spec is told before.
        from ray_train_geo.connection import connected
        from ray_train_geo.driver import follow, prepare
        from ray_train_geo.progress import ConsoleProgress

        mission = prepare(job, resume_from or resume, stop_after)
        console = Console(stderr=as_json)
        console.print(f"run directory: {job.run.directory}", soft_wrap=True, highlight=False)
        with (
            # What Ray prints of its own accord must not get into a program's JSON.
            contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout),
            connected(job, address),
            ConsoleProgress(console, mission.last_step) as progress,
        ):
            summary = follow(mission, [progress])
        tell(summary, console, as_json)


@app.command()
def validate(job_path: JobPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a job spec: fields, arithmetic, data and tokenizer; nothing is started."""
    with errors(as_json):
        job = load_job(job_path, overrides or ())
        from ray_train_geo.data.dataset import open_dataset
        from ray_train_geo.model.catalog import total_parameters

        data = open_dataset(job.data, job.training.seq_len)
        dims = job.dims(data.vocab_size)
        data.require_vocab(dims.vocab_size)
        found = {
            "valid": True,
            "parameters": total_parameters(dims),
            "tokens": len(data.tokens),
            "samples": data.samples,
            "epochs": job.training.steps * job.training.global_batch / data.samples,
        }
        if as_json:
            print_json(found)
        else:
            print(
                f"{job_path} is valid: {found['parameters']:,} parameters, {found['tokens']:,} "
                f"tokens of data ({found['samples']:,} samples), {found['epochs']:.2f} epochs"
            )


@app.command()
def schema() -> None:
    """Print the job spec's JSON schema, for editors."""
    print(json.dumps(JobSpec.model_json_schema(), indent=2))


app.command()(attach)
app.command()(stop)
app.command()(plan)
app.command()(probe)
app.command()(replay)
app.command()(logs)
app.command()(simulate)
app.command()(compare)
app.command()(watch_node)
app.command()(chaos)
app.command()(lab)
app.command()(lab_do)
app.command()(shape)


@app.command()
def submit(
    job_path: JobPath,
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", help="The head node's dashboard, http://HOST:8265."
        ),
    ] = "http://127.0.0.1:8265",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest one.")] = False,
    wait: Annotated[bool, typer.Option(help="Stream the job's log until it ends.")] = True,
    python: Annotated[str, typer.Option(help="The Python to run it with on the head.")] = "python",
    as_json: AsJson = False,
) -> None:
    """Hand a job to a running Ray head, as a Ray job."""
    with errors(as_json):
        job = load_job(job_path, overrides or ())
        from ray_train_geo.submission import submit_job

        echo: Callable[[str], None] = (
            (lambda text: None) if as_json else (lambda text: print(text, end="", flush=True))
        )
        submitted = submit_job(job, address, resume=resume, wait=wait, python=python, echo=echo)
        if as_json:
            print_json(submitted.to_json())
        elif not wait:
            print(f"submitted as {submitted.id}; stop it with: ray job stop {submitted.id}")
        if submitted.status == "FAILED":
            raise typer.Exit(1)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or a job spec.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a run is, from its run directory."""
    with errors(as_json):
        from ray_train_geo.observe.run_directory import RunDirectory
        from ray_train_geo.observe.status import run_status

        if run.suffix in (".yaml", ".yml") and run.is_file():
            run = load_job(run, overrides or ()).run.directory
        found = run_status(RunDirectory.open(run))
        if as_json:
            print_json(found)
            return
        table = Table(show_header=False)
        for key, value in found.items():
            table.add_row(key, f"{value:,.4g}" if isinstance(value, float) else str(value))
        Console().print(table)


@app.command("export")
def export_command(
    source: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="What to export.")],
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizers JSON file to put beside the weights.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a checkpoint's weights so that `transformers` can load them."""
    with errors(as_json):
        from ray_train_geo.exchange import export_huggingface

        dims = export_huggingface(source, folder, tokenizer)
        if as_json:
            print_json({"path": str(folder), "family": dims.family, "layers": dims.layers})
        else:
            print(f"exported to {folder}: {dims.family}, {dims.layers} layers of {dims.dim}")


@app.command("import")
def import_command(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder (GPT-2 or Llama).")],
    out: Annotated[Path, typer.Argument(help="Folder to write the checkpoint and job.yaml to.")],
    as_json: AsJson = False,
) -> None:
    """Import Hugging Face weights, and write a job spec that starts from them."""
    with errors(as_json):
        from ray_train_geo.exchange import import_huggingface

        job_path = import_huggingface(folder, out)
        if as_json:
            print_json({"job": str(job_path)})
        else:
            print(f"imported; train on it with: ray-train-geo train {job_path}")
