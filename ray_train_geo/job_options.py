"""Options that several commands take: which work it is, and what may be done about its links."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_train_geo.spec import Precision

__all__ = [
    "Codecs",
    "GlobalBatch",
    "JobPath",
    "Microbatch",
    "Model",
    "PrecisionOption",
    "Recompute",
    "SeqLen",
    "codec_names",
]

Codecs = Annotated[
    str | None,
    typer.Option(
        help="Codecs that hops may use: any of none,bf16,int8,int4 with commas. Default: the job's."
    ),
]
GlobalBatch = Annotated[int | None, typer.Option(help="Sequences of one step, over all pipelines.")]
JobPath = Annotated[
    Path | None, typer.Argument(metavar="[JOB.yaml]", help="The job spec.", show_default=False)
]
Microbatch = Annotated[int | None, typer.Option(help="Sequences of one microbatch. Default: 1.")]
Model = Annotated[
    str | None, typer.Option(help="A model of the catalog, such as gpt3-xl; without a job.")
]
PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Of weights and activations. Default: fp16.")
]
Recompute = Annotated[
    bool | None,
    typer.Option(
        "--recompute/--no-recompute",
        help="Recompute activations in the backward pass. Default: yes.",
    ),
]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens of a sequence. Default: the model's longest.")
]


def codec_names(codecs: str | None) -> list[str] | None:
    """What ``--codecs`` lists; None if it was not given."""
    if codecs is None:
        return None
    return [name.strip() for name in codecs.split(",") if name.strip()]
