"""What orchestration costs: `python -m benchmarks.orchestration [--json] [--quick]`.

A quarter of an hour on two idle cores. Our sweeps beside plain Ray Tune in one run, each part in a
process of its own with a Ray of its own; nothing computes, so that all that is measured is the
engine. `--quick` takes a tenth of the trials: for seeing that it works, not for the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.connection import prepare

Found = dict[str, Any]

LIMIT_SECONDS = 1200.0
"""For one part."""
GRACE_SECONDS = 20.0
"""For a part that took too long to end its Ray."""
LEFT = 10
"""Observations that a restarted sweep still has to measure."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many trials each part has."""

    few: int = 250
    usual: int = 1000
    many: int = 2000
    with_mlflow: int = 60
    timed: int = 200
    simulated: int = 500
    seeds: int = 8
    """Of the event simulator, for each spread of times."""
    real: float = 1.0
    """Share of the 60 trials on a real cluster."""


QUICK = Sizes(few=50, usual=100, many=200, with_mlflow=8, timed=50, seeds=2, real=0.3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials")
    parser.add_argument("--part", nargs=3, metavar=("FUNCTION", "GIVEN", "INTO"), help="one part")
    arguments = parser.parse_args()
    if arguments.part:
        do_part(*arguments.part)
        return
    with tempfile.TemporaryDirectory(prefix="isoflop-bench-") as directory:
        found = measure(QUICK if arguments.quick else Sizes(), Path(directory))
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def measure(sizes: Sizes, directory: Path) -> Found:
    """Every part, one after the other, as the JSON object."""
    parts = Parts(directory)
    # Before and after ours: a shared machine's speed drifts within minutes.
    bare = [parts.run("tuners.bare", trials=sizes.usual, loggers=True)]
    sparse = [parts.run("tuners.bare", trials=sizes.usual, loggers=False)]
    usual = parts.run("sweeps.full", trials=sizes.usual, seconds=0.0)
    bare.append(parts.run("tuners.bare", trials=sizes.usual, loggers=True))
    sparse.append(parts.run("tuners.bare", trials=sizes.usual, loggers=False))
    few = parts.run("sweeps.full", trials=sizes.few, seconds=0.0)
    many = parts.run("sweeps.full", trials=sizes.many, seconds=0.0)
    restart = parts.run("sweeps.restart", directory=many["directory"], left=LEFT)
    theirs = parts.run("tuners.with_mlflow", trials=sizes.with_mlflow, model=usual["directory"])
    timed = parts.run("sweeps.full", trials=sizes.timed, seconds=2.0)
    bound = parts.run("forecasts.makespans", trials=sizes.simulated, seeds=sizes.seeds)
    forecast = parts.run("forecasts.real", scale=sizes.real)
    ours = per_trial(usual)
    return {
        "seconds_per_trial": ours,
        "ratio_to_bare_tuner": ours / fmean(map(per_trial, bare)),
        "ratio_to_default_tuner_with_mlflow": theirs["seconds_per_trial"] / ours,
        "growth_2000_over_250": per_trial(many) / per_trial(few),
        "driver_mb": many["driver_mb"],
        "utilisation": timed["utilisation"],
        "makespan_over_bound": bound["worst"],
        "forecast_error": forecast["error"],
        "restart_seconds": restart["seconds"],
        "ratio_to_bare_tuner_without_loggers": ours / fmean(map(per_trial, sparse)),
        "differences_from_mlflow": sum(len(p["differences"]) for p in (few, usual, many, timed)),
        "parts": parts.done,
    }


def per_trial(part: Found) -> float:
    """Seconds a trial."""
    return float(part["seconds"] / part["trials"])


class Parts:
    """Runs parts, each in a new process and a directory of its own, and keeps what they found."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.done: list[Found] = []
        """What each part was given and found, and the machine's load before it."""

    def run(self, function: str, **given: Any) -> Found:
        """What `function` of this package found.

        Raises
        ------
        RuntimeError
            If it fails, or takes more than `LIMIT_SECONDS`.
        """
        place = self._directory / str(len(self.done))
        place.mkdir()
        if "makespans" not in function:
            given.setdefault("directory", str(place / "work"))
        into, log = place / "found.json", place / "log.txt"
        load = os.getloadavg()[0]
        command = [sys.executable, "-m", "benchmarks.orchestration", "--part", function]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, json.dumps(given), str(into)],
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            end(process)
        if process.returncode:
            tail = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{function} ended with exit code {process.returncode}: {tail}")
        found = {"part": function, **given, "load_before": load, **json.loads(into.read_text())}
        self.done.append(found)
        return found


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a part; one that takes too long, or that Ctrl-C cuts short, is ended."""
    try:
        process.wait(LIMIT_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if isinstance(error, KeyboardInterrupt):
            raise


def do_part(function: str, given: str, into: str) -> None:
    """In a part's own process: call it, and write what it found."""
    module, name = function.split(".")
    if module != "tuners":  # those are Ray as it comes
        prepare(None)
    told = json.loads(given)
    if "directory" in told:
        Path(told["directory"]).mkdir(exist_ok=True)
    found = getattr(import_module(f"benchmarks.{module}"), name)(**told)
    Path(into).write_text(json.dumps(found))


BOUNDS = {
    "seconds_per_trial": "at most 0.12",
    "ratio_to_bare_tuner": "at most 3",
    "ratio_to_default_tuner_with_mlflow": "at least 8",
    "growth_2000_over_250": "at most 1.3",
    "driver_mb": "under 700",
    "utilisation": "at least 0.97",
    "makespan_over_bound": "at most 1.05",
    "forecast_error": "at most 0.1",
    "restart_seconds": "at most 15",
}
"""What each figure is to reach, on two idle cores."""


def show(found: Found) -> None:
    """Print the figures, and what each part came to."""
    table = Table(title="orchestration", title_justify="left")
    for name in ("figure", "found", "wanted"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, value in found.items():
        if name != "parts":
            table.add_row(name.replace("_", " "), f"{value:.4g}", BOUNDS.get(name, ""))
    console = Console(highlight=False)
    console.print(table)
    for part in found["parts"]:
        told = {
            name: f"{value:.4g}" if isinstance(value, float) else value
            for name, value in part.items()
            if isinstance(value, int | float)
        }
        console.print(f"{part['part']}: " + ", ".join(f"{k} {v}" for k, v in told.items()))


if __name__ == "__main__":
    main()
