"""One training step of our trainer and of others, doing the same work; for `benchmarks.training`.

Equal width, depth, context, batch and data, all with fused AdamW except where Muon is compared.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.compiling import compiled
from trainers.corpus import Batches, Corpus
from trainers.device import synchronise
from trainers.head_loss import chunk_loss
from trainers.optimizer import Optimizer
from trainers.passes import accumulate, passes_on, prepared
from trainers.recipes import named
from trainers.shape import Shape
from trainers.transformer import Transformer

Step = Callable[[], None]
Clock = Callable[[], float]

CORPUS_TOKENS = 2_000_000
RATE = 1e-4
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every trainer does in a step."""

    shape: Shape
    sequences: int
    """Of the batch."""
    device: torch.device = CPU
    """A GPU computes in bf16 and what torch.compile makes, a CPU in fp32 and eagerly."""

    @property
    def tokens(self) -> int:
        """Of the batch."""
        return self.sequences * self.shape.context

    @property
    def on_gpu(self) -> bool:
        """Whether it is done on a GPU."""
        return self.device.type == "cuda"


def clock(device: torch.device) -> Clock:
    """CPU seconds of this process, whatever else runs; of a GPU wall time, its queue empty."""
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        synchronise(device)
        return time.perf_counter()

    return wall


def stream(work: Work) -> Batches:
    """Fresh windows of random symbols, as our trainer reads them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, work.shape.vocabulary, CORPUS_TOKENS, dtype=np.uint16)
    corpus = Corpus("random", work.shape.vocabulary, tokens, tokens)
    return Batches(corpus, context=work.shape.context, sequences=work.sequences, seed=0)


def batches(work: Work) -> Callable[[], Tensor]:
    """The next windows, on the device, for everybody alike."""
    windows, step = stream(work), iter(range(10**9))
    return lambda: torch.from_numpy(windows.batch(next(step))).to(work.device)


def ours(work: Work, optimizer_name: Literal["adamw", "muon"]) -> Step:
    """The step of `trainers.pretrain`."""
    h = dataclasses.replace(
        named("mini").resolve(work.shape, 1e7),
        batch_tokens=work.tokens,
        optimizer=optimizer_name,
        precision="bf16" if work.on_gpu else "fp32",
    )
    passes, batch = passes_on(work.device, work.shape, h), batches(work)
    compute, chunk = compiled() if work.on_gpu else (None, chunk_loss)
    placed = partial(prepared, passes=passes, compute=compute)
    model = Transformer(work.shape, 0, placed).to(work.device)
    model.chunk = chunk
    optimizer = Optimizer(model, h)
    total = torch.zeros((), device=work.device)

    def step() -> None:
        nonlocal total
        total += accumulate(model.loss, batch(), passes, work.sequences, optimizer.collect)
        optimizer.step(0.01)

    return step


def torch_muon(work: Work) -> Step:
    """The same network and loss, its matrices under torch.optim.Muon, the rest under AdamW."""
    model = Transformer(work.shape, seed=0).to(work.device)
    matrices = list(model.blocks.parameters())
    tables = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, momentum=0.9)
    adamw = torch.optim.AdamW(tables, lr=RATE, fused=True, weight_decay=0.0)
    return plain_step(model.loss, model, work, [muon, adamw])


def nanogpt(work: Work) -> Step:
    """A model in nanoGPT's manner: learned positions, GELU, LayerNorm gains, tied head."""
    model = NanoGPT(work.shape).to(work.device)
    return plain_step(model, model, work, [_adamw(model)])


def hugging_face(work: Work) -> Step:
    """Transformers' Llama of equal width and depth, feed-forward 8/3 x the width as usual.

    On a GPU compiled, in bf16 by autocast, as it is trained there.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = work.shape
    swiglu = shape.architecture.feed_forward == "swiglu"
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.hidden if swiglu else shape.width * 8 // 3,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.context,
            use_cache=False,
        )
    )
    model = model.to(work.device)
    called: Callable[..., Any] = torch.compile(model) if work.on_gpu else model

    def loss(windows: Tensor) -> Any:
        inputs = windows[:, :-1]
        with torch.autocast("cuda", torch.bfloat16) if work.on_gpu else nullcontext():
            return called(input_ids=inputs, labels=inputs).loss

    return plain_step(loss, model, work, [_adamw(model)])


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)


def plain_step(
    loss: Callable[[Tensor], Any],
    model: nn.Module,
    work: Work,
    optimizers: list[torch.optim.Optimizer],
) -> Step:
    """Forward, backward, clip, step, as everybody writes it."""
    batch = batches(work)

    def step() -> None:
        loss(batch()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def interleaved(
    steps: dict[str, Step], now: Clock, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds a step of each, for every round, in which each takes a turn of so many seconds."""
    counts = {}
    for name, step in steps.items():
        for _ in range(5):
            step()
        start = now()
        for _ in range(5):
            step()
        counts[name] = max(3, round(5 * seconds / (now() - start)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = now()
            for _ in range(counts[name]):
                step()
            taken[name].append((now() - start) / counts[name])
    return taken


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over rounds of the ratio within a round, where both meet the same machine.

    A shared core's speed drifts by a fifth over minutes; over a round of about a second it drifts
    far less.
    """
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


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
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.tokens(inputs) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].reshape(-1))
