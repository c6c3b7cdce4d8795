"""What kind of model: architectures and shapes of decoder-only transformers. Values only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from analysis.errors import InputError

_AT_LEAST_1 = ("at least 1", lambda value: value >= 1)
_ABOVE_0 = ("finite and above 0", lambda value: value > 0)
_NOT_BELOW_0 = ("finite and at least 0", lambda value: value >= 0)
_BOUNDS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "hidden_ratio": _ABOVE_0,
    "hidden_multiple": _AT_LEAST_1,
    "rotary_base": ("finite and above 1", lambda value: value > 1),
    "queries_per_key": _AT_LEAST_1,
    "embedding_std": _ABOVE_0,
    "input_std": _ABOVE_0,
    "input_gain": _ABOVE_0,
    "output_std": _NOT_BELOW_0,
    "head_std": _NOT_BELOW_0,
}
"""Of the numbers of an architecture. Zeros everywhere on the way in would pass on no gradient."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What kind of decoder: its parts and how it starts. A recipe decides; `mini`'s by default.

    Always pre-norm, without biases, norms without gains, rotary embeddings.
    """

    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm, which does not subtract the mean."""
    feed_forward: Literal["relu", "relu2", "swiglu"] = "relu"
    """ReLU, its square, or SiLU gated by a second up-projection."""
    hidden_ratio: float = 4.0
    """Hidden units of the feed-forward layer over the width."""
    hidden_multiple: int = 1
    """Hidden units are the nearest multiple of this."""
    rotary_base: float = 1000.0
    """Longest wavelength of the rotary embeddings, tokens over 2 pi."""
    qk_norm: bool = False
    """Whether queries and keys are normalised by RMSNorm, a head each, before they are turned."""
    queries_per_key: int = 1
    """Heads whose queries share one head of keys and values (grouped-query attention)."""
    tied: bool = False
    """Whether the output head is the embedding."""
    embedding_std: float = 0.5
    """Standard deviation at the start, as are the next ones."""
    input_std: float | None = None
    """Of the matrices that read the residual stream; None is `input_gain` / sqrt(width)."""
    input_gain: float = 0.7
    output_std: float = 0.0
    """Of those that write to it, x 1 / sqrt(2 depth), since 2 depth of them add up."""
    head_std: float = 0.0
    """Of an untied head."""

    def __post_init__(self) -> None:
        for name, (wanted, holds) in _BOUNDS.items():
            value = getattr(self, name)
            # Values of other types are refused where sweep files are read.
            number = isinstance(value, int | float)
            if number and not (math.isfinite(value) and holds(value)):
                raise InputError(f"{name} is {value:g}, but it should be {wanted}")


DIMENSIONS = ("width", "depth", "heads", "vocabulary", "context")
"""Numbers of a shape that a row has, and a program can be told."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Width, depth, heads, vocabulary and context length of one decoder-only transformer."""

    width: int
    """d_model, units; a multiple of twice `heads`, since rotary embeddings turn pairs."""
    depth: int
    """Transformer blocks."""
    heads: int
    """Attention heads."""
    vocabulary: int
    """Symbols."""
    context: int
    """Context length, tokens."""
    architecture: Architecture = Architecture()
    """What kind of decoder."""

    def __post_init__(self) -> None:
        for name in DIMENSIONS:
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise InputError(f"a shape's {name} is {value}; it must be at least 1")
        if self.width % (2 * self.heads):
            raise InputError(
                f"width {self.width} is no multiple of {2 * self.heads} (2 x {self.heads} heads): "
                "choose another width or number of heads"
            )
        if self.heads % self.architecture.queries_per_key:
            raise InputError(
                f"{self.heads} heads are no multiple of the {self.architecture.queries_per_key} "
                "that share keys and values: choose another number of heads or queries_per_key"
            )

    @property
    def head_width(self) -> int:
        """Units of a head."""
        return self.width // self.heads

    @property
    def key_width(self) -> int:
        """Units of all keys of a token, and of all its values."""
        return self.width // self.architecture.queries_per_key

    @property
    def hidden(self) -> int:
        """Hidden units of the feed-forward layer."""
        multiple = self.architecture.hidden_multiple
        return max(1, round(self.architecture.hidden_ratio * self.width / multiple)) * multiple


def shape_from_dict(data: dict[str, Any]) -> Shape:
    """Inverse of `dataclasses.asdict` for a shape."""
    return Shape(**{**data, "architecture": Architecture(**data["architecture"])})
