"""Step time of a 2-stage pipeline through Ray actors, beside torch.distributed.pipelining.

Both train the same model (8 layers, dim 256, 8 heads, sequence 128, vocabulary 2048) on 8
microbatches of 2 a step, with AdamW in fp32 and one thread a process, and take turns: machines
are shared and noisy, so the ratio of the two counts, not the seconds.

    python benchmarks/throughput.py [--rounds 3] [--steps 20] [--peer torch_pipelining.py]

The peer is a script of its own that prints one JSON object; by default the one that lies in
``../shared/peers`` beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from ray_train_geo import GeoTrainer

VOCAB, SEQ_LEN, MICROBATCHES, MICROBATCH = 2048, 128, 8, 2
WARMUP_STEPS = 3
PEER = Path(__file__).resolve().parents[2] / "shared" / "peers" / "torch_pipelining.py"


def peer_step_s(script: Path, steps: int) -> dict[str, Any]:
    command = [
        sys.executable, str(script), "--stages", "2", "--layers", "8", "--dim", "256",
        "--heads", "8", "--seq", str(SEQ_LEN), "--vocab", str(VOCAB),
        "--microbatches", str(MICROBATCHES), "--microbatch-size", str(MICROBATCH),
        "--schedule", "1f1b", "--steps", str(steps), "--warmup", str(WARMUP_STEPS),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def our_steps_s(folder: Path, steps: int, name: str) -> list[float]:
    job = {
        "model": {
            "layers": 8,
            "dim": 256,
            "heads": 8,
            "vocab_size": VOCAB,
            "tied_embeddings": False,
        },
        "data": {"path": str(folder / "tokens.bin"), "tokenizer": "byte"},
        "training": {
            "steps": WARMUP_STEPS + steps,
            "global_batch": MICROBATCHES * MICROBATCH,
            "microbatch": MICROBATCH,
            "seq_len": SEQ_LEN,
            "lr": 3e-4,
        },
        "parallelism": {"pipelines": 1, "stages": 2, "schedule": "1f1b"},
        "checkpoint": {"interval": 0},
        "run": {"name": name, "storage_path": str(folder), "trace_steps": 0},
    }
    history = GeoTrainer(job).fit().history
    return [record["step_s"] for record in history[WARMUP_STEPS:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a turn")
    parser.add_argument("--peer", type=Path, default=PEER, help="the peer's script")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if not args.peer.exists():
        parser.error(f"there is no peer at {args.peer}; give its path with --peer")
    ratios, ours, theirs, ideals = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="rtg-bench-") as name:
        folder = Path(name)
        os.environ["RAY_TRAIN_GEO_CACHE"] = str(folder / "cache")
        tokens = np.random.default_rng(0).integers(0, VOCAB, 2**18, dtype=np.uint16)
        tokens.tofile(folder / "tokens.bin")
        for turn in range(args.rounds):
            peer = peer_step_s(args.peer, args.steps)
            mine = statistics.median(our_steps_s(folder, args.steps, f"turn{turn}"))
            theirs.append(peer["median_step_s"])
            ideals.append(peer["ideal_s"])
            ours.append(mine)
            ratios.append(mine / theirs[-1])
            if not args.json:
                print(
                    f"turn {turn}: ours {mine:.4f} s, peer {theirs[-1]:.4f} s (its ideal "
                    f"{ideals[-1]:.4f}), ratio {ratios[-1]:.3f}, load {os.getloadavg()[0]:.2f}",
                    flush=True,
                )
    result = {
        "ours_step_s": statistics.median(ours),
        "peer_step_s": statistics.median(theirs),
        "peer_ideal_s": statistics.median(ideals),
        "ratio": statistics.median(ratios),
        "tokens_per_s": MICROBATCHES * MICROBATCH * SEQ_LEN / statistics.median(ours),
        "load_average": os.getloadavg()[0],
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"median: ours {result['ours_step_s']:.4f} s, peer {result['peer_step_s']:.4f} s, "
            f"ratio {result['ratio']:.3f} (1-minute load {result['load_average']:.2f})"
        )


if __name__ == "__main__":
    main()
