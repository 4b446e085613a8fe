"""TFLOP/s and MFU of GPT-3 XL stages in bf16 on one GPU, beside a plain torch loop.

    python benchmarks/gpu.py [--layers 4] [--microbatch 4] [--microbatches 8] [--rounds 5] [--json]

Ours is a stage in the middle of a pipeline as the runtime runs it: the executor's actions, bf16
weights, gradients summed in fp32.  The plain loop is ``stage(x).backward(g)`` over the same
layers, with torch's own bf16 gradients.  They take turns; the ratio is that of the medians.  FLOPs
are the model's: recomputation costs time and counts for nothing.  Ray is not needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ray_train_geo.model.catalog import CATALOG, layer_flops
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.stage import StageModule, build_stage
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.schedule.one_f_one_b import one_f_one_b
from ray_train_geo.spec import TrainingSpec
from ray_train_geo.training.buckets import Bucket
from ray_train_geo.training.executor import Edges, StageExecutor
from ray_train_geo.training.state import StageState

# Dense bf16 peak of NVIDIA's data sheets, TFLOP/s.
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "A40": 150, "A10": 125, "L4": 121, "4090": 165}
SEQ_LEN = 2048


class Wire:
    """A channel whose messages are there at once: what is timed is the stage, not a network."""

    def __init__(self, message: torch.Tensor) -> None:
        self._message = message

    def begin(self, *_: Any) -> None: ...

    def receive(self, *_: Any) -> torch.Tensor:
        return self._message.detach()

    def send(self, *_: Any) -> None: ...

    def finish(self, *_: Any) -> None: ...


def make_stage(args: argparse.Namespace, recompute: bool, compiled: bool) -> StageModule:
    dims = dataclasses.replace(CATALOG["gpt3-xl-24"], layers=args.layers + 2)
    stage = build_stage(dims, 1, 1 + args.layers, seed=0, device="cuda", recompute=recompute)
    if compiled:
        for layer in stage.layers.values():
            layer.compile()
    return stage


def our_loop(args: argparse.Namespace, recompute: bool, compiled: bool) -> Callable[[], None]:
    stage = make_stage(args, recompute, compiled)
    training = TrainingSpec(
        steps=1,
        global_batch=args.microbatch * args.microbatches,
        microbatch=args.microbatch,
        seq_len=SEQ_LEN,
        precision="bf16",
    )
    names = tuple(name for name, _ in stage.named_parameters())
    state = StageState(stage, training, [Bucket((0,), names)])
    state.on_gradient(lambda name: None)
    shape = (args.microbatch, SEQ_LEN, stage.dims.dim)
    hidden, gradient = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    forward, backward = Wire(hidden), Wire(gradient)
    wires: list[Any] = [forward, Wire(hidden), backward, Wire(gradient)]
    edges = Edges(*wires)
    executor = StageExecutor(
        module=stage,
        actions=one_f_one_b([1], args.microbatches)[0],
        first_microbatch=0,
        batches=lambda step, microbatch: (hidden, hidden),
        edges=edges,
        seed=0,
        tracer=Tracer(enabled=False),
        before_last_gradients=lambda: None,
    )

    def run() -> None:
        state.clear_gradients()
        executor.run(1, 1.0, 60.0)

    return run


def plain_loop(args: argparse.Namespace, recompute: bool, compiled: bool) -> Callable[[], None]:
    stage = make_stage(args, recompute, compiled).to(torch.bfloat16)
    shape = (args.microbatch, SEQ_LEN, stage.dims.dim)
    hidden, gradient = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def run() -> None:
        stage.zero_grad(set_to_none=False)
        for microbatch in range(args.microbatches):
            x = hidden.detach().requires_grad_()
            stage(x, dropout_key(0, 1, microbatch)).backward(gradient)

    return run


def seconds(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--microbatch", type=int, default=4, help="sequences of 2048 tokens")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=None)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    name = torch.cuda.get_device_name()
    peak = args.peak_tflops or next((p for key, p in PEAKS.items() if key in name), None)
    dims = CATALOG["gpt3-xl-24"]
    flops = 3 * args.layers * args.microbatches * layer_flops(dims, SEQ_LEN, args.microbatch)
    rows = []
    for compiled in (False,) if args.no_compile else (False, True):
        for recompute in (False, True):
            ours, plain = (make(args, recompute, compiled) for make in (our_loop, plain_loop))
            for warm in (ours, plain, ours, plain):
                warm()
            times: dict[str, list[float]] = {"ours": [], "plain": []}
            for _ in range(args.rounds):
                times["ours"].append(seconds(ours))
                times["plain"].append(seconds(plain))
            mine, theirs = (statistics.median(times[k]) for k in ("ours", "plain"))
            rows.append(
                {
                    "device": name,
                    "recompute": recompute,
                    "compile": compiled,
                    "tflops": flops / mine / 1e12,
                    "plain_tflops": flops / theirs / 1e12,
                    "ratio": theirs / mine,
                    "mfu": flops / mine / 1e12 / peak if peak else None,
                    "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
                }
            )
            del ours, plain
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if not args.json:
                row = rows[-1]
                mfu = f"{row['mfu']:.1%}" if peak else "unknown peak"
                print(
                    f"{name}: recompute={recompute!s:5} compile={compiled!s:5} "
                    f"{row['tflops']:7.1f} TFLOP/s (plain {row['plain_tflops']:7.1f}, ratio "
                    f"{row['ratio']:.3f}), MFU {mfu}",
                    flush=True,
                )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
