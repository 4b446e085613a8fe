"""What codecs cost beside what they save: seconds to encode and decode, seconds of a 1 Gbit/s link.

    python benchmarks/codecs.py [--json] [--device cuda] [--threads 1]

Messages are those of GPT-3 XL (one microbatch of 2,048 tokens, hidden size 2,048) in fp32; gradient
codecs encode a bucket of 25 MiB, beside torch's own compression hooks: the arithmetic of both,
without their messages.  Times are CPU seconds of this thread (on a GPU: seconds until its work is
done), the least of several runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from ray_train_geo.codecs.base import Codec
from ray_train_geo.codecs.make import make_codec
from ray_train_geo.codecs.sparse import SparseCodec
from ray_train_geo.codecs.workspace import Workspace
from ray_train_geo.model.catalog import CATALOG
from ray_train_geo.planning.codecs import wire_bytes
from ray_train_geo.spec import CodecSpec
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.low_rank_sums import LowRankSums
from ray_train_geo.training.residuals import Residuals
from ray_train_geo.transport.collectives import Together

GBIT_BYTES_PER_S = 1e9 / 8
RUNS = 7
KEY = 1
ROWS, COLUMNS, RANK = 2048, 3200, 4  # 25 MiB in fp32


def least_s(work: Callable[[], object], device: torch.device) -> float:
    """The least time of several runs, after one that warms up."""
    work()
    return min(_timed(work, device) for _ in range(RUNS))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.thread_time()
    work()
    return time.thread_time() - began


def row(name: str, codec: Codec, values: torch.Tensor) -> dict[str, Any]:
    """Cost and saving of one message."""
    device = values.device
    wire = torch.empty(codec.wire_bytes, dtype=torch.uint8, device=device)
    found = torch.empty_like(values)
    encode_s = least_s(lambda: codec.encode(values, wire, KEY), device)
    decode_s = least_s(lambda: codec.decode(wire, found, KEY), device)
    ratio = codec.wire_bytes / values.nbytes
    return _figures(name, ratio, encode_s, decode_s, values, found)


def activations(workspace: Workspace) -> list[dict[str, Any]]:
    dims = CATALOG["gpt3-xl"]
    values = torch.randn(dims.max_seq_len, dims.dim, device=workspace.device)
    rows = []
    for name in ("bf16", "int8", "int4"):
        for rotated in (False, True) if name != "bf16" else (False,):
            codec = make_codec(name, values.numel(), workspace, rotated)
            assert codec.wire_bytes == wire_bytes(name, values.numel(), "fp32")
            rows.append(row(name + " rotated" * rotated, codec, values))
    return rows


def gradients(workspace: Workspace) -> list[dict[str, Any]]:
    """One part of a sum: encoded by its sender, decoded by who adds up."""
    values = torch.randn(ROWS, COLUMNS, device=workspace.device)
    spec = CodecSpec()
    sparse = SparseCodec(values.numel(), workspace, spec.topk_stride, spec.topk_fraction)
    rows = [
        row(name, make_codec(name, values.numel(), workspace), values) for name in ("bf16", "int8")
    ]
    return [
        *rows,
        _torch_bf16(values),
        row("topk", sparse, values),
        _powersgd(values),
        _torch_powersgd(values),
    ]


class Alone:
    """A group whose other members are there at once, and have sent nothing."""

    rank, size = 0, 1

    def all_reduce(self, *_: Any) -> Together:
        return Together(())

    reduce_scatter = all_gather = all_reduce


def _powersgd(values: torch.Tensor) -> dict[str, Any]:
    """All of it: with the residual, which is fed and computed anew."""
    weights = {"w": values}
    bucket = Bucket((0, 1), ("w",))
    buffer = values.flatten().clone()
    residuals = Residuals([bucket], weights)
    sums = LowRankSums(
        [bucket], {0: buffer}, {(0, 1): Alone()}, weights, weights.__getitem__, False, RANK, 0,
        residuals,
    )  # fmt: skip

    def add_up() -> None:
        for pending in sums.rounds(0):
            pending.wait(1.0)

    whole_s = least_s(add_up, values.device)
    buffer.copy_(values.flatten())
    add_up()
    ratio = RANK * (ROWS + COLUMNS) / values.numel()
    return _figures("powersgd", ratio, whole_s, 0.0, values, buffer.view_as(values))


def _torch_bf16(values: torch.Tensor) -> dict[str, Any]:
    """As ``bf16_compress_hook`` of torch: cast, and cast back."""
    small = values.to(torch.bfloat16)
    device = values.device
    encode_s = least_s(lambda: values.to(torch.bfloat16), device)
    decode_s = least_s(lambda: small.to(torch.float32), device)
    return _figures("torch bf16 hook", 0.5, encode_s, decode_s, values, small.float())


def _torch_powersgd(values: torch.Tensor) -> dict[str, Any]:
    """As ``powerSGD_hook`` of torch: two products, its orthogonalisation, and the product."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    device = values.device
    q = torch.randn(COLUMNS, RANK, device=device)

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        p = values @ q
        powerSGD_hook._orthogonalize(p.unsqueeze(0))
        return p, values.t() @ p

    p, right = encode()
    ratio = RANK * (ROWS + COLUMNS) / values.numel()
    encode_s = least_s(encode, device)
    decode_s = least_s(lambda: p @ right.t(), device)
    return _figures("torch powersgd hook", ratio, encode_s, decode_s, values, p @ right.t())


def _figures(
    name: str,
    ratio: float,
    encode_s: float,
    decode_s: float,
    values: torch.Tensor,
    found: torch.Tensor,
) -> dict[str, Any]:
    saved_s = values.nbytes * (1 - ratio) / GBIT_BYTES_PER_S
    return {
        "codec": name,
        "bytes_ratio": ratio,
        "encode_s": encode_s,
        "decode_s": decode_s,
        "saved_s": saved_s,
        "cost_of_saving": (encode_s + decode_s) / saved_s,
        "relative_error": float((found - values).norm() / values.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    workspace = Workspace(torch.device(asked.device))
    found = {"activations": activations(workspace), "gradients": gradients(workspace)}
    if asked.json:
        print(json.dumps({"device": asked.device, "threads": asked.threads, **found}, indent=1))
        return
    for what, rows in found.items():
        print(f"{what}, {asked.device}: milliseconds, beside what a 1 Gbit/s link saves")
        for r in rows:
            print(
                f"  {r['codec']:20} {r['bytes_ratio']:6.3f}x bytes"
                f"  encode {1e3 * r['encode_s']:7.2f}  decode {1e3 * r['decode_s']:7.2f}"
                f"  saved {1e3 * r['saved_s']:7.1f}"
                f"  cost/saving {100 * r['cost_of_saving']:6.2f} %"
                f"  relative error {r['relative_error']:.4f}"
            )


if __name__ == "__main__":
    main()
