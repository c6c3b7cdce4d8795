"""What a person, or a program, sees of a tuning: optima, laws, and the recipe that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from analysis.intervals import Interval
from analysis.tuning import Optimum, PowerLaw
from analysis.wording import count, plural
from orchestrator.spec import recipe_toml
from orchestrator.tables import plain_table, show_table
from orchestrator.tune import Tuned
from orchestrator.tune_laws import TunedModel, TunedRecipe
from trainers.flops import params


def show_tuned(console: Console, found: Tuned, made: TunedRecipe, level: float) -> None:
    """A row a model, a row a law, and the recipe."""
    show_models(console, found.plan.spec.name, made.found, level)
    table = plain_table("law", "at", "value", f"{level:.0%} interval", "exponents", "scatter")
    for name, law in (("rate", made.rate), ("batch", made.batch)):
        if law is not None:
            table.add_row(name, *_law(law))
    show_table(console, "\nLaws through the optima", table)
    console.print()
    for note in found.notes:
        console.print(Text(f"! {note}", style="yellow"))
    text = f"recipe = {recipe_toml(made.recipe)}"
    console.print(Text.assemble(("Recipe  ", "bold"), text), soft_wrap=True)
    console.print(Text.assemble(("Sweep   ", "bold"), str(found.output)))
    console.print(
        f"{plural(len(found.plan.planned), 'probe')}, {found.trained} trained now, "
        f"{found.plan.flops:.3g} FLOPs; no fit takes them"
    )


def show_models(console: Console, name: str, found: Sequence[TunedModel], level: float) -> None:
    """A row a model."""
    table = plain_table(
        *("width", "N", "D", "probes", "best rate", f"{level:.0%}", "over recipe's"),
        *("best batch", f"{level:.0%}", "over recipe's", "L, nats/token"),
    )
    for item in found:
        base = item.model.base.hyperparameters
        table.add_row(
            str(item.model.shape.width),
            count(params(item.model.shape).non_embedding),
            count(item.model.base.tokens),
            str(len(item.losses)),
            *_optimum(item.bowl.rate, base.matrix_rate),
            *_optimum(item.bowl.batch, base.batch_tokens),
            f"{item.bowl.loss:.4f}",
            style="yellow" if item.edges else "",
        )
    show_table(console, f"Best rate and batch of {name}", table)


def _optimum(found: Optimum, recipe: float) -> list[str]:
    value = found.value
    sign = {"interior": "", "below": "≤ ", "above": "≥ "}[found.place]
    ends = f"{value.low:.3g} to {value.high:.3g}"
    return [f"{sign}{value.estimate:.3g}", ends, f"{value.estimate / recipe:.2f}"]


def _law(law: PowerLaw) -> list[str]:
    at = ", ".join(f"{name} = {count(value)}" for name, value in law.centre.items())
    value = law.at_centre
    exponents = ", ".join(_exponent(name, e) for name, e in law.exponents.items())
    ends = f"{value.low:.3g} to {value.high:.3g}"
    return [at, f"{value.estimate:.4g}", ends, exponents, f"{law.scatter:.1%}"]


def _exponent(name: str, found: Interval) -> str:
    if found.low == found.high == found.estimate:
        return f"{name}^{found.estimate:.3f} (held)"
    return f"{name}^{found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})"


def tuned_json(found: Tuned) -> dict[str, Any]:
    """The contract of `isoflop tune --json`."""
    made = found.made
    return {
        "name": found.plan.name,
        "probes": len(found.plan.planned),
        "measured": found.measured,
        "trained": found.trained,
        "flops": found.plan.flops,
        "finished": found.finished,
        "interrupted": found.end.interrupted,
        "models": [_model_json(item) for item in found.found],
        "laws": {
            "rate": _law_json(made.rate if made else None),
            "batch": _law_json(made.batch if made else None),
        },
        "recipe": made.recipe.model_dump(mode="json") if made else None,
        "output": found.output,
        "warnings": list(found.notes),
    }


def _model_json(item: TunedModel) -> dict[str, Any]:
    return {
        "width": item.model.shape.width,
        "params_non_embedding": params(item.model.shape).non_embedding,
        "tokens": item.model.base.tokens,
        "rate": _optimum_json(item.bowl.rate),
        "batch_tokens": _optimum_json(item.bowl.batch),
        "loss": item.bowl.loss,
        "probes": [
            {"rate": 2.0**i, "batch": 2.0**j, "loss": loss if math.isfinite(loss) else None}
            for (i, j), loss in item.losses.items()
        ],
    }


def _optimum_json(found: Optimum) -> dict[str, Any]:
    return {"estimate": found.value.estimate, **_ends(found.value), "place": found.place}


def _ends(value: Interval) -> dict[str, Any]:
    ends = (value.low, value.high)
    return {"interval": [end if math.isfinite(end) else None for end in ends]}


def _law_json(law: PowerLaw | None) -> Mapping[str, Any] | None:
    if law is None:
        return None
    exponents = {n: {"estimate": e.estimate, **_ends(e)} for n, e in law.exponents.items()}
    return {
        "coefficient": math.exp(law.log_coefficient),
        "exponents": exponents,
        "at": dict(law.centre),
        "value": {"estimate": law.at_centre.estimate, **_ends(law.at_centre)},
        "scatter": law.scatter,
    }
