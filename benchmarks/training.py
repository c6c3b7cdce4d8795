"""Training-step speed beside other trainers: `python -m benchmarks.training [--json]`.

All on one thread, interleaved in one run, by CPU time; equal width, depth, context and batch; all
with fused AdamW. Against Hugging Face's LlamaForCausalLM, a plain nanoGPT-style model, and, with
Muon, the same network under `torch.optim.Muon`. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from trainers.corpus import Batches, Corpus
from trainers.flops import flops_per_token
from trainers.optimizer import MOMENTUM, Optimizer
from trainers.recipe import named
from trainers.transformer import Transformer
from trainers.trial import Shape

WIDTHS = (24, 48, 96)
DEPTH, HEADS, CONTEXT, VOCABULARY = 2, 2, 64, 256
SEQUENCES = 8
ROUNDS = 15
SECONDS_A_BLOCK = 0.25

Step = Callable[[], None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peak = matmul_peak()
    cells = [measure(width, peak) for width in arguments.widths]
    if arguments.json:
        print(json.dumps({"device": "cpu, 1 thread", "peak_flops": peak, "cells": cells}, indent=2))
        return
    table = Table(title=f"one thread, fp32 peak {peak / 1e9:.0f} GFLOP/s", title_justify="left")
    for name in cells[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for cell in cells:
        table.add_row(*(f"{value:.4g}" for value in cell.values()))
    Console().print(table)


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


def measure(width: int, peak: float) -> dict[str, float]:
    """One row: our speed and its ratios to the others'."""
    shape = Shape(width=width, depth=DEPTH, heads=HEADS, vocabulary=VOCABULARY, context=CONTEXT)
    seconds = interleaved(
        {
            "ours": ours(shape, "mini-adamw"),
            "ours_muon": ours(shape, "mini"),
            "hf_llama": hugging_face(shape),
            "nanogpt": nanogpt(shape),
            "torch_muon": torch_muon(shape),
        }
    )
    tokens = SEQUENCES * CONTEXT
    flops = flops_per_token(shape) * tokens
    return {
        "width": width,
        "depth": DEPTH,
        "context": CONTEXT,
        "tokens_per_second": tokens / statistics.median(seconds["ours"]),
        "tokens_per_second_muon": tokens / statistics.median(seconds["ours_muon"]),
        "mfu": flops / statistics.median(seconds["ours"]) / peak,
        "mfu_muon": flops / statistics.median(seconds["ours_muon"]) / peak,
        "over_hf_llama": ratio(seconds["hf_llama"], seconds["ours"]),
        "over_nanogpt": ratio(seconds["nanogpt"], seconds["ours"]),
        "over_torch_muon": ratio(seconds["torch_muon"], seconds["ours_muon"]),
        "muon_over_adamw_cost": ratio(seconds["ours_muon"], seconds["ours"]),
    }


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over rounds of the ratio within a round, where both meet the same machine.

    A shared core's speed drifts by a fifth over minutes; over a round of about a second it drifts
    far less.
    """
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def interleaved(steps: dict[str, Step]) -> dict[str, list[float]]:
    """CPU seconds a step of each, for every round, in which all take turns."""
    counts = {}
    for name, step in steps.items():
        for _ in range(5):
            step()
        start = time.process_time()
        for _ in range(10):
            step()
        counts[name] = max(5, round(10 * SECONDS_A_BLOCK / (time.process_time() - start)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(counts[name]):
                step()
            taken[name].append((time.process_time() - start) / counts[name])
    return taken


def batches(shape: Shape) -> Callable[[], Tensor]:
    """Fresh windows of random bytes, as our trainer reads them, for everybody alike."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2_000_000).astype(np.uint8)
    stream = Batches(
        Corpus("random", VOCABULARY, tokens, tokens),
        context=shape.context,
        sequences=SEQUENCES,
        seed=0,
    )
    step = iter(range(10**9))
    return lambda: torch.from_numpy(stream.batch(next(step)))


def ours(shape: Shape, recipe: str) -> Step:
    """The step of `trainers.pretrain`."""
    model, batch = Transformer(shape, seed=0), batches(shape)
    optimizer = Optimizer(model, named(recipe).resolve(shape, 1e7))

    def step() -> None:
        # Torch leaves backward() untyped.
        model.loss(batch()).backward()  # type: ignore[no-untyped-call]
        optimizer.step(0.01)

    return step


def torch_muon(shape: Shape) -> Step:
    """The same network and loss, its matrices under torch.optim.Muon, the rest under AdamW."""
    model, batch = Transformer(shape, seed=0), batches(shape)
    matrices = list(model.blocks.parameters())
    muon = torch.optim.Muon(matrices, lr=1e-4, weight_decay=0.0, momentum=MOMENTUM)
    adamw = torch.optim.AdamW([model.embedding, model.head], lr=1e-4, fused=True, weight_decay=0.0)
    return plain_step(model.loss, model, batch, [muon, adamw])


def nanogpt(shape: Shape) -> Step:
    """A model in nanoGPT's manner: learned positions, GELU, LayerNorm gains, tied head."""
    model, batch = NanoGPT(shape), batches(shape)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return plain_step(model, model, batch, [adamw])


def hugging_face(shape: Shape) -> Step:
    """Transformers' Llama of equal width and depth, feed-forward 8/3 x the width as usual."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.width * 8 // 3,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.context,
            use_cache=False,
        )
    )
    batch = batches(shape)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss(windows: Tensor) -> Any:
        inputs = windows[:, :-1]
        return model(input_ids=inputs, labels=inputs).loss

    return plain_step(loss, model, batch, [adamw])


def plain_step(
    loss: Callable[[Tensor], Any],
    model: nn.Module,
    batch: Callable[[], Tensor],
    optimizers: list[torch.optim.Optimizer],
) -> Step:
    """Forward, backward, clip, step, as everybody writes it."""

    def step() -> None:
        loss(batch()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


@dataclass(eq=False)
class NanoBlock(nn.Module):
    """Attention and feed-forward as separate Linear layers."""

    width: int
    heads: int

    def __post_init__(self) -> None:
        super().__init__()
        d = self.width
        self.norm_1, self.norm_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.attention = nn.Linear(d, 3 * d, bias=False)
        self.projection = nn.Linear(d, d, bias=False)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, context, width) to the same."""
        b, t, d = x.shape
        q, k, v = (
            z.view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for z in self.attention(self.norm_1(x)).split(d, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).contiguous().view(b, t, d))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm_2(x))))
        return x + hidden


class NanoGPT(nn.Module):
    """The usual small GPT."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.tokens = nn.Embedding(shape.vocabulary, d)
        self.positions = nn.Embedding(shape.context, d)
        self.blocks = nn.ModuleList(NanoBlock(d, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(d, bias=False)
        self.head = nn.Linear(d, shape.vocabulary, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy on windows of shape (batch, context + 1)."""
        inputs = windows[:, :-1]
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].reshape(-1))


if __name__ == "__main__":
    main()
