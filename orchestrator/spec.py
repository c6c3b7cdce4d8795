"""sweep.toml -> SweepSpec: what a person writes, checked, with errors for that person."""

from __future__ import annotations

import difflib
import glob
import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, model_validator

from analysis.errors import InputError
from analysis.text_files import decoded
from orchestrator.spec_command import CommandSpec, Declared
from orchestrator.spec_recipe import RecipeSpec, is_kept, modules_of
from orchestrator.spec_running import (
    NEVER,
    AsPrinted,
    Checkpoints,
    ClusterSpec,
    Limits,
    Strict,
    whole_number,
)
from orchestrator.storage import Storage, split
from trainers.shape import Architecture, Shape
from trainers.simulated import SimulatedSettings
from trainers.sources import CorpusSource, Stdlib, TokenizerSource, with_files

MAX_WIDTH = 65_536
MOST_SPEC_BYTES = 10 << 20
"""Bytes of a sweep file; those that isoflop writes have a few thousand."""
MOST_SIZES = 1000
"""Model sizes of a budget."""
MOST_TRIALS = 100_000
"""Trials of a sweep: a ledger is a file a trial."""
_DEEP_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")
"""A key of so many parts, for which Python's TOML reader takes time in their square."""
RUNNING = ("limits", "checkpoints", "cluster")
"""Tables that say how a sweep runs."""


