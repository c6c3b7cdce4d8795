"""A finished model as a file: its weights as they were measured, and what they are of.

In safetensors, which every tool reads. The metadata have the whole trial and the tokenizer, so that
the model is used from the file alone: the corpus may have changed, or be gone.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.errors import InputError
from trainers.tokenizer import Tokenizer
from trainers.transformer import Transformer
from trainers.trial import Trial


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """A model, and the observation that it was measured for."""

    trial: Trial
    tokens: int
    """The horizon at which it was measured."""
    loss: float
    """Its held-out loss there, nats/token."""
    tokenizer: Tokenizer | None
    """With which it was trained; None for symbols that are no text."""
    model: Transformer
    """Its weights in the precision in which they were measured."""


def write_model(
    path: Path,
    *,
    trial: Trial,
    tokens: int,
    loss: float,
    tokenizer: Tokenizer | None,
    weights: Mapping[str, Tensor],
) -> None:
    """Write `weights`, by the names of `Transformer`, and what they are of.

    Raises
    ------
    OSError
        If the file system does not take it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    told = {
        "format": "pt",
        "key": trial.key,
        "tokens": str(tokens),
        "loss": repr(loss),
        "trial": json.dumps(trial.to_dict()),
        "tokenizer": json.dumps(_packed(tokenizer)),
    }
    try:
        save_file(dict(weights), path, metadata=told)
    except SafetensorError as error:  # also what the file system says
        raise OSError(str(error)) from error


def read_model(path: Path, place: str) -> KeptModel:
    """The model of a file that people call `place`, on the CPU.

    Raises
    ------
    InputError
        If the file is damaged, or not of a model of this version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        trial = Trial.from_dict(json.loads(told["trial"]))
        model = Transformer(trial.shape, trial.seed).requires_grad_(False)
        model.load_state_dict(weights, assign=True)
        tokens, loss = int(told["tokens"]), float(told["loss"])
        tokenizer = _unpacked(json.loads(told["tokenizer"]))
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise InputError(
            f"{place} is damaged, or no model of this version "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}): train it again"
        ) from error
    return KeptModel(trial=trial, tokens=tokens, loss=loss, tokenizer=tokenizer, model=model.eval())


def _packed(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """For metadata, of which safetensors takes 100 MB: a vocabulary of a million may be as long."""
    if tokenizer is None:
        return None
    text = tokenizer.definition
    short = None if text is None else base64.b64encode(zlib.compress(text.encode())).decode()
    return {**asdict(tokenizer), "definition": short}


def _unpacked(told: dict[str, Any] | None) -> Tokenizer | None:
    if told is None:
        return None
    short = told["definition"]
    text = None if short is None else zlib.decompress(base64.b64decode(short)).decode()
    return Tokenizer(**{**told, "definition": text})
