"""Trains a small GPT on the bytes of a text file. One file, plain PyTorch, one process.

    python train_gpt.py --data=input.txt --out_dir=out --max_iters=500

It prints its losses, saves out/ckpt.pt every eval_interval, and goes on from there with --resume.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, bias=False)
        self.attn = CausalSelfAttention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd, bias=False)
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd, bias=False)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, mean=0.0, std=scale)

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="input.txt")
    parser.add_argument("--out_dir", default="out")
    parser.add_argument("--resume", action="store_true")
    for name, default in [
        ("n_layer", 2), ("n_head", 2), ("n_embd", 32), ("block_size", 64), ("batch_size", 8),
        ("max_iters", 500), ("warmup_iters", 20), ("eval_interval", 250), ("eval_iters", 8),
        ("log_interval", 20), ("seed", 0),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in [
        ("learning_rate", 1e-3), ("min_lr", 1e-4), ("weight_decay", 0.0), ("beta1", 0.9),
        ("beta2", 0.99), ("grad_clip", 1.0),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=default)
    return parser.parse_args()


def get_lr(it, args):
    if it < args.warmup_iters:
        return args.learning_rate * (it + 1) / (args.warmup_iters + 1)
    ratio = (it - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (args.learning_rate - args.min_lr)


def get_batch(data, size, seed, args):
    generator = torch.Generator().manual_seed(seed)
    ix = torch.randint(len(data) - args.block_size, (size,), generator=generator)
    x = torch.stack([data[i : i + args.block_size + 1] for i in ix]).long()
    return x[:, :-1], x[:, 1:]


@torch.no_grad()
def estimate_loss(model, splits, args):
    """Mean loss on the same eval_iters batches of 64 windows of each split every time."""
    return {
        split: torch.stack(
            [model(*get_batch(data, 64, k, args)) for k in range(args.eval_iters)]
        ).mean().item()
        for split, data in splits.items()
    }  # fmt: skip


def main():
    args = get_args()
    torch.manual_seed(args.seed)
    text = torch.frombuffer(bytearray(Path(args.data).read_bytes()), dtype=torch.uint8)
    n = int(0.9 * len(text))
    splits = {"train": text[:n], "val": text[n:]}
    model = GPT(256, args.block_size, args.n_layer, args.n_head, args.n_embd)
    total = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.h.parameters())
    print(f"number of parameters: {total}, of which in blocks: {blocks}")
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(args.beta1, args.beta2), weight_decay=args.weight_decay
    )
    checkpoint, first = Path(args.out_dir, "ckpt.pt"), 0
    if args.resume:
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["iter_num"]
        print(f"resuming at iter {first}")

    def evaluate_and_save(done):
        losses = estimate_loss(model, splits, args)
        print(f"step {done}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "iter_num": done}, checkpoint)
        print(f"saved {checkpoint} at iter {done}")

    for it in range(first, args.max_iters):
        t0 = time.time()
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it, args)
        seed = (args.seed + 1) * 1_000_003 + it  # the same after a resume
        loss = model(*get_batch(splits["train"], args.batch_size, seed, args))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = it + 1
        if done % args.log_interval == 0:
            dt = 1000 * (time.time() - t0)
            print(f"iter {done}: loss {loss.item():.4f}, time {dt:.2f}ms")
        if done % args.eval_interval == 0 and done < args.max_iters:
            evaluate_and_save(done)
    evaluate_and_save(args.max_iters)  # also if resumed at its end


if __name__ == "__main__":
    main()
