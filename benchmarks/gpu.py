"""Validates and times every path that one GPU takes: `python -m benchmarks.gpu [--json]`.

Each stage is a process with a time limit. It prints one JSON line whose `bad` lists what is wrong;
a table ends the run, which takes eight minutes at most. With `--gpus 2` a gang of two is compared
with one GPU as well. Without a GPU the same stages run at toy sizes on the CPU in two minutes, so
that the benchmark is known to work before a GPU's time is spent. The exit code is 1 if anything is
wrong. The extra `bench` adds Hugging Face's Llama for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LIMIT_SECONDS = 470.0
"""Time limit of the whole run, ten seconds below what the eight minutes allow."""
LEAST_SECONDS = 15.0
"""A stage is not started if less time is left: importing torch takes a part of it."""
ERROR_CHARACTERS = 1500


@dataclass(frozen=True)
class Stage:
    """One part of the benchmark, which runs in a process of its own."""

    name: str
    seconds: float
    """Time limit of the stage, in seconds."""


STAGES = (
    Stage("environment", 30),
    Stage("numerics", 75),
    Stage("compile", 100),
    Stage("reuse", 60),
    Stage("speed", 90),
    Stage("sharing", 75),
    Stage("trial", 60),
    Stage("sharded", 45),
    Stage("memory", 30),
    Stage("large", 30),
)
"""The stages in order of importance, since the last ones are skipped when time runs out."""
GANG = Stage("gang", 90)


def main() -> None:
    """Run the stages and print their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the JSON lines, and no table")
    parser.add_argument("--output", type=Path, help="also write the JSON lines to this file")
    parser.add_argument("--gpus", type=int, default=1, help="compare a gang of so many with one")
    names = [stage.name for stage in (*STAGES, GANG)]
    parser.add_argument("--stages", nargs="+", choices=names, help="run only these stages")
    arguments = parser.parse_args()
    chosen = [*STAGES, *([GANG] if arguments.gpus > 1 else [])]
    if arguments.stages:
        chosen = [stage for stage in (*STAGES, GANG) if stage.name in arguments.stages]
    reports = []
    for report in run(chosen, gpus=max(2, arguments.gpus)):
        reports.append(report)
        line = json.dumps(report)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if arguments.json:
            print(line, flush=True)
        else:
            print(f"{report['stage']}: {report['seconds']} s", file=sys.stderr, flush=True)
    if not arguments.json:
        Console().print(table(reports))
    sys.exit(any(report["bad"] for report in reports))


def run(
    stages: Sequence[Stage], *, gpus: int = 2, limit: float = LIMIT_SECONDS
) -> Iterator[dict[str, Any]]:
    """Yield the report of each stage: its name, seconds, `bad`, and what it measured."""
    end = time.monotonic() + limit
    for stage in stages:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            missed = f"not started, since the limit of {limit:.0f} s was nearly reached"
            yield {"stage": stage.name, "seconds": 0.0, "bad": [missed]}
            continue
        start = time.monotonic()
        report = _report(stage, min(stage.seconds, left), gpus)
        seconds = round(time.monotonic() - start, 1)
        yield {"stage": stage.name, "seconds": seconds, "bad": [], **report}


def _report(stage: Stage, limit: float, gpus: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_stages", stage.name, "--gpus", str(gpus)]
    with tempfile.TemporaryDirectory(prefix="isoflop-gpu-") as directory:
        # Without an empty cache a second run would time no compilation.
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        environment["TORCHINDUCTOR_CACHE_DIR"] = directory
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that the stage's own processes end with it
        )
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            _, errors = process.communicate()
            late = f"not done within {limit:.0f} s"
            return {"bad": [late], "error": errors[-ERROR_CHARACTERS:]}
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        bad = [f"the process ended with exit code {process.returncode}"]
        return {"bad": bad, "error": errors[-ERROR_CHARACTERS:]}
    report: dict[str, Any] = json.loads(lines[-1])
    if "recompile_limit" in errors:
        report["bad"].append("torch.compile reached its recompile limit and fell back to eager")
    return report


def table(reports: Sequence[dict[str, Any]]) -> Table:
    """Return the table of stages, one line each."""
    shown = Table(title="Checks of one GPU", title_justify="left")
    for name in ("stage", "s", "measured", "wrong"):
        shown.add_column(name, justify="right" if name == "s" else "left", overflow="fold")
    for report in reports:
        measured = [
            f"{name} {_short(value)}"
            for name, value in report.items()
            if name not in ("stage", "seconds", "bad")
        ]
        wrong = "\n".join(report["bad"]) or "nothing"
        shown.add_row(report["stage"], f"{report['seconds']:.0f}", "\n".join(measured), wrong)
    return shown


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_short, value))
    return str(value)


if __name__ == "__main__":
    main()
