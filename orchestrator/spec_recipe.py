"""The key `recipe` of sweep.toml: a name, or a table with a name and other constants."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from analysis.errors import InputError
from trainers.recipe import Recipe
from trainers.recipes import RECIPES, identity, named, require_effect
from trainers.shape import Architecture, Shape
from trainers.trial import Hyperparameters, RecipeId

KEPT = "kept"
"""Key of the context in which the spec of a plan is read that a project keeps; its value is what
the project remembers of a person's own recipe, or None."""


def is_kept(info: ValidationInfo) -> bool:
    """Return whether a spec is that of a kept plan, which may be older than some rules."""
    return KEPT in (info.context or {})


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a project remembers of a person's own recipe, which reading it never imports."""

    name: str
    architecture: Architecture
    min_steps: Annotated[int, Field(ge=1)]
    schedule: str

    @staticmethod
    def of(name: str, record: Mapping[str, Any]) -> Recorded:
        """Return what `to_record` made a record of; raise pydantic's error if it is none."""
        return TypeAdapter(Recorded).validate_python({**record, "name": name})

    @staticmethod
    def to_record(recipe: RecipeSpec) -> dict[str, Any] | None:
        """JSON-ready; None for one that every isoflop has."""
        if not recipe.is_own:
            return None
        rules = recipe.rules
        made = TypeAdapter(Architecture).dump_python(rules.architecture, mode="json")
        schedule = getattr(rules, "schedule", "cosine")
        return {"architecture": made, "min_steps": rules.min_steps, "schedule": schedule}

    def resolve(self, shape: Shape, tokens: float) -> Hyperparameters:
        """Raise an `InputError` that says how to have its rules."""
        raise InputError(
            f"recipe {self.name!r} is somebody's own, and a project is read without running code: "
            "name the sweep file that has it, with isoflop propose --sweep SWEEP.toml"
        )

    def caution(self, shape: Shape, tokens: float) -> str | None:
        """None: what it says is not known."""
        return None


class RecipeSpec(BaseModel):
    """Which recipe, and those of its constants that are others than it has by itself."""

    model_config = ConfigDict(
        extra="allow", strict=True, frozen=True, ignored_types=(cached_property,)
    )
    name: str
    """One of `trainers.recipes`, or a person's own as `module:Class`."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _makes_sense(self, info: ValidationInfo) -> RecipeSpec:
        if is_kept(info) and self.is_own:
            record = (info.context or {}).get(KEPT)
            if not record:
                raise ValueError(
                    f"is {self.name!r}, of which nothing is on record: run its sweep again, into "
                    "another --project"
                )
            self.__dict__["rules"] = Recorded.of(self.name, record)
            return self
        try:
            self.rules  # noqa: B018 - made now, so that its errors are the spec's
            if not is_kept(info):
                require_effect(self.name, self.model_extra or {})
        except InputError as error:
            raise ValueError(f"is wrong: {error}") from error
        return self

    @property
    def is_own(self) -> bool:
        """Whether it is a person's own code, and not one of isoflop's recipes."""
        return self.name not in RECIPES

    @model_serializer
    def _as_written(self) -> Any:
        constants = self.model_extra
        return {"name": self.name, **constants} if constants else self.name

    @cached_property
    def rules(self) -> Recipe:
        """The recipe with its constants."""
        recipe = named(self.name, self.model_extra)
        try:
            # Stdlib dataclasses take any type, and of 1 and 1.0 keys would not be the same.
            return TypeAdapter(type(recipe)).validate_json(_json(recipe), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            wanted = str(first["msg"]).removeprefix("Input ")
            raise InputError(f"{where} is {first['input']!r}, but it {wanted}") from error

    @cached_property
    def id(self) -> RecipeId:
        """Its name and the hash of its rules."""
        return identity(self.name, self.rules)


def _json(recipe: Recipe) -> bytes:
    return TypeAdapter(dict[str, Any]).dump_json(asdict(recipe))


@contextmanager
def modules_of(*directories: Path) -> Iterator[None]:
    """While a person's own modules in `directories` can be imported, but shadow no others."""
    added = [str(directory) for directory in directories]
    sys.path.extend(added)
    try:
        yield
    finally:
        for directory in added:
            sys.path.remove(directory)
