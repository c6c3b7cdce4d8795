"""Tables that no law describes: an answer or a refusal, never a warning of NumPy's."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pytest

Run = Callable[..., tuple[int, str, str]]


def _valleys(budgets: int = 4, noise: float = 1e-3) -> dict[str, np.ndarray]:
    """Sizes of a few budgets by Hoffmann's law of 2022."""
    c = np.repeat(1e18 * 4.0 ** np.arange(budgets), 7)
    n = np.sqrt(c / 120) * np.tile(np.geomspace(0.25, 4, 7), budgets)
    d = c / (6 * n)
    loss = 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28
    loss *= np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))
    return {"params": n, "tokens": d, "loss": loss}


def _grid() -> tuple[np.ndarray, np.ndarray]:
    sizes, tokens = np.meshgrid(np.geomspace(1e8, 3e9, 5), np.geomspace(2e9, 2e11, 5))
    return sizes.ravel(), tokens.ravel()


PLAIN = _valleys()
N, D, L = PLAIN.values()
GRID_N, GRID_D = _grid()
ODD = np.arange(28) % 2
TABLES: dict[str, dict[str, np.ndarray]] = {
    "plain": PLAIN,
    "rising": {**PLAIN, "loss": 1 / L},
    "rising with N alone": {"params": GRID_N, "tokens": GRID_D, "loss": 2 + 1e-4 * GRID_N**0.3},
    "falling with N alone": {"params": GRID_N, "tokens": GRID_D, "loss": 2 + 100 * GRID_N**-0.3},
    "one N": {"params": np.full(8, 1e8), "tokens": D[:8], "loss": 1.7 + 400 * D[:8] ** -0.28},
    "one D": {"params": N[:8], "tokens": np.full(8, 3e11), "loss": 1.7 + 400 * N[:8] ** -0.34},
    "one loss": {**PLAIN, "loss": np.full(28, 3.0)},
    "noise alone": {**PLAIN, "loss": np.exp(np.random.default_rng(1).standard_normal(28))},
    "no noise": _valleys(noise=0.0),
    "logarithms": {"params": np.log10(N), "tokens": np.log10(D), "loss": L},
    "huge counts": {"params": N * 1e60, "tokens": D * 1e60, "loss": L},
    "tiny counts": {"params": N * 1e-30, "tokens": D * 1e-30, "loss": L},
    "tiny losses": {**PLAIN, "loss": L * 1e-12},
    "perplexities": {**PLAIN, "loss": np.exp(L)},
    "an outlier": {**PLAIN, "loss": np.where(np.arange(28) == 3, 1e12, L)},
    "infinite losses": {**PLAIN, "loss": np.where(np.arange(28) % 3 == 0, np.inf, L)},
    "weights far apart": {**PLAIN, "weight": np.where(ODD, 1e-9, 1e9)},
    "no weights": {**PLAIN, "weight": np.where(ODD, 0.0, 1.0)},
    "two budgets": _valleys(2),
    "a few rows": {name: values[5:11] for name, values in PLAIN.items()},
    "one row": {name: values[:1] for name, values in PLAIN.items()},
    "one D/N": {"params": N, "tokens": 20 * N, "loss": 1.7 + 400 * N**-0.34},
}
VERBS = {
    "fit": (),
    "report": ("-o", "report.html"),
    "forecast": ("--flops", "1e21"),
    "diagnose": ("--params", "1B", "--tokens", "10B"),
}


def _file(directory: Path, name: str) -> Path:
    path = directory / "runs.csv"
    csv.write_csv(pa.table(TABLES[name]), path)
    return path


@pytest.mark.parametrize("name", TABLES)
def test_no_table_makes_numpy_or_matplotlib_warn(
    name: str, isoflop: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _file(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        for verb, options in VERBS.items():
            code, out, err = isoflop(verb, path, *options)
            assert code in (0, 2), (verb, err)
            assert (code == 0) == bool(out), (verb, err)
            assert code == 0 or err.startswith("isoflop: "), (verb, err)


def test_profile_intervals_without_an_end_do_not_warn(isoflop: Run, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        code, _, err = isoflop("fit", _file(tmp_path, "one N"), "--intervals", "profile")
    assert code in (0, 2), err


def test_a_column_may_be_called_anything_in_figures(
    isoflop: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a formula nor a sign that the figures' font lacks."""
    monkeypatch.chdir(tmp_path)
    column = "損失 $x_$"
    csv.write_csv(pa.table({"params": N, "tokens": D, column: L}), "runs.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        code, _, err = isoflop("report", "runs.csv", "--loss", column)
    assert code == 0, err
    assert column in Path("report.html").read_text()


def test_warnings_reach_nobody_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-W", "error::UserWarning"]
    command += ["-m", "orchestrator", "report", str(_file(tmp_path, "rising"))]
    process = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.returncode in (0, 2)
    assert "Warning" not in process.stderr
    assert "Traceback" not in process.stderr
