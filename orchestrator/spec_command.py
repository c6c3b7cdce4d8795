"""The table [command] of sweep.toml, and the corpus that only its program reads."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from analysis.errors import InputError
from orchestrator.masking import names_secret
from orchestrator.spec_recipe import is_kept
from orchestrator.spec_running import NEVER, Strict
from trainers.template import PLACEHOLDERS, Command, expand, file_hash, names_in

if TYPE_CHECKING:
    from orchestrator.spec import Shapes

_BETWEEN = re.compile(r"[\s=:,;&|<>()\"'`]+")
"""What stands between names within a word, for programs and shells."""
_MODULE = re.compile(r"-[A-Za-z]*m|--module")
"""The option of Python's, and of torchrun's, after which a module is named."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_FILE_BYTES = 16 << 20
"""Of a program's file: what is larger is data, which is the corpus."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A corpus that only the command's program knows how to read. Its hash is that of this."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - a class attribute for sweep.toml
    kind: Literal["declared"] = "declared"
    name: str
    version: str
    """Yours to change when training or held-out text changes: nothing else tells."""
    vocabulary: int
    """Symbols."""
    tokens: int
    """Training tokens of one pass."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"has {name} = {getattr(self, name)}, but it should be at least 2")

    @property
    def hash(self) -> str:
        """Of the declaration."""
        text = repr(sorted(asdict(self).items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _words(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return shlex.split(value)
    except ValueError as error:
        raise ValueError(f"is {value!r}, which does not split into words: {error}") from error


def _or_never(value: Any) -> Any:
    return None if value == NEVER else value


class CommandSpec(Strict):
    """The user's own training program."""

    run: Annotated[list[str], Field(min_length=1), BeforeValidator(_words)]
    """Program and arguments: a list, or one string, which no shell sees. {width} and others stand
    for what a trial has."""
    files: list[str] = Field([])
    """The program's own files, by glob, relative to the directory: their content is in the key."""
    env: dict[str, str] = Field({})
    """Variables for its environment, in the key too."""
    env_from: list[str] = Field([])
    """Names of variables that it takes from the environment of the machine where it runs, such as
    tokens. Their values are in no file of the project, and in no key."""
    directory: str = "."
    """Where it runs, relative to the sweep's file."""
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """GPUs that a trial takes, a share of one or several; 0 is one core."""
    timeout_seconds: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, BeforeValidator(_or_never)
    ] = None
    """That an attempt may take; "never" for any time."""

    @field_validator("run")
    @classmethod
    def _known_in_run(cls, words: list[str]) -> list[str]:
        return [_checked(word) for word in words]

    @field_validator("env")
    @classmethod
    def _known_in_env(cls, env: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        secret = [name for name in env if names_secret(name)]
        if secret and not is_kept(info):
            raise ValueError(
                f"sets {secret[0]}, whose name is that of a secret, which would be kept in plans, "
                f'next.toml and files of Ray: write env_from = ["{secret[0]}"] in its place, and '
                "set the variable on the machines where trials run"
            )
        return {name: _checked(value) for name, value in env.items()}

    @field_validator("env_from")
    @classmethod
    def _names_in_env_from(cls, names: list[str]) -> list[str]:
        for name in names:
            if not _VARIABLE.fullmatch(name):
                raise ValueError("holds a name that no variable can have: give names, not values")
        return names

    @model_validator(mode="after")
    def _from_one_place(self) -> CommandSpec:
        twice = sorted(self.env.keys() & set(self.env_from))
        if twice:
            raise ValueError(f"has {twice[0]} in env and in env_from: leave it out of one of them")
        return self

    @property
    def told(self) -> frozenset[str]:
        """Names of the placeholders that the program is given."""
        words = (*self.run, *self.env.values())
        return frozenset(name for word in words for name in names_in(word))

    def lacks(self, shapes: Shapes, seeds: int) -> str | None:
        """Return which placeholder is missing whose value must reach the program, as a sentence.

        None where there is none. `seeds` is how many of them each trial is trained with.
        """
        sizes = {"width"}
        sizes |= {"depth"} if shapes.aspect is not None else set()
        sizes |= {"heads"} if shapes.head_width is not None else set()
        wanted = [
            (sizes, "all sizes would train one and the same model", '"--n_embd={width}"'),
            ({"steps", "tokens"}, "all trials would train equally long", '"--max_iters={steps}"'),
        ]
        if seeds > 1:
            same = f"the {seeds} seeds would train one and the same run"
            wanted.append(({"seed"}, same, '"--seed={seed}", or one seed'))
        for names, consequence, example in wanted:
            if not names & self.told:
                listed = " nor ".join(f"{{{name}}}" for name in sorted(names, reverse=True))
                return (
                    f"command.run and command.env have {'neither' if len(names) > 1 else 'no'} "
                    f"{listed}, so that {consequence}: give it, as in {example}"
                )
        return None

    def rooted(self, directory: Path) -> CommandSpec:
        """With an absolute directory; `directory` is that of the sweep's file."""
        return self.model_copy(update={"directory": str((directory / self.directory).resolve())})

    def paths(self) -> dict[str, Path]:
        """The program's files, by name relative to the directory.

        Raises
        ------
        InputError
            If there is no such directory, or a glob matches nothing or is absolute.
        """
        root = Path(self.directory)
        if not root.is_dir():
            raise InputError(f"command.directory is {root}, and there is no such directory")
        found: set[str] = set()
        for pattern in self.files:
            if Path(pattern).is_absolute():
                raise InputError(
                    f"command.files has {pattern!r}: name files relative to {root}, so that keys "
                    "are the same on every machine"
                )
            names = glob.glob(pattern, root_dir=root, recursive=True)
            names = [Path(name).as_posix() for name in names if (root / name).is_file()]
            if not names:
                raise InputError(f"no file matches {pattern!r} of command.files in {root}")
            found.update(names)
        return {name: root / name for name in sorted(found)}

    def command(self) -> Command:
        """What a trial carries: the files by their hashes.

        Raises
        ------
        InputError
            If a file is missing or large, or one that `run` or `env` names is not among `files`.
        """
        paths = self.paths()
        self._require_listed(paths)
        for name, path in paths.items():
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InputError(
                    f"command.files has {name} of {path.stat().st_size:,} bytes, more than "
                    f"{MAX_FILE_BYTES:,}: it is for programs; data is the corpus"
                )
        return Command(
            run=tuple(self.run),
            files=tuple((name, file_hash(path)) for name, path in paths.items()),
            env=tuple(sorted(self.env.items())),
            env_from=tuple(sorted(set(self.env_from))),
            directory=self.directory,
            gpus=self.gpus,
            timeout_seconds=self.timeout_seconds,
        )

    def _require_listed(self, paths: dict[str, Path]) -> None:
        """Refuse a file of the program's own that is named, so that it decides, and not listed."""
        told = [("run", self.run), *(("env", [value]) for value in self.env.values())]
        for key, words in told:
            for name, path in named_files(words, Path(self.directory)).items():
                if name not in paths and path.stat().st_size <= MAX_FILE_BYTES:
                    raise InputError(
                        f"command.{key} names the file {name}, whose content should decide the "
                        "trials' keys: add it, and what it imports, to command.files = "
                        f'["{name}", ...], or write it to {{directory}} if it is an output'
                    )


def named_files(words: Sequence[str], root: Path) -> dict[str, Path]:
    """Files of a directory that a command names, by their names relative to it.

    They may be named by a path, also an absolute one, after `=` as in `--config=x.yaml`, within
    what a shell is to do, and as a module after `-m`.
    """
    parts = [part for word in words for part in _BETWEEN.split(word) if part]
    modules = [
        name.replace(".", "/") + end
        for option, name in itertools.pairwise(parts)
        if _MODULE.fullmatch(option)
        for end in (".py", "/__main__.py")
    ]
    values = [word.partition("=")[2] for word in words]
    found: dict[str, Path] = {}
    for part in [*words, *values, *parts, *modules]:
        path = Path(os.path.normpath(root / part))
        if part and os.path.isfile(path):  # unlike Path's own, false where a name is too long
            name = _below(path, root)
            if name is not None or not Path(part).is_absolute():
                found[name or Path(os.path.relpath(path, root)).as_posix()] = path
    return found


def _below(path: Path, root: Path) -> str | None:
    """A path relative to a directory, itself or by what links lead to; None where it is outside."""
    for at, top in ((path, root), (path.resolve(), root.resolve())):
        if at.is_relative_to(top):
            return at.relative_to(top).as_posix()
    return None


def _checked(text: str) -> str:
    try:
        expand(text, dict.fromkeys(PLACEHOLDERS, ""))
    except InputError as error:
        raise ValueError(f"is wrong: {error}") from error
    return text
