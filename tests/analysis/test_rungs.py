"""Which trials of a grid another rate improves: from rows of a ledger, written by hand."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest

from analysis.observations import SCHEMA
from analysis.rungs import (
    Probed,
    Rung,
    SeedNoise,
    is_probe,
    rungs,
    rungs_json,
    undertuned,
    verdict,
)

ROW = {
    "trial": "grid", "tokens": 1000, "status": "complete", "params_non_embedding": 3456,
    "flops_exact": 4e10, "loss": 1.85, "loss_stderr": 0.01, "width": 12, "depth": 2, "heads": 2,
    "vocabulary": 256, "context": 64, "batch_tokens": 128, "schedule": "cosine",
    "recipe_hash": "r", "trainer": "pretrain-2", "corpus_hash": "c", "seed": 0,
}  # fmt: skip


def _probe(rate: float, loss: float | None, **changes: object) -> dict[str, object]:
    status = "diverged" if loss is None else "complete"
    marks = {"probe_rate": rate, "probe_batch": 1.0, "status": status, "loss": loss}
    return {**ROW, "trial": f"probe {rate}", **marks, **changes}


def _rungs(*rows: dict[str, object]) -> tuple[Rung, ...]:
    table = pa.Table.from_pylist([ROW, *rows], schema=SCHEMA)
    return rungs(table, table)


def test_a_probe_that_beats_its_trial_by_more_than_chance_says_so() -> None:
    (rung,) = _rungs(_probe(0.5, 1.805), _probe(2.0, 1.9))
    assert rung.better is not None
    assert rung.better.factor == 0.5
    assert undertuned([rung])[0].startswith(
        "the rung at width 12 is undertuned: half the rate gives 1.805 nats against 1.850"
    )
    assert verdict([rung]) is None


@pytest.mark.parametrize("stderr", [None, 0.001, 0.01, 0.1])
@pytest.mark.parametrize(
    ("flops", "chance"),
    [
        (4e10, 0.0340),  # 1.85 x 0.79% x sqrt(2) x 1.645, of one probe
        (4e9, 0.0340),
        (1.08e12, 0.0198),  # 0.46%
        (1e21, 0.0172),  # 0.4%
    ],
)
def test_noise_is_that_of_seeds_whatever_the_text_is(
    stderr: float | None, flops: float, chance: float
) -> None:
    """Errors of the held-out text are in both losses alike, and say nothing of another training."""
    told = {"loss_stderr": stderr, "flops_exact": flops}
    table = pa.Table.from_pylist([{**ROW, **told}], schema=SCHEMA)
    for more, flagged in ((-0.0002, False), (0.0002, True)):
        probe = pa.Table.from_pylist([_probe(0.5, 1.85 - chance - more, **told)], schema=SCHEMA)
        assert bool(undertuned(rungs(table, probe))) == flagged


def test_the_more_probes_the_more_one_of_them_must_gain() -> None:
    """Standard normal quantiles of 95, 97.5 and 98.75%: 1.645, 1.960, 2.241."""
    unit = 2**0.5 * 0.0079 * 2.0
    found = [SeedNoise().chance(2.0, 4e10, probes) / unit for probes in (1, 2, 4)]
    assert found == pytest.approx([1.645, 1.960, 2.241], abs=1e-3)


def test_seeds_of_the_sweep_itself_tell_its_noise() -> None:
    """Five points with two seeds each, 0.2% apart: a standard deviation of 0.141%."""
    pairs = [
        {
            **ROW,
            "seed": seed,
            "width": width,
            "loss": loss * (1 + 0.002 * seed),
            "trial": f"{width} {seed}",
        }
        for seed in (0, 1)
        for width, loss in ((12, 1.85), (16, 1.80), (20, 1.77), (24, 1.75), (32, 1.76))
    ]
    others = [{**row, "corpus_hash": "d", "loss": 3.0 + row["seed"]} for row in pairs]
    table = pa.Table.from_pylist([*pairs, *others, _probe(0.5, 1.84)], schema=SCHEMA)
    (rung,) = rungs(table, table)
    t_of_five = 2.015  # 95%
    assert rung.chance == pytest.approx(1.85 * 0.002 * t_of_five, rel=2e-3)
    assert rung.better is not None
    few = pa.Table.from_pylist([*pairs[:1], pairs[5], _probe(0.5, 1.84)], schema=SCHEMA)
    assert rungs(few, few)[0].chance == pytest.approx(0.0340, abs=1e-4)
    trunks = [{**row, "trial": f"{row['seed']}", "tokens": row["width"]} for row in pairs]
    one = pa.Table.from_pylist([*trunks, {**ROW}, _probe(0.5, 1.84)], schema=SCHEMA)
    assert rungs(one, one)[0].chance == pytest.approx(0.0340, abs=1e-4)
    deaf = [{**row, "loss": 1.85} for row in pairs]
    same = pa.Table.from_pylist([*deaf, _probe(0.5, 1.84)], schema=SCHEMA)
    assert rungs(same, same)[0].chance == pytest.approx(0.0340, abs=1e-4)


@pytest.mark.parametrize("dof", [math.inf, 4, 28])
def test_of_twenty_sweeps_whose_rates_hold_one_is_flagged(dof: float) -> None:
    """Two rungs with two probes each, whose losses differ by nothing but their seeds."""
    rng, flops, sd = np.random.default_rng(0), 1.2e11, 0.006
    losses = rng.normal(2.0, sd * 2.0, (4000, 2, 3))
    over = np.sqrt(rng.chisquare(dof, 4000) / dof) if dof < math.inf else np.ones(4000)
    flagged = [
        any(
            Rung(
                width=8, params=1, tokens=1, flops=flops, loss=own, stderr=1e-4,
                chance=SeedNoise(over=found, dof=dof).chance(own, flops, 4),
                probes=tuple(Probed(factor=2.0, loss=loss, stderr=1e-4) for loss in others),
            ).better
            for own, *others in sweep
        )
        for found, sweep in zip(over, losses, strict=True)
    ]  # fmt: skip
    assert 0.03 < np.mean(flagged) < 0.055  # a little less: two probes share their rung's loss


def test_rates_that_hold_are_said_to_hold_and_how_well_that_is_known() -> None:
    found = _rungs(_probe(0.5, 1.86), _probe(2.0, None))
    assert not undertuned(found)
    assert verdict(found) == (
        "rates hold: half and double the rate is no better at width 12, to within 0.041 nats"
    )
    assert verdict(()) is None


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"tokens": 999}, {"width": 16}, {"batch_tokens": 64}, {"recipe_hash": "s"},
     {"corpus_hash": "d"}, {"probe_batch": 2.0}],
)  # fmt: skip
def test_only_a_probe_of_the_same_trial_is_compared(other: dict[str, object]) -> None:
    assert _rungs(_probe(0.5, 1.0, **other)) == ()


def test_a_probe_is_known_by_its_row() -> None:
    table = pa.Table.from_pylist([ROW, _probe(0.5, 1.8)], schema=SCHEMA)
    assert is_probe(table).to_pylist() == [False, True]


def test_as_json_a_rung_has_its_probes() -> None:
    (rung,) = json.loads(json.dumps(rungs_json(_rungs(_probe(0.5, 1.8), _probe(2.0, None)))))
    assert (rung["width"], rung["loss"], rung["undertuned"]) == (12, 1.85, True)
    assert [(p["rate"], p["loss"]) for p in rung["probes"]] == [(0.5, 1.8), (2.0, None)]
