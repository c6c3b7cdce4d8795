"""The verbs for finished models: export, eval. Thin, as `cli.py` is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.errors import InputError
from orchestrator.grouped import grouped
from orchestrator.options import Json, TrackingUri, console, print_json

if TYPE_CHECKING:
    from analysis.observations import ObservationId
    from orchestrator.project import Project
    from trainers.models import KeptModel

INSTALL = "pip install 'isoflop[eval]'"
RESULT = (
    *("task", "task_version", "metric", "filter", "value", "stderr", "higher_is_better"),
    *("num_fewshot", "documents", "limit"),
)
"""Columns of a result that is printed."""

Key = Annotated[str, typer.Argument(metavar="KEY", help="A trial's key, or how it begins.")]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="D", help="Which horizon, where the trial has several."),
]
From = Annotated[
    str | None,
    typer.Option(
        "--project",
        metavar="DIR|URI",
        help="Where the trial is. Default: here, else the only project below projects/.",
    ),
]


def add_verbs(app: typer.Typer) -> None:
    """Give the command line its verbs."""
    app.command()(export)
    app.command("eval")(grouped(evaluate))


def export(
    key: Key,
    directory: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="A new or empty directory.")
    ],
    tokens: Tokens = None,
    project: From = None,
    as_json: Json = False,
) -> None:
    """Write a finished model for Hugging Face's transformers: those of Llama-like recipes.

    Example: `isoflop export 3f2a -o models/ours --project projects/mine`
    """
    from orchestrator.models import choose, fetch, find_project

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is there and not an empty directory: name another with -o")
    opened = find_project(project)
    name = choose(opened, key, tokens)
    kept = fetch(opened, name)
    with_tokenizer = _write(kept, directory)
    files = sorted(path.name for path in directory.iterdir())
    if as_json:
        print_json({**_named(opened, name), "directory": str(directory), "files": files})
        return
    out = console()
    out.print(f"{name[0]} at {name[1]:,} tokens, loss {kept.loss:.4f}, is in {directory}:")
    out.print(f"{', '.join(files)}")
    if not with_tokenizer:
        out.print("no tokenizer: its tokens are bytes, or symbols that are no text")


def _write(kept: KeptModel, directory: Path) -> bool:
    """Write what transformers reads; whether a tokenizer is with it."""
    from trainers.export import require_llama, write_llama, write_tokenizer

    shape = kept.trial.shape
    require_llama(shape)
    tokenizer = kept.tokenizer
    library = None if tokenizer is None or tokenizer.definition is None else tokenizer
    separator = None if library is None else library.separator
    write_llama(shape, kept.model.state_dict(), directory, separator=separator)
    if library is not None:
        write_tokenizer(library, shape.context, directory)
    return library is not None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What a model is asked."""

    tasks: Annotated[
        str, typer.Option("--tasks", metavar="TASK,...", help="Tasks or groups of lm-eval.")
    ]
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", metavar="N", min=0, help="Worked examples. Default: the task's."
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Only the first N questions of a task."),
    ] = None
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path",
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Tasks of your own, lm-eval's YAML.",
        ),
    ] = None

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        found = [part.strip() for part in self.tasks.split(",") if part.strip()]
        if not found:
            raise InputError(
                f"--tasks {self.tasks!r} names no task: write one, or several with commas"
            )
        return found


def evaluate(
    key: Key,
    questions: Questions,
    tokens: Tokens = None,
    project: From = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Have EleutherAI's lm-eval score a finished model, of any recipe; keep it with the project.

    Example: `isoflop eval 3f2a --tasks arc_easy,hellaswag --limit 200 --project projects/mine`
    """
    from orchestrator.models import choose, fetch, find_project

    _require_harness()
    opened = find_project(project)
    name = choose(opened, key, tokens)
    rows = _scored(opened, name, fetch(opened, name), questions)
    trouble = _mirror(opened, name, tracking_uri)
    if as_json:
        results = [{column: _finite(row[column]) for column in RESULT} for row in rows]
        print_json({**_named(opened, name), "results": results, "mlflow": trouble or "written"})
        return
    _show(name, rows)
    if trouble:
        console().print(f"! MLflow lacks it: {trouble}", style="yellow")


def _scored(
    project: Project, name: ObservationId, kept: KeptModel, questions: Questions
) -> list[dict[str, Any]]:
    """Ask the model, and keep what it scored: rows of the project's evaluations."""
    from orchestrator import evaluations
    from trainers import harness
    from trainers.device import device_name, this_device

    device = this_device()
    if kept.tokenizer is None:
        corpus = kept.trial.corpus.name
        raise InputError(f"the corpus of {name[0]}, {corpus}, is no text: no task fits it")
    scores = harness.evaluate(
        harness.HarnessModel(kept.model, kept.tokenizer, device),
        questions.names,
        num_fewshot=questions.num_fewshot,
        limit=questions.limit,
        include_path=questions.include_path,
    )
    rows = evaluations.write(
        project.storage,
        name,
        scores,
        limit=questions.limit,
        harness=f"lm_eval {harness.VERSION}",
        device=device_name(device),
    )
    return list(rows.to_pylist())


def _finite(value: Any) -> Any:
    """For JSON, which has no infinite numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(name: ObservationId, rows: list[dict[str, Any]]) -> None:
    from orchestrator.tables import plain_table, show_table

    table = plain_table("task", "metric", "value", "stderr", "shots", "documents")
    for row in rows:
        filtered = "" if row["filter"] == "none" else f" ({row['filter']})"
        numbers = [row["value"], row["stderr"]]
        table.add_row(
            row["task"],
            row["metric"] + filtered,
            *("–" if number is None else f"{number:.4f}" for number in numbers),
            *("–" if row[n] is None else str(row[n]) for n in ("num_fewshot", "documents")),
        )
    show_table(console(), f"{name[0]} at {name[1]:,} tokens", table)


def _named(project: Project, name: ObservationId) -> dict[str, Any]:
    return {"project": project.uri, "trial": name[0], "tokens": name[1]}


def _require_harness() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise InputError(f"eval needs EleutherAI's lm-eval, which is not installed here: {INSTALL}")


def _mirror(project: Project, name: ObservationId, tracking_uri: str | None) -> str | None:
    """Give the model's run in MLflow its scores; else a sentence that says why it does not."""
    from orchestrator.lease import hold
    from orchestrator.mirror import NO_STORE
    from orchestrator.sync import add_scores
    from orchestrator.tracking import quieten, store_of, trust_the_disk

    try:
        store = store_of(project, tracking_uri)
        if store is None:
            return NO_STORE
        quieten()
        trust_the_disk()
        with hold(project.storage, "isoflop eval"):  # a driver writes MLflow itself
            add_scores(project, store, name)
    except InputError as error:
        return f"{error}; `isoflop sync {project.uri}` writes it"
    return None
