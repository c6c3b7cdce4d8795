"""Training beside other trainers: `python -m benchmarks.training [--json] [--device cuda]`.

Cells: the speed of a step beside Hugging Face's LlamaForCausalLM, a plain nanoGPT-style model and,
with Muon, the same network under `torch.optim.Muon`. Then what a trunk saves and whether its losses
are those of separate runs, and what checkpoints and reading data cost. On a CPU one thread in fp32,
all in turns in one run, by CPU time, at shapes of `mini`; five minutes. On a GPU 125M and 350M
parameters in bf16, compiled, and eight small trials that share it. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import steps
from benchmarks.shares import checkpoint_costs, data_share
from benchmarks.sharing import sharing
from benchmarks.steps import Step, Work, ratio
from benchmarks.trunks import Trunk
from trainers.decoders import LLAMA
from trainers.device import device_name, peak_flops
from trainers.flops import flops_per_token, params
from trainers.shape import Shape

WIDTHS = (24, 48, 96)
SEQUENCES = 8
ROUNDS, SECONDS = 15, 0.25
"""On a CPU: rounds of turns, and seconds a turn."""
GPU_SIZES = ((768, 12, 12), (1024, 24, 16))
"""Width, depth, heads: those of GPT-2 small and medium, 125M and 350M without the embedding."""
GPU_CONTEXT, GPU_VOCABULARY = 1024, 50_304
GPU_SEQUENCES = 16
GPU_ROUNDS, GPU_SECONDS = 5, 3.0
SHARING_TRIALS, SHARING_STEPS = 8, 300


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of a CPU's cells")
    parser.add_argument("--cells", action="store_true", help="the speed of a step alone")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU here: leave it out to measure a core")
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    found = on_gpu(device) if arguments.device == "cuda" else on_cpu(arguments.widths)
    if not arguments.cells:
        found |= the_rest(device)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def on_cpu(widths: list[int]) -> dict[str, Any]:
    """Cells of the shapes of `mini`."""
    peak = matmul_peak()
    works = [Work(shape=mini_shape(width), sequences=SEQUENCES) for width in widths]
    cells = [cell(work, peak, rounds=ROUNDS, seconds=SECONDS) for work in works]
    return {"device": device_name(torch.device("cpu")), "peak_flops": peak, "cells": cells}


def on_gpu(device: torch.device) -> dict[str, Any]:
    """Cells of a Llama-like decoder at 125M and 350M, and small trials that share the GPU."""
    peak = peak_flops(device, "bf16")
    works = [Work(shape=s, sequences=GPU_SEQUENCES, device=device) for s in gpu_shapes()]
    cells = [cell(work, peak, rounds=GPU_ROUNDS, seconds=GPU_SECONDS) for work in works]
    small = Work(shape=mini_shape(96), sequences=4 * SEQUENCES, device=device)
    return {
        "device": device_name(device),
        "peak_flops": peak,
        "cells": cells,
        "sharing": sharing(small, trials=SHARING_TRIALS, steps=SHARING_STEPS),
    }


def the_rest(device: torch.device) -> dict[str, Any]:
    """Trunk, checkpoints and data, at shapes of `mini`."""
    checkpoint = checkpoint_costs(mini_shape(max(WIDTHS)))
    works = [Work(shape=mini_shape(w), sequences=SEQUENCES, device=device) for w in WIDTHS]
    return {
        "trunk": Trunk().compared(),
        "resume_overhead": checkpoint["share"],
        "checkpoint": checkpoint,
        "data_share": max(map(data_share, works)),
    }


def mini_shape(width: int) -> Shape:
    """A shape of `mini`."""
    return Shape(width=width, depth=2, heads=2, vocabulary=256, context=64)


def gpu_shapes() -> list[Shape]:
    """Those of `GPU_SIZES`."""
    return [
        Shape(
            width=width,
            depth=depth,
            heads=heads,
            vocabulary=GPU_VOCABULARY,
            context=GPU_CONTEXT,
            architecture=LLAMA,
        )
        for width, depth, heads in GPU_SIZES
    ]


def matmul_peak() -> float:
    """FLOP/s of the best of 100 matmuls of 1024^3 in fp32, by CPU time.

    By wall time a busy neighbour has halved it, and with that doubled every MFU.
    """
    a, b = torch.randn(2, 1024, 1024)
    times = []
    for _ in range(100):
        start = time.process_time()
        torch.mm(a, b)
        times.append(time.process_time() - start)
    return float(2 * 1024**3 / min(times))


def cell(work: Work, peak: float, *, rounds: int, seconds: float) -> dict[str, float | None]:
    """One row: our speed and its ratios to the others'; None for those not run on a GPU."""
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: steps.ours(work, "adamw"),
        "ours_muon": lambda: steps.ours(work, "muon"),
        "hf_llama": lambda: steps.hugging_face(work),
    }
    if not work.on_gpu:
        makers["nanogpt"] = lambda: steps.nanogpt(work)
        makers["torch_muon"] = lambda: steps.torch_muon(work)
    trainers = {name: make() for name, make in makers.items()}
    taken = steps.interleaved(trainers, steps.clock(work.device), rounds=rounds, seconds=seconds)

    def over(theirs: str, our: str = "ours") -> float | None:
        return ratio(taken[theirs], taken[our]) if theirs in taken else None

    step, flops = statistics.median(taken["ours"]), flops_per_token(work.shape) * work.tokens
    return {
        "width": work.shape.width,
        "depth": work.shape.depth,
        "context": work.shape.context,
        "params_matmul": params(work.shape).matmul,
        "tokens_per_second": work.tokens / step,
        "mfu": flops / step / peak,
        "mfu_muon": flops / statistics.median(taken["ours_muon"]) / peak,
        "over_hf_llama": over("hf_llama"),
        "over_nanogpt": over("nanogpt"),
        "over_torch_muon": over("torch_muon", "ours_muon"),
        "muon_over_adamw_cost": over("ours_muon"),
    }


def show(found: dict[str, Any]) -> None:
    """Print a table and what follows it."""
    title = f"{found['device']}, peak {found['peak_flops'] / 1e9:,.0f} GFLOP/s"
    table = Table(title=title, title_justify="left")
    for name in found["cells"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in found["cells"]:
        table.add_row(*("–" if value is None else f"{value:.4g}" for value in row.values()))
    console = Console()
    console.print(table)
    for name, value in found.items():
        if name not in ("device", "peak_flops", "cells"):
            console.print(name.replace("_", " "), value)


if __name__ == "__main__":
    main()
