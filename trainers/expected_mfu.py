"""The share of a GPU's peak that training is expected to reach, by its size."""

from __future__ import annotations

MFU_TOP = 0.66
MFU_SLOPE = 0.65
MFU_HALF_PARAMS = 40e6
MFU_REFERENCE_FLOPS = 312e12
MFU_TOP_EXPONENT = 0.28
MFU_HALF_EXPONENT = 0.6
"""See `expected_mfu`."""


def expected_mfu(total_params: float, peak_flops: float) -> float:
    """Share of a GPU's peak FLOP/s that training reaches, before anything was measured.

    MFU = top / (1 + (half / N)^0.65), N total parameters. On an A100 in bf16 top is 0.66 and half
    40e6; at r times its 312e12 FLOP/s half is times r^0.6, and top, for r > 1, over r^0.28, as
    memory does not keep up. Fitted by hand to the benchmark tables of MosaicML's llm-foundry (bf16,
    2048 tokens of context, 125M to 7B parameters on A100 80GB and H100): within 5% of them. Other
    types, models below 1e8 and fp32, whose peak is 2 to 30 times lower, are extrapolated; the one
    published time in fp32 that is known is 13% shorter (`tests/cluster/test_effort.py`). The
    ledger's own measurements take its place.

    Examples
    --------
    >>> [round(expected_mfu(n, 989e12), 3) for n in (1e7, 1e8, 1.3e9)]  # H100, bf16
    [0.098, 0.256, 0.411]
    >>> [round(expected_mfu(n, 67e12), 3) for n in (1e7, 1e8, 1.3e9)]  # H100, fp32
    [0.281, 0.507, 0.624]
    """
    stronger = peak_flops / MFU_REFERENCE_FLOPS
    top = MFU_TOP / max(1.0, stronger) ** MFU_TOP_EXPONENT
    return float(top * filled(total_params, peak_flops))


def filled(total_params: float, peak_flops: float) -> float:
    """Expected MFU over that of the largest models on the same GPU."""
    half = MFU_HALF_PARAMS * (peak_flops / MFU_REFERENCE_FLOPS) ** MFU_HALF_EXPONENT
    return float(1 / (1 + (half / total_params) ** MFU_SLOPE))
