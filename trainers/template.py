"""Somebody else's training program, as a value: its command with placeholders, its files by hash.

Starts nothing; `trainers.command` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from analysis.errors import InputError

_NOT_IN_KEY = {"key": False}

PLACEHOLDERS: Mapping[str, str] = {
    "width": "d_model, units",
    "depth": "blocks",
    "heads": "attention heads",
    "context": "context length, tokens",
    "vocabulary": "symbols",
    "tokens": "the horizon D: training tokens",
    "steps": "optimiser steps, tokens / batch_tokens",
    "batch_tokens": "tokens a step",
    "sequences": "sequences a step, batch_tokens / context",
    "learning_rate": "the recipe's peak rate of the block matrices",
    "final_learning_rate": "the rate at the horizon",
    "warmup_steps": "steps of linear warm-up",
    "beta1": "AdamW's",
    "beta2": "AdamW's",
    "weight_decay": "AdamW's, decoupled",
    "clip": "bound on the global gradient norm",
    "seed": "the trial's",
    "checkpoint": "directory for the program's checkpoints: kept between attempts",
    "directory": "scratch directory, empty at the start of each attempt",
    "result": "file that may take the JSON lines, instead of standard output",
    "python": "the Python that isoflop runs in",
}
"""What a command may name in braces, and what stands for it."""

GRANTED = "ISOFLOP_GPUS"
"""Environment variable with the number of GPUs that this process was given, or the share of one.
Workers set it; elsewhere, as in a notebook, it is not set."""
NODE_GPUS = "ISOFLOP_NODE_GPUS"
"""The variable that says to a rank which GPUs its node's ranks have, in their order; as
CUDA_VISIBLE_DEVICES (of AMD's: HIP_VISIBLE_DEVICES) does to a program under torchrun, where
LOCAL_RANK chooses among them."""
RANK_ADDRESSES = "ISOFLOP_RANK_ADDRESSES"
"""The variable that says to a rank the address of each rank's node, in the order of ranks."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A training program. What decides its result enters the trial's key."""

    run: tuple[str, ...]
    """Program and arguments, with placeholders. No shell sees them."""
    files: tuple[tuple[str, str], ...] = ()
    """The program's own files: names relative to the directory, and the hashes of their content."""
    env: tuple[tuple[str, str], ...] = ()
    """Variables of its environment, in addition to the worker's, with placeholders."""
    env_from: tuple[str, ...] = field(default=(), metadata=_NOT_IN_KEY)
    """Names of variables that the worker's environment must have; their values are masked in what
    the program prints, and are nowhere in a trial."""
    directory: str = field(default=".", metadata=_NOT_IN_KEY)
    """Where it runs and where its files are, on every machine."""
    gpus: float = field(default=0.0, metadata=_NOT_IN_KEY)
    """GPUs that a trial takes, a share of one or several; 0 is one core."""
    timeout_seconds: float | None = field(default=None, metadata=_NOT_IN_KEY)
    """That an attempt may take; None is any time."""

    @property
    def hash(self) -> str:
        """Of what decides the result: losses of different commands do not mix."""
        text = json.dumps([self.run, self.files, self.env])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Command:
        """Inverse of `dataclasses.asdict`, also after a round trip through JSON."""
        return Command(
            **{
                **data,
                "run": tuple(data["run"]),
                "files": tuple((name, hashed) for name, hashed in data["files"]),
                "env": tuple((name, value) for name, value in data["env"]),
                "env_from": tuple(data.get("env_from", ())),  # older plans have none
            }
        )


def file_hash(path: Path) -> str:
    """Hash of a program's file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def names_in(text: str) -> set[str]:
    """Return the names of the placeholders of a text that `expand` takes.

    Examples
    --------
    >>> sorted(names_in("--n_embd={width} --seed={seed} {{depth}}"))
    ['seed', 'width']
    """
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def expand(text: str, values: Mapping[str, str]) -> str:
    """`text` with the placeholders' values; doubled braces are braces.

    Raises
    ------
    InputError
        If a placeholder has no value, or a brace stands alone.

    Examples
    --------
    >>> expand("--n_embd={width} {{literally}}", {"width": "64"})
    '--n_embd=64 {literally}'
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise InputError(f"{text!r} has a brace without its partner: double it, {{{{") from error
    expanded = ""
    for literal, name, spec, conversion in parts:
        expanded += literal
        if name is None:
            continue
        if name not in values or spec or conversion:
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise InputError(
                f"{text!r} has the placeholder {{{written}}}; there are {', '.join(values)}, and "
                "{{ stands for a brace"
            )
        expanded += values[name]
    return expanded
