"""The stages of `benchmarks.gpu`: each validates one path, and lists under `bad` what is wrong.

`python -m benchmarks.gpu_stages NAME` runs one stage in this process and prints one JSON line.
Without a GPU, sizes are small, and what only a GPU has is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import steps
from benchmarks.sharing import sharing
from benchmarks.training import GPU_SEQUENCES, gpu_shapes, mini_shape
from benchmarks.trunks import pretraining
from trainers import compiling
from trainers.decoders import LLAMA
from trainers.device import datasheet_flops, synchronise, this_device
from trainers.flops import flops_per_token
from trainers.learner import Learner
from trainers.memory import CONTEXT_BYTES, Passes, training_memory
from trainers.optimizer import Optimizer, adamw_step, orthogonalised
from trainers.passes import accumulate, passes_on, prepared
from trainers.pretrain import Pretrain
from trainers.ranks import Ranks, joined
from trainers.recipes import named
from trainers.shape import Shape
from trainers.transformer import Transformer
from trainers.trial import Hyperparameters, Measurement, Precision, Step, Trial
from trainers.workspace import Scratch

Report = dict[str, Any]

NATS: dict[Precision, float] = {"fp32": 2e-4, "bf16": 3e-2}
"""Largest difference allowed between a GPU's loss and the CPU's after three steps."""
LEAST_MFU = {768: 0.45, 1024: 0.50}
"""MFU to reach by width: 125M and 350M parameters in bf16 at context 1024, against the measured
peak of a matrix product."""
MUON_OVER_ADAMW = 1.3
"""Largest ratio allowed between a step with Muon and one with AdamW."""
MOST_GRAPHS = 6
"""Number of graphs that a trial may compile, whatever its depth."""
COMPILE_RATIO, STEP_RATIO = 0.4, 1.08
"""Largest ratios allowed, by blocks over one graph: of the time to compile, and of a step."""
LEFT_BYTES = 50e6
"""Memory that may stay allocated after the trials of a process have ended."""
REPEAT_NATS = 0.02
"""Largest difference allowed between repetitions on a GPU, whose sums differ in their order."""
LEAST_EFFICIENCY = 0.75
"""Least speed of a gang over that of as many single GPUs."""
GANG_TRIAL, GANG_SPEED = "gang-trial", "gang-speed"
RECKONED = (0.95, 1.5)
"""Range allowed for the predicted peak memory over the measured one."""


def main() -> None:
    """Run one stage and print its report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, *GANG_PARTS])
    parser.add_argument("--gpus", type=int, default=2, help="number of ranks of the gang")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.stage in GANG_PARTS:
        GANG_PARTS[arguments.stage]()
        return
    report = STAGES[arguments.stage](arguments.gpus)
    print(json.dumps({"bad": [], **report}), flush=True)


def environment(_gpus: int) -> Report:
    """Report versions, the compiler, the GPU's state and what a process takes of its memory."""
    device, bad = this_device(), []
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    report: Report = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device.type,
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        "Python.h": header.exists(),
    }
    if device.type == "cpu":
        return report
    if not (report["compiler"] and report["Python.h"]):
        bad.append("Triton needs a C compiler and Python.h, and one of them is missing here")
    properties = torch.cuda.get_device_properties(device)
    before, _ = torch.cuda.mem_get_info()
    torch.mm(*torch.randn(2, 64, 64, device=device))
    synchronise(device)
    after, total = torch.cuda.mem_get_info()
    query = "driver_version,compute_mode,ecc.errors.uncorrected.volatile.total"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    report |= {
        "gpu": properties.name,
        "memory": total,
        "context_bytes": before - after,
        "driver, compute mode, ECC errors": smi.stdout.strip(),
    }
    if datasheet_flops(properties.name, "bf16") is None:
        bad.append(f"{properties.name} is not in the table of GPU types")
    if before - after > CONTEXT_BYTES:
        bad.append(f"a process takes more than the {CONTEXT_BYTES:.2g} bytes that are reckoned")
    return report | {"bad": bad}