class Shapes(Strict):
    """The family of models: everything about a shape but its width."""

    depth: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Blocks, at every width; or give `aspect`."""
    aspect: Annotated[float, Field(ge=0.01)] | None = None
    """Width over depth: depth grows with width."""
    heads: Annotated[int, Field(ge=1)] | None = None
    """Attention heads, at every width; or give `head_width`."""
    head_width: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Units a head: heads grow with width."""
    context: Annotated[int, Field(ge=1)] = 64
    """Context length, tokens."""
    width_multiple: Annotated[int, Field(ge=1)] = 4
    """Widths chosen by isoflop are multiples of this."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Shapes:
        if (self.depth is None) == (self.aspect is None):
            raise ValueError("give either depth or aspect")
        if (self.heads is None) == (self.head_width is None):
            raise ValueError("give either heads or head_width")
        return self

    def shape(self, width: int, vocabulary: int, architecture: Architecture) -> Shape:
        """The member of the family of that width."""
        heads = self.heads or max(1, width // (self.head_width or 1))
        return Shape(
            width=width,
            depth=self.depth_at(width),
            heads=heads,
            vocabulary=vocabulary,
            context=self.context,
            architecture=architecture,
        )

    def depth_at(self, width: int) -> int:
        """Blocks of the member of the family of that width."""
        return self.depth or max(1, round(width / (self.aspect or 1)))

    def family(self, vocabulary: int, architecture: Architecture) -> list[Shape]:
        """Every buildable shape, narrowest first."""
        step = self.width_multiple
        pair = self.head_width or 2 * (self.heads or 1)
        return [
            self.shape(width, vocabulary, architecture)
            for width in range(step, MAX_WIDTH + 1, step)
            if width % pair == 0
        ]


class Budget(Strict):
    """One IsoFLOP budget: its FLOPs and the sizes to train at it."""

    flops: Annotated[float, Field(gt=0, allow_inf_nan=False), AsPrinted]
    """Training FLOPs of each trial, exact."""
    widths: Annotated[list[int], Field(min_length=3)] | None = None
    """The sizes, given; else `sizes` of them are chosen over `span` around the prior optimum."""


def _budget(value: Any) -> Any:
    return {"flops": value} if isinstance(value, int | float | str) else value


def _counts(source: Any, where: str) -> Any:
    """A table of a corpus with its counts of tokens as whole numbers, however they are written."""
    if not isinstance(source, dict):
        return source
    counts = {}
    for name in ("tokens", "unique_tokens"):
        if name in source:
            try:
                counts[name] = whole_number(source[name])
            except ValueError as error:
                raise InputError(f"{where}.{name}: {error}") from error
    parts = source.get("parts")
    if isinstance(parts, list):
        counts["parts"] = [_counts(part, f"{where}.parts[{i}]") for i, part in enumerate(parts)]
    return {**source, **counts}


class SweepSpec(Strict):
    """What a sweep asks for. Every key of sweep.toml, with its default."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=80)]
    """Names the plan and its MLflow run; letters, digits, and . _ + -"""
    trainer: Literal["pretrain", "simulated", "command"] = "pretrain"
    """What makes a trial's loss."""
    recipe: RecipeSpec = RecipeSpec(name="mini")
    """Rules from (shape, D) to batch, learning rates and schedule; and the kind of decoder."""
    corpus: Annotated[CorpusSource | Declared, Field(discriminator="kind")] = Stdlib()
    """Where tokens come from; not used by `simulated`."""
    simulated: SimulatedSettings = SimulatedSettings()
    """The law that `simulated` samples."""
    command: CommandSpec | None = None
    """The program that `command` runs."""
    shapes: Shapes = Shapes(depth=2, heads=2)
    """The family of models."""
    budgets: Annotated[list[Annotated[Budget, BeforeValidator(_budget)]], Field(min_length=1)]
    """FLOP budgets: numbers, or tables with `flops` and `widths`."""
    sizes: Annotated[int, Field(ge=3, le=MOST_SIZES)] = 7
    """Model sizes a budget, where `widths` are not given."""
    span: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 16.0
    """Largest over smallest N of a budget."""
    tokens_per_param: Annotated[float, Field(gt=0, allow_inf_nan=False), AsPrinted] = 20.0
    """D/N (N non-embedding) of the prior optimum, the middle of each budget's sizes."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = Field([0])
    """The first trains the grid, the others replicate it."""
    probes: Annotated[int, Field(ge=0)] | None = None
    """Sizes that are also trained at half and double the rate, at the smallest budget, to see that
    the recipe's rates hold; by default 2, or as few as take a tenth of the FLOPs, or none."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Passes over the corpus that a trial may make."""
    deterministic: bool = False
    """Whether GPUs take only kernels that give the same bits again; changes no trial's key."""
    limits: Limits = Limits()
    """What the sweep may spend. Like the two tables below, it changes no trial."""
    checkpoints: Checkpoints = Checkpoints()
    """When trials write their state."""
    cluster: ClusterSpec = ClusterSpec()
    """The machines to plan for."""

    @model_validator(mode="after")
    def _distinct(self) -> SweepSpec:
        lists: list[tuple[str, list[float] | list[int]]] = [
            ("budgets", [b.flops for b in self.budgets]),
            ("seeds", self.seeds),
            *((f"widths at {b.flops:g} FLOPs", b.widths or []) for b in self.budgets),
        ]
        for name, values in lists:
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has the same value twice")
        sizes = sum(len(b.widths) if b.widths else self.sizes for b in self.budgets)
        if sizes * len(self.seeds) > MOST_TRIALS:
            raise ValueError(
                f"asks for {sizes * len(self.seeds):,} trials, all sizes of all budgets for "
                f"{len(self.seeds):,} seeds, and a sweep has at most {MOST_TRIALS:,}: divide it"
            )
        if self.limits.money is not None and self.cluster.price_per_gpu_hour is None:
            raise ValueError("limits.money bounds nothing without cluster.price_per_gpu_hour")
        if self.deterministic and self.trainer != "pretrain":
            raise ValueError(f'deterministic = true does nothing for trainer = "{self.trainer}"')
        if self.trainer == "command" and self.command is None:
            raise ValueError('trainer = "command" needs a table [command] with run = [...]')
        if self.trainer != "command" and self.command is not None:
            raise ValueError(
                f'has a table [command], but trainer = "{self.trainer}": set "command"'
            )
        if self.trainer == "pretrain" and isinstance(self.corpus, Declared):
            raise ValueError('corpus.kind = "declared" is for trainer = "command" only')
        if getattr(self.corpus, "weight", 1.0) != 1.0:
            raise ValueError("corpus.weight means nothing: it is for the parts of a mixture")
        return self

    @model_validator(mode="after")
    def _command_knows_its_trial(self, info: ValidationInfo) -> SweepSpec:
        if self.command is not None and not is_kept(info):
            lacking = self.command.lacks(self.shapes, len(self.seeds))
            if lacking is not None:
                raise ValueError(lacking)
        return self


def read_spec(path: Path) -> SweepSpec:
    """Read and check a sweep file, a local one or at a URI; its paths become absolute.

    Raises
    ------
    InputError
        If the file cannot be read, is no TOML, or holds an unknown key or an impossible value.
    """
    return rooted(spec_as_written(path), path)


