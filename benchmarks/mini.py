"""`isoflop mini` as a user runs it, twice: `python -m benchmarks.mini [--json]`.

Takes about five minutes. Wall time, how much of it trained, the time of the second call that has
nothing to train, peak resident memory of driver and workers, and the losses beside those of an
independent implementation of the recipe (on the standard library of Python 3.11.7).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from orchestrator.ledger import Ledger
from orchestrator.storage import open_storage
from trainers.corpus import Stdlib, load

KNOWN_CORPUS = "5017190f97ec7ac7"
KNOWN_BEST = {
    4e10: (1.833, 1.833),
    1.2e11: (1.653, 1.653),
    3.6e11: (1.489, 1.508),
    1.08e12: (1.375, 1.375),
}
"""Lowest loss of each budget, nats a byte; a range where several seeds were run."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isoflop-mini-") as directory:
        project = Path(directory) / "mini"
        first, memory = run(project)
        second, _ = run(project)
        best = lowest_losses(project)
    found = {
        "seconds": first["seconds"],
        "seconds_not_training": first["seconds"] * (1 - first["training_share"]),
        "trials": first["complete"],
        "interior_minima": sum(v["status"] == "interior" for v in first["vertices"]),
        "second_seconds": second["seconds"],
        "second_trained": second["trained"],
        **memory,
        "same_corpus_as_known": load(Stdlib()).hashes[0] == KNOWN_CORPUS,
        "loss_over_known": {f"{c:g}": _beyond(best[c], *KNOWN_BEST[c]) for c in KNOWN_BEST},
        **{
            f"heldout_{part}_{law}": errors[part]
            for law, errors in first["heldout"]["laws"].items()
            for part in ("loss_error", "params_error")
        },
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(title="isoflop mini", title_justify="left", show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table)


def run(project: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """One call of the command line: its JSON, and peak megabytes of driver and largest worker."""
    code = "from orchestrator.cli import main; main()"
    command = [sys.executable, "-c", code, "mini", "--project", str(project), "--json"]
    peaks = {"driver_mb": 0.0, "worker_mb": 0.0}
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            _update(peaks, "driver_mb", driver)
            for child in driver.children(recursive=True):
                if _name(child).startswith("ray::"):
                    _update(peaks, "worker_mb", child)
            time.sleep(0.5)
        assert process.stdout is not None
        return json.loads(process.stdout.read()), peaks


def lowest_losses(project: Path) -> dict[float, float]:
    """Lowest held-out loss of each known budget."""
    table = Ledger(open_storage(project)).read()
    best = {}
    for budget in KNOWN_BEST:
        near = pc.less(pc.abs(pc.subtract(pc.divide(table["flops_exact"], budget), 1)), 0.1)
        best[budget] = float(pc.min(table.filter(near)["loss"]).as_py())
    return best


def _beyond(value: float, low: float, high: float) -> float:
    """By what fraction a loss is outside a known range; 0 within."""
    return value / high - 1 if value > high else min(0.0, value / low - 1)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.cmdline()[0])
    except (psutil.Error, IndexError):
        return ""


def _update(peaks: dict[str, float], key: str, process: psutil.Process) -> None:
    """VmHWM is the kernel's own peak of a process, so that a slow sampler misses little."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            peaks[key] = max(peaks[key], int(line.split()[1]) / 1024)


if __name__ == "__main__":
    main()
