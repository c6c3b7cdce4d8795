"""From observations to the numbers that an engine takes: checked, in logarithms, centred.

Refuses what no law can be fitted to, by name.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from analysis.errors import InputError
from analysis.laws import Law
from analysis.minimise import Rows
from analysis.observations import FloatArray, IntArray, Observations

EXPONENT_BOUNDS = (1e-3, 5.0)
"""Where alpha and beta are sought; inner exponents of eight public studies lie within .2 to 2."""
GAMMA_BOUNDS = (0.02, 5.0)
"""Where gamma is sought; those studies give 0.38 to 0.85, Kaplan's law has 0.103."""
_COEFFICIENT_BOUNDS = (-40.0, 40.0)  # ln A, ln B at the centre of the data: keeps exp() finite


class Data(NamedTuple):
    """Rows with centred logarithms, as the engine takes them."""

    rows: Rows
    centre_n: float
    centre_d: float
    groups: IntArray | None
    """Group of each row, 0 to k - 1: its trunk, else its budget; None where neither is known."""
    low: FloatArray
    high: FloatArray

    def uncentred(self, theta: FloatArray) -> FloatArray:
        """From theta at the centre, shape (..., 6), to theta: ln A gains alpha ln N, and so on."""
        shifted = theta.copy()
        shifted[..., 0] += theta[..., 3] * self.centre_n
        shifted[..., 1] += theta[..., 4] * self.centre_d
        return shifted

    def centred(self, theta: FloatArray) -> FloatArray:
        """The inverse of `uncentred`."""
        shifted = theta.copy()
        shifted[..., 0] -= theta[..., 3] * self.centre_n
        shifted[..., 1] -= theta[..., 4] * self.centre_d
        return shifted

    @property
    def uncentring(self) -> FloatArray:
        """The derivative of that by theta, shape (6, 6)."""
        shift = np.eye(6)
        shift[0, 3], shift[1, 4] = self.centre_n, self.centre_d
        return shift


def prepare(law: Law, obs: Observations) -> Data:
    """Check the rows and centre their logarithms; arguments and errors are those of `fit`."""
    weight = obs.weight
    if weight.shape != obs.loss.shape or not np.all(np.isfinite(weight) & (weight >= 0)):
        raise InputError(f"weights must be {len(obs)} non-negative numbers, one a row")
    obs, weight = obs.select(weight > 0), weight[weight > 0]
    for name, values in (("N", obs.params), ("D", obs.tokens), ("C", obs.flops), ("L", obs.loss)):
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            raise InputError(
                f"in {bad.sum()} of {len(obs)} observations {name} is not a positive "
                f"number (the first is {values[bad][0]}): leave them out"
            )
    _require_design(law, obs)
    _require_pins(law, obs)
    first, second = law.variables
    log_n = np.log(getattr(obs, first))
    log_d = np.log(getattr(obs, second)) if second else np.zeros(len(obs))
    # A pinned A or B is that at N = 1 or D = 1: centred, it would depend on the exponent.
    centre_n = 0.0 if "A" in law.pinned else float(log_n.mean())
    centre_d = 0.0 if "B" in law.pinned else float(log_d.mean())
    pairs = (
        *(_COEFFICIENT_BOUNDS, _COEFFICIENT_BOUNDS, (0.0, float(obs.loss.max()))),
        *(EXPONENT_BOUNDS, EXPONENT_BOUNDS, np.log(GAMMA_BOUNDS)),
    )
    low, high = np.array(pairs).T
    rows = Rows(log_n - centre_n, log_d - centre_d, np.log(obs.loss)[None], weight[None])
    return Data(rows, centre_n, centre_d, _groups(obs), low, high)


def _require_pins(law: Law, obs: Observations) -> None:
    """Refuse constants pinned where they are never sought."""
    ranges = dict.fromkeys(("alpha", "beta"), EXPONENT_BOUNDS) | {"gamma": GAMMA_BOUNDS}
    ranges["E"] = (0.0, float(np.nextafter(obs.loss.min(), 0.0)))
    for name in sorted(law.pinned & ranges.keys()):
        low, high = ranges[name]
        if not low <= law.held[name] <= high:
            raise InputError(
                f"{name} is pinned at {law.held[name]:g}; it must lie from {low:g} to {high:.4g}"
                + (", the smallest loss" if name == "E" else "")
            )


def _groups(obs: Observations) -> IntArray | None:
    """Rows that may be off together: those of a trunk; without trunks those of a budget."""
    trunks = np.unique(obs.trunk, return_inverse=True)[1]
    if trunks.max() + 1 < len(obs):
        return trunks
    if not len(obs.budgets()):
        return None
    # A row of no budget shares its noise with none.
    alone = -1.0 - np.arange(len(obs))
    labels = np.where(np.isfinite(obs.budget), obs.budget, alone)
    return np.unique(labels, return_inverse=True)[1]


def _require_design(law: Law, obs: Observations) -> None:
    p = len(law.names)
    if p == 0:
        raise InputError(f"every constant of the {law.name} law is pinned: nothing is left to fit")
    if len(obs) <= p:
        raise InputError(
            f"{len(obs)} observations cannot determine the {p} constants of the {law.name} law: "
            f"measure at least {p + 1}"
        )
    if np.ptp(np.log(obs.loss)) < 1e-9:
        raise InputError(
            f"all {len(obs)} losses are {obs.loss[0]:.6g}: nothing falls with N or D, "
            "so that there is no law to fit; is this the right column?"
        )
    second = obs.tokens if law.variables[1] else getattr(obs, law.variables[0])
    places = len(np.unique(np.stack([getattr(obs, law.variables[0]), second]), axis=1).T)
    if places < p:
        raise InputError(
            f"{len(obs)} observations at {places} distinct N and D cannot determine the {p} "
            f"constants of the {law.name} law: measure at least {p} distinct ones"
        )
    planned = bool(np.all(np.isfinite(obs.budget)))
    if (planned and len(obs.budgets()) == 1) or np.ptp(np.log(obs.flops)) < np.log(1.1):
        raise InputError(
            f"one budget only: all {len(obs)} observations were made at about "
            f"{np.median(obs.flops):.3g} FLOPs, which says nothing of how the loss falls with C; "
            "measure at least two budgets"
        )
    if law.variables[1] is not None:
        for name, values, unit in (("N", obs.params, "parameters"), ("D", obs.tokens, "tokens")):
            if np.ptp(np.log(values)) < 0.05:
                raise InputError(
                    f"all {len(obs)} observations have one {name}, about {np.median(values):.3g} "
                    f"{unit}: what {name} is worth cannot be told; measure at least three values "
                    "of it"
                )
    ratio = obs.tokens / obs.params
    if law.variables[1] is not None and np.ptp(np.log(ratio)) < 0.05:
        raise InputError(
            f"N and D are collinear: all {len(obs)} observations have about "
            f"{np.median(ratio):.3g} tokens a parameter; vary D/N within each budget"
        )


def collinearity(rows: Rows) -> str | None:
    """Say that N and D hardly vary apart, or None."""
    # Rms spread across the narrowest direction of the cloud of (ln N, ln D).
    cloud = np.stack([rows.log_n - rows.log_n.mean(), rows.log_d - rows.log_d.mean()], axis=1)
    spread = float(np.linalg.svd(cloud, compute_uv=False)[-1] / np.sqrt(len(cloud)))
    if spread >= 0.25:
        return None
    return (
        f"N and D are nearly collinear (spread of {np.exp(spread):.2f}x across their common line): "
        "alpha and beta are poorly separated; widen the range of D/N or of budgets"
    )