def numerics(_gpus: int) -> Report:
    """Compare three steps of every decoder with the plain decoder on the CPU."""
    device, bad = this_device(), []
    report: Report = {}
    cases: dict[str, dict[str, Any]] = {
        "mini": {"recipe": "mini", "width": 64},
        "llama": {"width": 128},
        "grouped queries": {"width": 256, "heads": 4, "architecture": {"queries_per_key": 2}},
        "squared ReLU": {"recipe": "muon", "width": 128},
        "tied": {"width": 128, "architecture": {"tied": True}},
    }
    for name, case in cases.items():
        for precision in NATS:
            shape, h = _model(**case, depth=2, context=64, precision=precision)
            reference = _plain_losses(shape, h)
            losses = _losses(Learner(_trial(shape, h), device, Ranks()), shape, h)
            worst = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
            report[f"{name} {precision}"] = worst
            if not worst <= NATS[precision]:  # NaN is wrong, too
                bad.append(f"{name} in {precision} differs from the CPU by {worst:.1e} nats")
            if device.type == "cuda" and _attention_kernel(shape, h, device) == "math":
                bad.append(f"{name} in {precision}: attention runs in the slow math kernel")
    return report | {"bad": bad}


def _plain_losses(shape: Shape, h: Hyperparameters) -> list[float]:
    """Return the losses of three steps on the CPU, by the decoder that blocks compute on a GPU."""
    passes = Passes(sequences=_sequences(shape, h), recomputed=True)
    model = Transformer(shape, 0, partial(prepared, passes=passes))
    optimizer, windows = Optimizer(model, h), torch.from_numpy(_windows(shape, h))
    losses = []
    for _ in range(3):
        losses.append(accumulate(model.loss, windows, passes, after_pass=optimizer.collect).item())
        optimizer.step(1.0)
    return losses


def _losses(learner: Learner, shape: Shape, h: Hyperparameters) -> list[float]:
    windows = _windows(shape, h)
    return [learner.step(windows, 1.0).item() for _ in range(3)]


