"""The kinds of decoder that the recipes for larger models are for."""

from __future__ import annotations

import dataclasses

from trainers.shape import Architecture

LLAMA = Architecture(
    norm="rms",
    feed_forward="swiglu",
    hidden_ratio=8 / 3,
    hidden_multiple=16,
    rotary_base=10_000.0,
    embedding_std=0.02,
    input_std=0.02,
    output_std=0.02,
    head_std=0.02,
)
"""Llama's (Touvron et al. 2023, arXiv 2302.13971), started as GPT-2's."""
MUP = dataclasses.replace(
    LLAMA,
    embedding_std=0.08,
    input_std=None,
    input_gain=0.08 * 256**0.5,
    output_std=0.0,
    head_std=0.0,
)
"""Llama's parts; matrices start with 0.08 at width 256 and 1/sqrt(width) elsewhere."""
RELU2 = dataclasses.replace(
    LLAMA,
    feed_forward="relu2",
    hidden_ratio=4.0,
    qk_norm=True,
    embedding_std=1.0,
    input_std=None,
    input_gain=1.0,
    output_std=0.0,
    head_std=0.0,
)
"""Squared ReLU (So et al. 2021, arXiv 2109.08668) and normalised queries and keys, for Muon."""
