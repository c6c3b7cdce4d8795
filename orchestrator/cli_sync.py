"""The verb that makes MLflow equal to the ledger: sync. Thin, as `cli.py` is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from analysis.errors import InputError
from analysis.wording import plural
from orchestrator.options import Json, ProjectPath, Told, TrackingUri, console, print_json

if TYPE_CHECKING:
    from orchestrator.sync import Synced
    from orchestrator.tracking import Store


def add_verbs(app: typer.Typer) -> None:
    """Give the command line its verb."""
    app.command()(sync)


def sync(project: ProjectPath, tracking_uri: TrackingUri = None, as_json: Json = False) -> None:
    """Write to MLflow what the ledger has and it lacks, from nothing if need be.

    Example: `isoflop sync projects/mini --tracking-uri http://127.0.0.1:5000`
    """
    from orchestrator.artifacts import keep_inside
    from orchestrator.lease import hold
    from orchestrator.mirror import NO_STORE
    from orchestrator.project import open_project
    from orchestrator.sync import sync as make_equal
    from orchestrator.tracking import quieten, store_of, trust_the_disk

    opened = open_project(project)
    store = store_of(opened, tracking_uri)
    if store is None:
        raise InputError(NO_STORE)
    quieten()
    trust_the_disk()
    with (
        hold(opened.storage, "isoflop sync"),  # a driver writes MLflow itself
        console(stderr=True).status("asking MLflow") as shown,
    ):
        if store.own and (moved := keep_inside(opened)):
            console(stderr=True).print(moved)
        done = make_equal(
            opened, store, lambda n, missing: shown.update(f"writing run {n} of {missing}")
        )
    if as_json:
        print_json(_json(done, store))
    else:
        _show(done, store)
    if done.differences:
        raise Told(1)


def _json(done: Synced, store: Store) -> dict[str, Any]:
    named = {"refused": list(map(list, done.refused)), "unknown": list(map(list, done.unknown))}
    return {"store": store.shown, **asdict(done), **named}


def _show(done: Synced, store: Store) -> None:
    out, written = console(), plural(done.written, "run")
    out.print(f"{written} written to the experiment {done.experiment} at {store.shown}")
    if done.evaluated:
        out.print(f"{plural(done.evaluated, 'run')} given the scores of their models")
    counted = ((done.half_written, "half-written run"), (done.duplicates, "doubled run"))
    for n, what in counted:
        if n:
            out.print(f"{plural(n, what)} removed")
    if done.unknown:
        unknown = plural(len(done.unknown), "run")
        out.print(f"{unknown} of observations that the ledger lacks, left there")
    for what in done.differences:
        out.print(f"differs: {what}")