def _attention_kernel(shape: Shape, h: Hyperparameters, device: torch.device) -> str:
    """Return which of torch's attention kernels a backward pass runs on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    passes = passes_on(device, shape, h)
    model = Transformer(shape, 0, partial(prepared, passes=passes)).to(device)
    Optimizer(model, h)  # which gives it weights of the trial's precision
    windows = torch.from_numpy(_windows(shape, h)).to(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        model.loss(windows).backward()  # type: ignore[no-untyped-call]
        synchronise(device)
    names = " ".join(event.key.lower() for event in profiled.key_averages())
    kinds = {"flash": "flash", "efficient": "efficient", "fmha": "efficient", "cudnn": "cudnn"}
    return next((kind for part, kind in kinds.items() if part in names), "math")


def compile_(_gpus: int) -> Report:
    """Time the first step of a model whose blocks are unrolled into one graph, and by blocks."""
    from torch._dynamo.utils import counters

    device, bad = this_device(), []
    on_gpu = device.type == "cuda"
    shape, h = _model(
        width=768 if on_gpu else 64,
        depth=12 if on_gpu else 4,
        vocabulary=50_304 if on_gpu else 512,
        context=1024 if on_gpu else 64,
        precision="bf16" if on_gpu else "fp32",
        sequences=GPU_SEQUENCES if on_gpu else 4,
    )
    windows = _windows(shape, h)
    report: Report = {}
    for name, make in (("one graph", _unrolled), ("by blocks", _by_blocks)):
        with _compiled_everywhere(device):
            before = _graphs(counters)
            start = time.perf_counter()
            step = make(shape, h, device, windows)
            step()
            synchronise(device)
            seconds = time.perf_counter() - start
            report[name] = {
                "first_step_s": seconds,
                "graphs": _graphs(counters) - before,
                "step_ms": 1e3 * _seconds(step, device, times=5),
            }
        del step
        gc.collect()
    whole, blocks = report["one graph"], report["by blocks"]
    if blocks["graphs"] > MOST_GRAPHS:
        bad.append(f"a trial compiles {blocks['graphs']} graphs, more than {MOST_GRAPHS}")
    if on_gpu and blocks["first_step_s"] > COMPILE_RATIO * whole["first_step_s"]:
        ratio = blocks["first_step_s"] / whole["first_step_s"]
        bad.append(f"compiling by blocks takes {ratio:.2f} of the time of one graph")
    if on_gpu and blocks["step_ms"] > STEP_RATIO * whole["step_ms"]:
        bad.append(
            f"a step takes {blocks['step_ms'] / whole['step_ms']:.2f} times as long by blocks"
        )
    return report | {"bad": bad}


def _unrolled(
    shape: Shape, h: Hyperparameters, device: torch.device, windows: NDArray[np.int64]
) -> Callable[[], object]:
    """Return a step of a model that is compiled as one graph with all its blocks."""
    passes = passes_on(device, shape, h)
    model = Transformer(shape, 0, partial(prepared, passes=passes)).to(device)
    optimizer = Optimizer(model, h)
    torch.compiler.reset()
    loss = torch.compile(model.loss, dynamic=False, backend=compiling.BACKEND)
    batch = torch.from_numpy(windows).to(device)

    def step() -> None:
        accumulate(loss, batch, passes, after_pass=optimizer.collect)
        optimizer.step(0.1)

    return step


def _by_blocks(
    shape: Shape, h: Hyperparameters, device: torch.device, windows: NDArray[np.int64]
) -> Callable[[], object]:
    """Return a step as the trainer takes it, compiled before it is called."""
    learner = Learner(_trial(shape, h), device, Ranks())
    learner.prepare()
    return partial(learner.step, windows, 0.1)


@contextmanager
def _compiled_everywhere(device: torch.device) -> Iterator[None]:
    """Have the trainer compile trials of any length; on a CPU without generating machine code."""
    backend = compiling.BACKEND if device.type == "cuda" else "aot_eager"
    with (
        mock.patch.object(compiling, "pays", return_value=True),
        mock.patch.object(compiling, "BACKEND", backend),
    ):
        yield


def reuse(_gpus: int) -> Report:
    """Train ten trials of ten shapes in one process, and check that each of them runs compiled."""
    from torch._dynamo.utils import counters

    device, rows = this_device(), []
    count, width = (10, 64) if device.type == "cuda" else (10, 8)
    bad = []
    for number in range(count):
        shape, h = _model(width=width * (number + 2), depth=2, heads=2, context=64)
        windows = _windows(shape, h)
        with _compiled_everywhere(device):
            before = _graphs(counters)
            step = _by_blocks(shape, h, device, windows)
            first = _seconds(step, device, times=1, warm=False)
            graphs = _graphs(counters) - before
            step_ms = 1e3 * _seconds(step, device, times=10)
        rows.append({"first_s": round(first, 2), "graphs": graphs, "step_ms": round(step_ms, 2)})
        del step
        gc.collect()
    left = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
    if any(row["graphs"] == 0 for row in rows):
        bad.append("a later trial of the process ran in eager mode")
    if any(row["graphs"] > MOST_GRAPHS for row in rows):
        bad.append(f"a trial compiled more than {MOST_GRAPHS} graphs")
    if left > LEFT_BYTES:
        bad.append(f"{left / 1e6:.0f} MB stay allocated after the trials")
    return {"trials": rows, "left_bytes": left, "bad": bad}


def _graphs(counters: Mapping[str, Mapping[str, int]]) -> int:
    return counters["stats"].get("unique_graphs", 0)


def speed(_gpus: int) -> Report:
    """Measure the step at 125M and 350M parameters with AdamW and Muon, beside Hugging Face's."""
    device, bad = this_device(), []
    report: Report = {}
    on_gpu = device.type == "cuda"
    precision: Precision = "bf16" if on_gpu else "fp32"
    peak = matmul_flops(device, precision)
    report["matmul_peak"] = peak
    for shape in gpu_shapes() if on_gpu else [mini_shape(24)]:
        work = steps.Work(shape=shape, sequences=GPU_SEQUENCES if on_gpu else 4, device=device)
        makers: dict[str, Callable[[], steps.Step]] = {
            "adamw": partial(steps.ours, work, "adamw"),
            "muon": partial(steps.ours, work, "muon"),
        }
        if _installed("transformers"):
            makers["hugging_face"] = partial(steps.hugging_face, work)
        row = {}
        for name, make in makers.items():
            torch._dynamo.reset()
            step = make()
            seconds = _seconds(step, device, times=10)
            row[name] = flops_per_token(shape) * work.tokens / seconds / peak
            row[f"{name} tokens/s"] = work.tokens / seconds
            del step
            gc.collect()
        report[f"MFU at width {shape.width}"] = row
        if not on_gpu:
            continue
        if row["adamw"] < LEAST_MFU[shape.width]:
            bad.append(
                f"width {shape.width}: MFU {row['adamw']:.2f} of the measured matmul peak, below "
                f"{LEAST_MFU[shape.width]:.2f}"
            )
        if row["adamw"] > MUON_OVER_ADAMW * row["muon"]:
            bad.append(f"width {shape.width}: Muon takes {row['adamw'] / row['muon']:.2f} times")
    x = torch.randn(24, 256, 256, device=device)
    report["orthogonalise 24 x 256^2, ms"] = 1e3 * _seconds(
        partial(orthogonalised, x), device, times=3
    )
    return report | {"bad": bad}