def spec_as_written(path: Path) -> SweepSpec:
    """Read and check a sweep file, and leave its corpus's files relative to it."""
    storage, name = split(path)
    try:
        text = decoded(_bytes(storage, name, path), str(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        if _DEEP_KEY.search(text):
            raise RecursionError
        data = tomllib.loads(text)
    except RecursionError:
        raise InputError(
            f"{path} has tables or lists nested more deeply than any sweep: is it a sweep file?"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise InputError(f"{path} has a number of thousands of digits: write 1e18") from error
    return _checked(data, path)


def _bytes(storage: Storage, name: str, path: Path) -> bytes:
    """What is in a sweep file, which is not read if it is far too large to be one."""
    size = (storage.local / name).stat().st_size if storage.local is not None else 0
    if size > MOST_SPEC_BYTES:
        raise InputError(
            f"{path} has {size:,} bytes, and a sweep file at most {MOST_SPEC_BYTES:,}: is it one?"
        )
    return storage.read(name)


def parse_spec(data: Mapping[str, Any], *, source: Path) -> SweepSpec:
    """Check what a sweep file holds. `source` names it in errors and roots what it has of paths."""
    return rooted(_checked(data, source), source)


def rooted(spec: SweepSpec, path: Path) -> SweepSpec:
    """The spec with its paths, which are relative to the sweep file, absolute."""
    directory = path.parent.resolve()
    update: dict[str, Any] = {}
    if not isinstance(spec.corpus, Declared):
        update["corpus"] = with_files(
            spec.corpus,
            pattern=lambda pattern: str(Path(glob.escape(str(directory))) / pattern),
            file=lambda name: str(directory / name),
        )
    if spec.command is not None:
        update["command"] = spec.command.rooted(path.parent)
    return spec.model_copy(update=update)


def _checked(data: Mapping[str, Any], path: Path) -> SweepSpec:
    if "corpus" in data:
        data = {**data, "corpus": _counts(data["corpus"], f"{path.name}: corpus")}
    try:
        with modules_of(path.parent, Path.cwd()):
            return SweepSpec.model_validate_json(json.dumps(data, default=str))
    except RecursionError:
        raise InputError(
            f"{path.name} has tables or lists nested more deeply than any sweep: is it one?"
        ) from None
    except ValidationError as error:
        raise InputError(f"{path.name}: {_sentence(error)}") from error


def with_cluster(spec: SweepSpec, **given: Any) -> SweepSpec:
    """The spec with those keys of its cluster table that are given as options and not None.

    Raises
    ------
    InputError
        If one has an impossible value, by the name of its option.
    """
    told = spec.cluster.model_dump(exclude_unset=True)
    told |= {name: value for name, value in given.items() if value is not None}
    try:
        return spec.model_copy(update={"cluster": ClusterSpec.model_validate(told)})
    except ValidationError as error:
        raise InputError(_of_options(_sentence(error))) from error


def _of_options(sentence: str) -> str:
    """An error of the cluster table, for whom gave its keys as options."""
    sentence = re.sub(r"^has (\w+) = (.+?),", r"\1 is \2,", sentence)
    keys = "|".join(ClusterSpec.model_fields)
    return re.sub(rf"\b({keys})\b", lambda key: "--" + key[0].replace("_", "-"), sentence)


def to_toml(spec: SweepSpec, comment: str) -> str:
    """The spec as a sweep file that `read_spec` reads back, headed by `comment`.

    Keys at their default are left out.
    """
    data = spec.model_dump(exclude_defaults=True, exclude={"budgets", "corpus", "simulated"})
    tables = {name: data.pop(name) for name in ("command", "shapes", *RUNNING) if name in data}
    if spec.trainer == "simulated":
        tables["simulated"] = asdict(spec.simulated)
    else:
        tables["corpus"] = _told(spec.corpus)
    lines = [f"# {line}".rstrip() for line in comment.splitlines()] + [""]
    lines += [f"{key} = {_toml(value)}" for key, value in data.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]"] + [f"{key} = {_toml(value)}" for key, value in table.items()]
    for budget in spec.budgets:
        lines += ["", "[[budgets]]", f"flops = {_toml(budget.flops)}"]
        lines += [f"widths = {budget.widths}"] if budget.widths else []
    return "\n".join(lines) + "\n"


def _told(source: Any) -> dict[str, Any]:
    """What of a source, or of a value in it, is not the default."""
    given = {f.name: getattr(source, f.name) for f in fields(source)}
    return {
        f.name: given[f.name]
        for f in fields(source)
        if f.name == "kind" or (given[f.name] != f.default and given[f.name] != {})
    }


def code_of(spec: SweepSpec) -> tuple[str, ...]:
    """Return which programs and modules of others a run of a sweep executes, a phrase each."""
    phrases = []
    if spec.command is not None:
        directory = _printable(spec.command.directory)
        phrases.append(f"the program {_printable(shlex.join(spec.command.run))} in {directory}")
    if spec.recipe.is_own:
        module = spec.recipe.name.partition(":")[0]
        phrases.append(f"the module {_printable(module)}, which has its recipe")
    return tuple(phrases)


def _printable(text: str) -> str:
    """Return a text of others on one line, without signs that a terminal or TOML acts on."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def recipe_toml(recipe: RecipeSpec) -> str:
    """A recipe as the value of the key `recipe`."""
    return _toml(recipe.model_dump())


def _toml(value: Any) -> str:
    """A TOML value: JSON's numbers are TOML's too; tables are inline."""
    if is_dataclass(value):
        value = _told(value)
    if isinstance(value, Mapping):
        pairs = (f"{_key(name)} = {_toml(item)}" for name, item in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, datetime):
        return value.isoformat()
    if value is None:
        return _string(NEVER)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and value >= 1e6:
        return np.format_float_scientific(value, trim="-", exp_digits=1).replace("e+", "e")
    return json.dumps(value)


def _key(name: str) -> str:
    """A TOML key: bare where that is allowed."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _string(name)


def _string(text: str) -> str:
    """A TOML string: JSON's, but without pairs of surrogates, and with no DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _sentence(error: ValidationError) -> str:
    """One error as one sentence that names the key, the value and what to do."""
    # An unknown key first: it explains a missing one.
    first = min(error.errors(), key=lambda e: e["type"] not in _UNKNOWN_KEY)
    path = [str(part) for part in first["loc"]]
    if path[:1] == ["corpus"]:
        path = _without_tags(path)
    where = re.sub(r"\.(\d+)", r"[\1]", ".".join(path))
    given = first["input"]
    if first["type"] in _UNKNOWN_KEY:
        return f"unknown key {where!r}{_nearest(path)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"the key {where!r} is missing"
    if path[-1:] == ["tokenizer"] and first["type"] != "value_error":
        return (
            f'{where} is {_cut(repr(given))}, but it should be "bytes" or a table such as '
            "{ train = 4096 }"
        )
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{where}.kind must be one of {first['ctx'].get('expected_tags', _KINDS)}"
    if first["type"] == "value_error":
        message = str(first["msg"]).removeprefix("Value error, ")
        return f"{where}{':' if message.startswith(_QUOTES) else ''} {message}".strip()
    if isinstance(given, str) and first["type"] in ("float_type", "int_type"):
        return f"{where} is the string {_cut(repr(given))}: write the number without quotes"
    shown = "" if isinstance(given, dict) else f" is {_cut(repr(given))}"
    # "Input should be ..." or "List should have at least 1 item after validation, not 0"
    _, wanted = str(first["msg"]).split(" ", 1)
    return f"{where}{shown}, but it {wanted.split(' after validation')[0]}"


def _cut(text: str) -> str:
    """The beginning of a long text: a list of thousands of values is no part of a sentence."""
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."


_MOST_SHOWN = 100
_QUOTES = ("'", '"')
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_KINDS = "'stdlib', 'files', 'markov', 'hugging_face', 'mixture', 'declared'"


def _without_tags(path: list[str]) -> list[str]:
    """A place in the corpus without what pydantic puts between a table and its key.

    That is the kind of a source, after `corpus` and after a part's number, and what a tokenizer is.
    """
    kept: list[str] = []
    for before, part in zip(["", *path], path, strict=False):
        of_source = before == "corpus" or (before.isdigit() and kept[-2:-1] == ["parts"])
        if not of_source and before != "tokenizer":
            kept.append(part)
    return kept


def _nearest(path: list[str]) -> str:
    tables: dict[str, list[str]] = {
        "": list(SweepSpec.model_fields),
        "shapes": list(Shapes.model_fields),
        "budgets": list(Budget.model_fields),
        "simulated": list(SimulatedSettings.__dataclass_fields__),
        "command": list(CommandSpec.model_fields),
        "limits": list(Limits.model_fields),
        "checkpoints": list(Checkpoints.model_fields),
        "cluster": list(ClusterSpec.model_fields),
        "corpus": sorted(
            {
                name
                for source in (*CorpusSource.__args__, Declared)
                for name in source.__dataclass_fields__
            }
        ),
        "tokenizer": list(TokenizerSource.__dataclass_fields__),
    }
    table = path[0] if len(path) > 1 else ""
    known = tables.get("tokenizer" if path[-2:-1] == ["tokenizer"] else table, [])
    close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": the keys are {', '.join(known)}"
