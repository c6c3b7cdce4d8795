"""Two thousand random tables with planted defects: right, or refused or warned by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from analysis.arrow_types import plain_types
from analysis.errors import InputError
from analysis.headline import headline
from orchestrator.reading import Convention, Reading
from orchestrator.source import points
from tests.data.planted import Planted, planted

TABLES, PARTS = 2000, 8
LEVEL = 0.99


@dataclass(frozen=True)
class Answer:
    """The answer of isoflop to one table."""

    held: bool
    """Whether the truth lies in both intervals; False too where the table was refused."""
    refused: str | None
    warnings: tuple[str, ...]

    def names(self, columns: set[str]) -> bool:
        """Whether a column is named in a refusal or a warning, not only as what it was read as."""
        said = [self.refused or ""] + [
            w for w in self.warnings if not w.startswith("columns known")
        ]
        return any(repr(column) in text for column in columns for text in said)


def _answer(case: Planted) -> Answer:
    """Forecast a table at twice the largest C in it, as a user would who gives no options."""
    other = {"perplexity", "val_ppl"} & set(case.table.column_names)
    reading = Reading(loss=other.pop() if other else None)
    flops = 2.0 * case.top_flops
    try:
        observed = points(plain_types(case.table), "table", reading).observed(
            Convention(level=LEVEL)
        )
        ahead = headline(observed.obs, flops, observed.cost, LEVEL)
    except InputError as error:
        return Answer(held=False, refused=str(error), warnings=())
    n, loss = case.truth(flops)
    held = ahead.params.low <= n <= ahead.params.high and ahead.loss.low <= loss <= ahead.loss.high
    return Answer(held=held, refused=None, warnings=(*observed.notes, *ahead.notes))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_no_planted_defect_gives_a_wrong_answer_in_silence(part: int) -> None:
    silent, defective = [], 0
    for seed in range(part, TABLES, PARTS):
        case = planted(seed)
        answer = _answer(case)
        if case.defects:
            defective += 1
            if not answer.held and not answer.names(case.names):
                silent.append((seed, sorted(case.defects), answer))
    assert len(silent) <= 0.01 * defective, silent[:3]


@pytest.mark.slow
@pytest.mark.parametrize("digitised", [False, True], ids=["replicates", "digitised"])
def test_clean_tables_are_hardly_ever_refused(digitised: bool) -> None:
    refused = []
    for seed in range(500):
        case = planted(seed, set(), digitised=digitised)
        try:
            found = points(plain_types(case.table), "table", Reading())
        except InputError as error:
            refused.append((seed, str(error)))
            continue
        if found.excluded:  # nothing is planted that should be left out
            refused.append((seed, str(found.excluded)))
    assert len(refused) <= 5, refused[:3]