def matmul_flops(device: torch.device, precision: Precision) -> float:
    """Return the FLOP/s of the best of twenty large matrix products."""
    size = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    torch.mm(a, b)
    best = math.inf
    for _ in range(20):
        best = min(best, _seconds(partial(torch.mm, a, b), device, times=1, warm=False))
    return 2 * size**3 / best


def shared(_gpus: int) -> Report:
    """Measure what small trials gain that share the GPU, without MPS and with it."""
    device, bad = this_device(), []
    on_gpu = device.type == "cuda"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    shape = Shape(
        width=256 if on_gpu else 16,
        depth=4 if on_gpu else 1,
        heads=4 if on_gpu else 1,
        vocabulary=256,
        context=1024 if on_gpu else 64,
        architecture=LLAMA,
    )
    work = steps.Work(shape=shape, sequences=16 if on_gpu else 4, device=device)
    trials, count = (8, 100) if on_gpu else (2, 5)
    report: Report = {"without MPS": sharing(work, trials=trials, steps=count)}
    if on_gpu and shutil.which("nvidia-cuda-mps-control"):
        with mps():
            report["with MPS"] = sharing(work, trials=trials, steps=count)
        if report["with MPS"]["speedup"] < report["without MPS"]["speedup"]:
            bad.append("sharing with MPS gains less than sharing without")
    return report | {"bad": bad}


@contextmanager
def mps() -> Iterator[None]:
    """Run NVIDIA's multi-process service, in a directory of its own, for processes started here."""
    names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
    with tempfile.TemporaryDirectory(prefix="isoflop-mps-") as directory:
        os.environ.update(dict.fromkeys(names, directory))
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(
                ["nvidia-cuda-mps-control"],
                input="quit\n",
                text=True,
                check=False,
                capture_output=True,
                timeout=20,
            )
            for name in names:
                del os.environ[name]


