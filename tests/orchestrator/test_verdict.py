"""What the terminal shows of a diagnosis."""

import io
import re

import pytest
from rich.console import Console

from analysis.diagnosis import diagnose, published_basis
from analysis.errors import InputError
from orchestrator.verdict import rate_of, show_diagnosis


def shown(found, rate=None, notes=()):
    out = io.StringIO()
    show_diagnosis(Console(file=out, width=140, highlight=False), found, rate, notes)
    return re.sub(r"\s+", " ", out.getvalue())


def test_gopher_with_its_price():
    """5.04e23 FLOPs on A100 at 40% of their peak are 1.12 million hours, half of them wasted."""
    found = [diagnose(published_basis("besiroglu-2024"), 280e9, 300e9)]
    text = shown(found, rate_of("A100", 1.5))
    assert text.startswith("By the law of Besiroglu et al. 2024 (N: total parameters")
    assert "280B parameters on 300B tokens are undertrained" in text
    assert "this run 280B 300B 1.07 5.04e+23 1.9996 1.12M 1.68M" in text
    assert "best at equal C 67.5B 1.25T 18.5 5.04e+23 1.9782 1.12M 1.68M" in text
    assert "On A100 40GB at 40% of 312 TFLOP/s, 564k GPU-hours, 846k dollars," in text


def test_without_a_gpu_there_is_no_money_and_without_a_price_there_are_hours():
    found = [diagnose(published_basis("besiroglu-2024"), 280e9, 300e9)]
    assert "GPU-hours" not in shown(found, rate_of(None))
    hours = shown(found, rate_of("L40S", None, 0.3))
    assert "On L40S at 30% of 362 TFLOP/s" in hours
    assert "dollars" not in hours


def test_every_law_speaks_and_disagreement_and_notes_are_marked():
    names = ("besiroglu-2024", "hoffmann-2022")
    found = [diagnose(published_basis(name), 70e9, 1.4e12) for name in names]
    text = shown(found, notes=["C is far away"])
    assert "By the law of Hoffmann et al. 2022" in text
    assert "! the laws disagree (besiroglu-2024: compute-optimal" in text
    assert text.endswith("! C is far away ")


def test_a_price_without_a_type_and_a_type_that_is_not_there_are_refused():
    with pytest.raises(InputError, match="add --gpu"):
        rate_of(None, 2.0)
    with pytest.raises(InputError, match="no GPU type 'H1000'"):
        rate_of("H1000", 2.0)
    with pytest.raises(InputError, match=r"MFU is 1\.2"):
        rate_of("H100", 2.0, 1.2)
