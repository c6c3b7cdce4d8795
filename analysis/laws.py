"""The laws: loss as a formula of (N, D), with its gradient, and the constants that papers print.

Pure functions of arrays. Where a law has its optimum is `optimum.py`'s business, how its constants
are estimated `fitting.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.errors import InputError
from analysis.numerals import PF_DAY
from analysis.observations import FloatArray, ParamsConvention

BoolArray = NDArray[np.bool_]
LawName = Literal[
    "hoffmann", "generalised", "kaplan", "kaplan_params", "kaplan_tokens", "kaplan_flops"
]

NAMES = ("A", "B", "E", "alpha", "beta", "gamma")
"""The constants of every law, in the order of `theta`."""
_LOGARITHMIC = frozenset({"A", "B", "gamma"})


@dataclass(frozen=True, eq=False)
class Law:
    """L = E + (A N^-alpha + B D^-beta)^gamma with some of its constants held.

    theta = (ln A, ln B, E, alpha, beta, ln gamma), shape (6,), for every law. E is held as it is,
    in nats/token, not as its logarithm: the loss is linear in it, E = 0 is then an ordinary value
    (Kaplan's laws have it), and a fit that ends there still has a finite gradient in E for its
    intervals.
    """

    name: LawName
    formula: str
    source: str
    held: Mapping[str, float]
    """Constants that the formula holds, or a user pinned, by name."""
    variables: tuple[str, str | None] = ("params", "tokens")
    """Which observed quantities stand for N and D; a law of one variable has no second."""
    pinned: frozenset[str] = field(default=frozenset())
    """Which of `held` a user pinned."""

    @cached_property
    def free(self) -> BoolArray:
        """Which entries of theta a fit estimates, shape (6,)."""
        return np.array([name not in self.held for name in NAMES])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the constants that a fit estimates."""
        return tuple(name for name in NAMES if name not in self.held)

    @property
    def unit_gamma(self) -> bool:
        """Whether gamma is held at 1, so that the formula is a plain sum."""
        return self.held.get("gamma") == 1.0

    def pin(self, constants: Mapping[str, float]) -> Law:
        """The law with more of its constants held.

        Raises
        ------
        InputError
            If the law has no such free constant, or the value is outside its range.

        Examples
        --------
        >>> HOFFMANN.pin({"E": 1.7}).names
        ('A', 'B', 'alpha', 'beta')
        """
        for name, value in constants.items():
            if name not in self.names:
                raise InputError(
                    f"the {self.name} law has no free constant {name!r} to pin; "
                    f"it has {', '.join(self.names)}"
                )
            if not (np.isfinite(value) and (value > 0 or (name == "E" and value == 0))):
                raise InputError(f"{name} cannot be pinned at {value}: it must be positive")
        if not constants:
            return self
        held = {**self.held, **constants}
        return replace(self, held=held, pinned=self.pinned | frozenset(constants))

    def constants(self, theta: FloatArray) -> dict[str, float]:
        """Constants by name: A, B, E (nats/token), alpha, beta, and gamma where it is not 1.

        Examples
        --------
        >>> theta = HOFFMANN.theta({"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28})
        >>> round(HOFFMANN.constants(theta)["A"], 6)
        406.4
        """
        values = {
            name: float(np.exp(value)) if name in _LOGARITHMIC else float(value)
            for name, value in zip(NAMES, theta, strict=True)
        }
        if self.unit_gamma and "gamma" not in self.pinned:
            del values["gamma"]
        return values

    def theta(self, constants: Mapping[str, float]) -> FloatArray:
        """The vector, shape (6,), of which `constants`, and those that the law holds, are such."""
        values = {**constants, **self.held}
        with np.errstate(divide="ignore"):  # A = 0 or B = 0: a law of one variable
            return np.array(
                [np.log(values[name]) if name in _LOGARITHMIC else values[name] for name in NAMES],
                dtype=np.float64,
            )


HOFFMANN = Law(
    "hoffmann",
    "L = E + A N^-alpha + B D^-beta",
    "Hoffmann et al. 2022, arXiv 2203.15556, Eq. 2",
    {"gamma": 1.0},
)
GENERALISED = Law(
    "generalised",
    "L = E + (A N^-alpha + B D^-beta)^gamma",
    "Busbridge et al. 2025, arXiv 2502.08606",
    {},
)
KAPLAN = Law(
    "kaplan",
    "L = (A N^-alpha + B / D)^gamma, which is [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D",
    "Kaplan et al. 2020, arXiv 2001.08361, Eq. 1.5",
    {"E": 0.0, "beta": 1.0},
)
_ONE_VARIABLE = {"B": 0.0, "E": 0.0, "beta": 1.0, "gamma": 1.0}
KAPLAN_PARAMS = Law(
    "kaplan_params",
    "L = (N_c/N)^alpha_N = A N^-alpha",
    "Kaplan et al. 2020, arXiv 2001.08361, Eq. 1.1",
    _ONE_VARIABLE,
    ("params", None),
)
KAPLAN_TOKENS = Law(
    "kaplan_tokens",
    "L = (D_c/D)^alpha_D = A D^-alpha",
    "Kaplan et al. 2020, arXiv 2001.08361, Eq. 1.2",
    _ONE_VARIABLE,
    ("tokens", None),
)
KAPLAN_FLOPS = Law(
    "kaplan_flops",
    "L = (C_c/C)^alpha_C = A C^-alpha",
    "Kaplan et al. 2020, arXiv 2001.08361, Eq. 1.3",
    _ONE_VARIABLE,
    ("flops", None),
)
LAWS = (HOFFMANN, GENERALISED, KAPLAN)
"""The laws of (N, D), which every study fits."""


@dataclass(frozen=True)
class Published:
    """Constants as a paper prints them, with N as the paper counts it."""

    law: Law
    constants: Mapping[str, float]
    params_convention: ParamsConvention
    cite: str
    """Short name, as in "the law of ..."."""
    source: str

    @property
    def theta(self) -> FloatArray:
        """The constants as a vector, shape (6,)."""
        return self.law.theta(self.constants)


def _scale(critical: float, exponent: float) -> dict[str, float]:
    """The constants of (critical/x)^exponent."""
    return {"A": critical**exponent, "alpha": exponent}


_KAPLAN_2020 = "Kaplan et al. 2020"
PUBLISHED: Mapping[str, Published] = {
    "hoffmann-2022": Published(
        HOFFMANN,
        {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
        "total",
        "Hoffmann et al. 2022",
        "arXiv 2203.15556, Eq. 10",
    ),
    "besiroglu-2024": Published(
        HOFFMANN,
        {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
        "total",
        "Besiroglu et al. 2024",
        "arXiv 2404.10102: Hoffmann's own points, refitted",
    ),
    "besiroglu-2024-converged": Published(
        HOFFMANN,
        {"A": 477.83, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717},
        "total",
        "Besiroglu et al. 2024, at the minimum of their objective",
        "arXiv 2404.10102: objective 1.0182740e-3, of which the printed constants stop just short",
    ),
    "kaplan-2020": Published(
        KAPLAN,
        {"A": 6.4e13 ** (0.076 / 0.103), "B": 1.8e13, "alpha": 0.076 / 0.103, "gamma": 0.103},
        "non_embedding",
        _KAPLAN_2020,
        "arXiv 2001.08361, Eq. 1.5 and Table 2",
    ),
    "kaplan-2020-params": Published(
        KAPLAN_PARAMS,
        _scale(8.8e13, 0.076),
        "non_embedding",
        _KAPLAN_2020,
        "arXiv 2001.08361, Eq. 1.1",
    ),
    "kaplan-2020-tokens": Published(
        KAPLAN_TOKENS,
        _scale(5.4e13, 0.095),
        "non_embedding",
        _KAPLAN_2020,
        "arXiv 2001.08361, Eq. 1.2",
    ),
    "kaplan-2020-flops": Published(
        KAPLAN_FLOPS,
        _scale(3.1e8 * PF_DAY, 0.050),
        "non_embedding",
        _KAPLAN_2020,
        "arXiv 2001.08361, Eq. 1.3: C_min, at batches far below the critical one",
    ),
}


class _Parts(NamedTuple):
    """What value and gradient share; arrays of shape (n,)."""

    share_n: FloatArray
    """A N^-alpha as a fraction of the bracket A N^-alpha + B D^-beta."""
    bracket: FloatArray
    """ln of the bracket."""
    gamma: float
    log_loss: FloatArray


def _parts(theta: FloatArray, log_params: FloatArray, log_tokens: FloatArray) -> _Parts:
    # Everything stays in logarithms: A N^-alpha alone may overflow where their product does not.
    term_n = theta[0] - theta[3] * log_params
    term_d = theta[1] - theta[4] * log_tokens
    bracket = np.logaddexp(term_n, term_d)
    gamma = float(np.exp(theta[5]))
    log_e = np.log(theta[2]) if theta[2] > 0 else -np.inf
    return _Parts(np.exp(term_n - bracket), bracket, gamma, np.logaddexp(log_e, gamma * bracket))


def log_loss(theta: FloatArray, log_params: FloatArray, log_tokens: FloatArray) -> FloatArray:
    """Log loss, ln L with L in nats/token, at ln N and ln D of the same shape. Needs E >= 0."""
    return _parts(theta, log_params, log_tokens).log_loss


def log_loss_jacobian(
    theta: FloatArray, log_params: FloatArray, log_tokens: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Log loss, shape (n,), and its derivatives by all of `theta`, shape (n, 6). Needs E >= 0."""
    share_n, bracket, gamma, value = _parts(theta, log_params, log_tokens)
    reducible = gamma * np.exp(gamma * bracket - value)  # d ln L / d ln bracket
    by_a, by_b = reducible * share_n, reducible * (1.0 - share_n)
    columns = [
        *(by_a, by_b, np.exp(-value)),
        *(-by_a * log_params, -by_b * log_tokens, reducible * bracket),
    ]
    return value, np.stack(columns, axis=-1)


def loss(theta: FloatArray, params: FloatArray, tokens: FloatArray) -> FloatArray:
    """L in nats/token, shape (n,), of N parameters trained on D tokens, each of shape (n,)."""
    return np.exp(log_loss(theta, np.log(params), np.log(tokens)))