def trial(_gpus: int) -> Report:
    """Train one trial to its row three times, once interrupted and resumed from its checkpoint."""
    device, bad = this_device(), []
    on_gpu = device.type == "cuda"
    shape, h = _model(
        width=128 if on_gpu else 16, depth=4 if on_gpu else 2, heads=2, context=64, sequences=52
    )
    h = dataclasses.replace(h, steps=200 if on_gpu else 6, warmup_steps=2)
    planned = pretraining(shape, h)
    rows = {
        "first": _row(planned, None),
        "second": _row(planned, None),
        "resumed": _row(planned, h.steps // 2),
    }
    losses = {name: math.nan if row.loss is None else row.loss for name, row in rows.items()}
    spread = max(losses.values()) - min(losses.values())
    if not spread <= (REPEAT_NATS if on_gpu else 0.0):
        bad.append(f"repetitions differ by {spread:.2g} nats")
    if rows["resumed"].resumed_from != h.steps // 2:
        bad.append(f"resumed from step {rows['resumed'].resumed_from}, not from {h.steps // 2}")
    if on_gpu and "NVIDIA" not in rows["first"].device:
        bad.append(f"trained on {rows['first'].device}")
    first = rows["first"]
    measured = {"device": first.device, "MFU": first.mfu, "training_s": first.seconds}
    return {"losses": losses, **measured, "bad": bad}


def _row(planned: Trial, interrupted_at: int | None) -> Measurement:
    """Return the row of a trial, whose first attempt ends at a step if one is given."""
    with tempfile.TemporaryDirectory(prefix="isoflop-trial-") as directory:
        every = planned.hyperparameters.steps // 2
        for last in (interrupted_at, None) if interrupted_at else (None,):
            workspace = Scratch(Path(directory), every_steps=every, keeps_models=True)
            for event in Pretrain().train(planned, workspace):
                if isinstance(event, Measurement):
                    return event
                if isinstance(event, Step) and event.step == last:
                    break
    raise RuntimeError("the trial ended without a row")


def sharded(_gpus: int) -> Report:
    """Compare three steps of a model under FSDP2, on one rank, with those of a whole model."""
    import torch.distributed as dist

    device, bad = this_device(), []
    report: Report = {}
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(rank | {"MASTER_PORT": str(_free_port())})
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    from trainers.sharded import ShardedOptimizer, sharded_model

    for recomputed in (False, True):
        torch._dynamo.reset()
        passes = Passes(sequences=4, recomputed=recomputed)
        shape, h = _model(width=128, depth=4, context=64, precision="bf16", sequences=8)
        whole = Transformer(shape, 0, partial(prepared, passes=passes)).to(device)
        model = sharded_model(shape, 0, h, device, Ranks(0, 1), passes)
        windows = torch.from_numpy(_windows(shape, h)).to(device)
        losses = [
            [_step(part, optimizer, windows, passes) for _ in range(3)]
            for part, optimizer in (
                (whole, Optimizer(whole, h)),
                (model, ShardedOptimizer(model, h, Ranks(0, 1))),
            )
        ]
        worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
        report["recomputed" if recomputed else "kept activations"] = worst
        if not worst <= NATS["bf16"]:
            bad.append(f"FSDP2 and one whole model differ by {worst:.1e} nats")
    dist.destroy_process_group()
    return report | {"bad": bad}


def _step(model: Transformer, optimizer: Any, windows: Tensor, passes: Passes) -> float:
    loss = accumulate(model.loss, windows, passes, after_pass=optimizer.collect).item()
    optimizer.step(1.0)
    return loss


def memory(_gpus: int) -> Report:
    """Check the predicted peak, and that a trial survives running out of memory."""
    device, bad = this_device(), []
    if device.type == "cpu":
        return {"skipped": "there is no GPU"}
    shape, h = _model(
        width=512, depth=8, vocabulary=512, context=1024, precision="bf16", sequences=16
    )
    learner, windows = Learner(_trial(shape, h), device, Ranks()), _windows(shape, h)
    torch.cuda.reset_peak_memory_stats()
    learner.step(windows, 0.1).item()
    peak = torch.cuda.max_memory_allocated()
    ratio = training_memory(shape, h, passes=passes_on(device, shape, h)).peak / peak
    if not RECKONED[0] < ratio < RECKONED[1]:
        bad.append(f"the peak is predicted as {ratio:.2f} times what it is")
    del learner
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    loss = math.nan
    try:
        loss = Learner(_trial(shape, h), device, Ranks()).step(windows, 0.1).item()
    except torch.OutOfMemoryError:
        bad.append("a step that runs out of memory is not tried again in smaller micro-batches")
    return {"peak_bytes": peak, "predicted_over_peak": ratio, "loss_in_less": loss, "bad": bad}


def large(_gpus: int) -> Report:
    """Check AdamW and the norm on more than 2^31 elements."""
    device, bad = this_device(), []
    if device.type == "cpu":
        return {"skipped": "there is no GPU"}
    _, h = _model(width=64, depth=1)
    count = (1 << 31) + 4096
    weights, gradients = (torch.ones(count, device=device) for _ in range(2))
    first, second = (torch.zeros(count, device=device) for _ in range(2))
    plain = dataclasses.replace(h, weight_decay=0.0)
    one = torch.ones((), device=device)
    adamw_step(weights, gradients, first, second, one, 0.1, plain)
    norm = gradients.norm().item() / math.sqrt(count)
    ends = [weights[i].item() for i in (0, count // 2, count - 1)]
    if any(abs(weight - 0.9) > 1e-3 for weight in ends):
        bad.append(f"AdamW moved the ends to {ends}, not to 0.9")
    if abs(norm - 1) > 1e-3:
        bad.append(f"the norm is {norm:.4f} of the true one")
    return {"weights": ends, "norm_ratio": norm, "bad": bad}


def gang(gpus: int) -> Report:
    """Compare a gang with one process: the loss of a trial, and the speed of a step."""
    alone, first = _gang(1), _gang(gpus)
    bad = []
    difference = abs(first["loss"] - alone["loss"])
    if not difference <= REPEAT_NATS:
        bad.append(f"a gang of {gpus} ends {difference:.2g} nats from one process")
    efficiency = first["tokens_per_s"] / alone["tokens_per_s"] / gpus
    if this_device().type == "cuda" and efficiency < LEAST_EFFICIENCY:
        bad.append(f"{gpus} GPUs are {efficiency * gpus:.2f} times as fast as one")
    return {"ranks": gpus, "alone": alone, "gang": first, "efficiency": efficiency, "bad": bad}


def _gang(count: int) -> Report:
    """Return what the first rank of a gang reports of a trial, and of the speed of a step.

    Each part has processes of its own, since ranks meet once in the life of theirs.
    """
    return _gang_part(count, GANG_TRIAL) | _gang_part(count, GANG_SPEED)


def _gang_part(count: int, part: str) -> Report:
    """Run the ranks of a gang, each of which sees its own GPU alone, as in a sweep."""
    on_gpu, port = this_device().type == "cuda", _free_port()
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = str(rank)
        command = [sys.executable, "-m", "benchmarks.gpu_stages", part]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        codes = [process.returncode for process in processes]
        raise RuntimeError(f"the ranks of a gang of {count} ended with exit codes {codes}")
    report: Report = json.loads(outputs[0].splitlines()[-1])
    return report


def gang_trial() -> None:
    """Train a small trial as one rank of a gang."""
    on_gpu = this_device().type == "cuda"
    shape, h = _model(width=64, depth=2, sequences=16)
    report: Report = {"loss": None}
    planned = pretraining(shape, dataclasses.replace(h, steps=50 if on_gpu else 4, warmup_steps=2))
    with tempfile.TemporaryDirectory(prefix="isoflop-gang-") as directory:
        for event in Pretrain().train(planned, Scratch(Path(directory))):
            if isinstance(event, Measurement):
                report["loss"] = event.loss
    print(json.dumps(report), flush=True)


def gang_speed() -> None:
    """Time a larger model's step as one rank of a gang."""
    device = this_device()
    on_gpu = device.type == "cuda"
    shape = gpu_shapes()[0] if on_gpu else mini_shape(24)
    large = dataclasses.replace(
        named("llama-adamw").resolve(shape, 1e7),
        batch_tokens=shape.context * (2 * GPU_SEQUENCES if on_gpu else 8),
        precision="bf16" if on_gpu else "fp32",
    )
    with joined(device) as ranks:
        learner, windows = Learner(_trial(shape, large), device, ranks), _windows(shape, large)
        seconds = _seconds(partial(learner.step, windows, 0.1), device, times=10)
    print(json.dumps({"tokens_per_s": large.batch_tokens / seconds}), flush=True)


STAGES: dict[str, Callable[[int], Report]] = {
    "environment": environment,
    "numerics": numerics,
    "compile": compile_,
    "reuse": reuse,
    "speed": speed,
    "sharing": shared,
    "trial": trial,
    "sharded": sharded,
    "memory": memory,
    "large": large,
    "gang": gang,
}


GANG_PARTS = {GANG_TRIAL: gang_trial, GANG_SPEED: gang_speed}


def _model(
    width: int,
    depth: int,
    *,
    recipe: str = "llama-adamw",
    heads: int | None = None,
    vocabulary: int = 256,
    context: int = 64,
    precision: Precision = "fp32",
    sequences: int = 8,
    architecture: Mapping[str, Any] | None = None,
) -> tuple[Shape, Hyperparameters]:
    """Return a shape and a recipe's hyperparameters, with a batch of so many sequences."""
    rules = named(recipe)
    shape = Shape(
        width=width,
        depth=depth,
        heads=heads or max(1, width // 64),
        vocabulary=vocabulary,
        context=context,
        architecture=dataclasses.replace(rules.architecture, **(architecture or {})),
    )
    h = rules.resolve(shape, 1e7)
    return shape, dataclasses.replace(h, batch_tokens=sequences * context, precision=precision)


def _trial(shape: Shape, h: Hyperparameters) -> Trial:
    return pretraining(shape, h)


def _sequences(shape: Shape, h: Hyperparameters) -> int:
    return h.batch_tokens // shape.context


def _windows(shape: Shape, h: Hyperparameters) -> NDArray[np.int64]:
    """Return one batch of random windows, shape (sequences, context + 1)."""
    rng = np.random.default_rng(1)
    size = (_sequences(shape, h), shape.context + 1)
    return rng.integers(0, shape.vocabulary, size, dtype=np.int64)


def _seconds(
    action: Callable[[], object], device: torch.device, *, times: int, warm: bool = True
) -> float:
    """Return the median wall seconds of an action, after a first one if `warm`."""
    if warm:
        action()
    taken = []
    for _ in range(times):
        synchronise(device)
        start = time.perf_counter()
        action()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
