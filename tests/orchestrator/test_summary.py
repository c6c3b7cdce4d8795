"""What terminal and report show of intervals: their parts, back-tests, the law's optimum."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from analysis.figures import draw
from analysis.laws import GENERALISED, loss
from analysis.observations import Observations
from analysis.optimum import FlopsPerToken
from analysis.report import page
from analysis.study import Study, study
from analysis.wording import count, share
from orchestrator.summary import show_study

BENT = {"A": 1.6e5, "B": 1.6e5, "E": 1.7, "alpha": 0.6, "beta": 0.35, "gamma": 0.5}


def studied(budgets: int) -> Study:
    """A study of a bent law with noise, grids around its optimum."""
    flops = np.repeat(1e18 * 3.0 ** np.arange(budgets), 7)
    n = np.sqrt(flops / 6e4) * np.tile(np.geomspace(0.2, 5.0, 7), budgets)
    d = flops / (6 * n)
    noise = 0.002 * np.random.default_rng(3).standard_normal(len(n))
    nan = np.full(len(n), np.nan)
    obs = Observations(
        params=n,
        tokens=d,
        flops=flops,
        loss=loss(GENERALISED.theta(BENT), n, d) * np.exp(noise),
        loss_stderr=nan,
        budget=flops,
    )
    return study(obs, cost=FlopsPerToken.six_n())


def shown(found: Study) -> list[str]:
    """Lines of the terminal, blanks made single."""
    out = io.StringIO()
    show_study(Console(file=out, width=200, highlight=False), found)
    return [re.sub(r"\s+", " ", line).strip() for line in out.getvalue().splitlines()]


@pytest.fixture(scope="module")
def five() -> Study:
    return studied(5)


def test_every_valley_has_the_laws_optimum_beside_its_vertex(five: Study) -> None:
    lines = shown(five)
    assert lines[1].startswith("C, FLOPs N_opt N_opt by law D_opt D/N L, ")
    for vertex, by_law in zip(five.isoflop.vertices, five.by_law, strict=True):
        start = f"{vertex.flops:.3g} {count(vertex.params)} {count(by_law)} {count(vertex.tokens)} "
        assert any(line.startswith(start) for line in lines)


def test_the_parts_of_an_interval_are_shown_apart(five: Study) -> None:
    ahead = five.next
    assert ahead is not None
    text = (
        f"standard deviations of ln N_opt: noise {share(ahead.noise.params)}, "
        f"law {share(ahead.by_law.params)}; of ln L: noise {share(ahead.noise.loss)}, "
        f"law {share(ahead.by_law.loss)} (law: by 3 back-tests)"
    )
    assert text in shown(five)
    alone = shown(studied(2))
    law = share(0.11 * np.log(3.0))
    assert any(f", law {law}; of ln L: " in li and li.endswith("(law: default)") for li in alone)
    assert any(li.startswith("! no back-test tells how far the law is off") for li in alone)
    assert any("(law: by 1 back-test)" in line for line in shown(studied(3)))


def test_every_back_test_says_whether_it_held(five: Study) -> None:
    lines = shown(five)
    assert len(five.back_tests) == 2
    header = "C, FLOPs N expected N measured L expected L measured law"
    at = lines.index(header)
    for line, item in zip(lines[at + 1 :], five.back_tests, strict=False):
        words = ["held" if inside else "missed" for inside in (item.params_held, item.loss_held)]
        assert [word for word in line.split() if word in ("held", "missed")] == words
        assert f" {count(item.params_measured)} " in line
        assert line.endswith("by back-tests below")


def test_the_report_shows_the_same(five: Study) -> None:
    html = page(five, draw(five), table=None, name="bent", proposal=None)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert "N_opt N_opt by law D_opt" in text
    assert "Inside the intervals are standard deviations of ln N_opt: noise " in text
    for item, by_law in zip(five.back_tests, five.by_law[::-1], strict=False):
        assert count(by_law) in text
        words = "held" if item.params_held else "missed"
        assert f"{count(item.params_measured)} {words} " in text
