"""Writes ``docs/job-spec.md`` from the job spec's own classes (level 0).

python -m ray_train_geo.spec_reference > docs/job-spec.md

Types, limits, defaults and descriptions come from the JSON schema, so the page can't say anything
else than what ``ray-train-geo validate`` checks.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ray_train_geo.model.catalog import CATALOG, total_parameters
from ray_train_geo.spec import JobSpec

__all__ = ["job_spec_reference"]

_INTRO = """\
# The job spec

*Made from `ray_train_geo/spec.py` by `make docs`; change it there.*

A job is one YAML file. `model`, `data` and `training` must be given; all else has defaults:

```yaml
# yaml-language-server: $schema=job.schema.json
model: {layers: 4, dim: 128, heads: 4}
data: {path: "python://stdlib"}
training: {steps: 300, global_batch: 32, microbatch: 4, seq_len: 128, lr: 3.0e-3}
```

- **Check** a job without starting anything: `ray-train-geo validate JOB.yaml`. A misspelt field, a
  value out of range or a batch that does not divide is refused with one line that says what to do.
- **Override** any field on the command line: `--set training.steps=100 --set parallelism.stages=2`.
- **Editors** that know the YAML language server complete and check fields with the schema that
  `ray-train-geo schema` prints; it lies in
  [`examples/job.schema.json`](../examples/job.schema.json). Name it in the job's first line, as
  above (a path from the job's own folder, or a URL).
- From Python the same names make a mapping, which `GeoTrainer`, `parse_job` and `JobSpec` take.

Sections: {sections}. Last: [models by name](#models-by-name).

In the column *default*, `-` means: not given. With `model.name`, the catalog's dimensions come
before the defaults of `model`.
"""

_CATALOG_INTRO = """\
## Models by name

What `model.name` can be. Dimensions given beside the name replace these.

| name | family | layers | dim | heads | kv_heads | ffn_dim | vocab_size | parameters |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def job_spec_reference() -> str:
    """The reference page, as Markdown."""
    sections = list(_sections(JobSpec, ()))
    links = ", ".join(f"[`{name}`](#{_anchor(name)})" for name, _, _ in sections)
    pages = [_INTRO.replace("{sections}", links)]
    for name, model, required in sections:
        doc = " ".join((model.__doc__ or "").split())
        pages.append(f"## `{name}`\n\n{doc}{' Required.' if required else ''}\n\n{_table(model)}")
    rows = (
        f"| `{name}` | {d.family} | {d.layers} | {d.dim} | {d.heads} | {d.kv_heads} | {d.ffn_dim} "
        f"| {d.vocab_size} | {total_parameters(d) / 1e6:,.1f} M |\n"
        for name, d in CATALOG.items()
    )
    pages.append(_CATALOG_INTRO + "".join(rows))
    return "\n".join(pages)


def _sections(
    model: type[BaseModel], path: tuple[str, ...]
) -> Iterator[tuple[str, type[BaseModel], bool]]:
    """(dotted name, class, required) of every section below ``model``, outer ones first."""
    for name, field in model.model_fields.items():
        kinds = typing.get_args(field.annotation) or (field.annotation,)  # or None: left out
        section = kinds[0]
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield ".".join((*path, name)), section, field.is_required()
            yield from _sections(section, (*path, name))


def _table(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    properties = (schema.get("anyOf", [schema])[0])["properties"]  # a section may also be `auto`
    lines = ["| field | type | default | description |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        description, _, otherwise = (field.description or "").partition(" Default: ")
        cells = (
            f"`{name}`",
            _type(properties[name]),
            otherwise.removesuffix(".") or _default(field, properties[name]),
            description,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(schema: Mapping[str, Any]) -> str:
    """Such as ``integer >= 1``; of several types, all but null (which is: not given)."""
    if "$ref" in schema:
        return "section"
    if "anyOf" in schema:
        return " or ".join(_type(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema["type"])
    if kind == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])} {_type(schema['prefixItems'][0])}s"
        return f"list of {_plural(_type(schema['items']))}"
    if kind == "object":
        return f"mapping of names to {_type(schema['additionalProperties'])}s"
    limits = [
        f"{sign} {schema[key]:g}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    return f"{kind} {', '.join(limits)}".strip()


def _plural(kind: str) -> str:
    return re.sub(r"^(\w+)", lambda m: f"{m[1]}s", kind)


def _default(field: FieldInfo, schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return "required" if field.is_required() else "its own defaults"
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "`auto`" if _takes_auto(field) else "-"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{k}: {v:g}' for k, v in value.items())}}}`"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _takes_auto(field: FieldInfo) -> bool:
    """Whether ``auto`` is another way to write that the field is not given."""
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else None
    try:
        return kind is not None and TypeAdapter(kind).validate_python("auto") is None
    except ValidationError:
        return False


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    print(job_spec_reference(), end="")
