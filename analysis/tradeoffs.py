"""What leaving the optimum costs, and the budget that a model, a loss or a service asks for.

Pure functions of a law. Whose law it is, and what to say of it, is `diagnosis.py`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from analysis.errors import InputError
from analysis.laws import Law, log_loss
from analysis.observations import FloatArray
from analysis.optimum import FlopsPerToken, Optimum, log_optimal_params

_LARGEST_LOG = 700.0  # exp() of more overflows
_LEAST_LOG = -300.0  # ln N that nobody asks about; the caller refuses less than one parameter
FORWARD = 1.0 / 3.0  # of training's FLOPs: the backward pass takes twice the forward one


class _Terms(NamedTuple):
    """The bracket A N^-alpha + B D^-beta; raised to gamma and added to E it is the loss."""

    log_a: float
    log_b: float
    alpha: float
    beta: float
    gamma: float
    floor: float
    """E, in nats/token."""

    def log_bracket(self, x: float, y: float) -> float:
        """Ln of the bracket at ln N and ln D."""
        return float(np.logaddexp(self.log_a - self.alpha * x, self.log_b - self.beta * y))


def _terms(law: Law, theta: FloatArray) -> _Terms:
    constants = law.constants(theta)
    if not (constants["A"] > 0.0 and constants["B"] > 0.0):
        raise InputError(
            f"{law.formula} does not weigh N against D, so that it has no compute-optimal model: "
            "name a law of both, such as the hoffmann law"
        )
    return _Terms(
        math.log(constants["A"]),
        math.log(constants["B"]),
        constants["alpha"],
        constants["beta"],
        constants.get("gamma", 1.0),
        constants["E"],
    )


def within(
    law: Law, theta: FloatArray, flops: float, cost: FlopsPerToken, share: float = 0.01
) -> tuple[float, float]:
    """The least and the largest N whose loss at `flops` stays within `share` of the best one.

    Parameters
    ----------
    law, theta
        The law and its constants.
    flops
        Budget C in FLOPs; every N trains on C/c(N) tokens.
    cost
        FLOPs per token as a function of N.
    share
        Of the best loss, such as .01.

    Returns
    -------
    tuple of float
        N in parameters. 0 or infinity where that end is beyond what a double holds.

    Raises
    ------
    InputError
        If the share is not positive, or the law is not one of N and D.

    Examples
    --------
    The valley is flat: a tenth of a per cent of loss allows half as much again either way.

    >>> from analysis.laws import PUBLISHED
    >>> paper = PUBLISHED["besiroglu-2024"]
    >>> ends = within(paper.law, paper.theta, 5.88e23, FlopsPerToken.six_n(), 0.001)
    >>> [round(n / 1e9) for n in ends]
    [47, 114]
    """
    if not (math.isfinite(share) and share > 0.0):
        raise InputError(f"the share of the best loss is {share}; it must be positive, such as .01")
    _terms(law, theta)
    log_c = math.log(flops)

    def excess(x: float) -> float:
        y = log_c - float(cost.log_and_slope(x)[0])
        return float(log_loss(theta, np.array(x), np.array(y))) - bound

    best = log_optimal_params(theta, flops, cost)
    bound = 0.0
    bound = excess(best) + math.log1p(share)
    low, high = (_first_root(excess, best, step) for step in (-0.1, 0.1))
    return math.exp(low) if low > -_LARGEST_LOG else 0.0, (
        math.exp(high) if high < _LARGEST_LOG else math.inf
    )


def _first_root(function: Callable[[float], float], start: float, step: float) -> float:
    """Where `function`, negative at `start`, turns positive in the direction of `step`."""
    inside = start
    while abs(outside := inside + step) < _LARGEST_LOG:
        if function(outside) >= 0.0:
            return float(brentq(function, inside, outside, xtol=1e-12, rtol=1e-14))
        inside, step = outside, 1.5 * step
    return math.copysign(math.inf, step)


def _root(rising: Callable[[float], float], start: float) -> float:
    """Where a rising function is zero, searched from `start` outwards."""
    if rising(start) < 0.0:
        return _first_root(rising, start, 0.1)
    return _first_root(lambda z: -rising(z), start, -0.1)


def needed_flops(
    law: Law, theta: FloatArray, params: float, tokens: float, cost: FlopsPerToken
) -> float:
    """The least C, in FLOPs, whose optimum has the loss of N parameters on D tokens.

    Where c is proportional to N, a model of r times the optimal size at its own C took
    ((beta r^-alpha + alpha r^beta) / (alpha + beta))^((alpha + beta) / (alpha beta)) times that
    much. The bracket is compared, not the loss: no E then hides how far the two are apart.

    Raises
    ------
    InputError
        If the law is not one of N and D.
    """
    terms = _terms(law, theta)
    target = terms.log_bracket(math.log(params), math.log(tokens))

    def above(log_c: float) -> float:
        """How far ln bracket is below `target`: rises with C."""
        x = log_optimal_params(theta, math.exp(log_c), cost)
        return target - terms.log_bracket(x, log_c - float(cost.log_and_slope(x)[0]))

    # Under C = 6ND the bracket is a power of C: there is its root.
    power = terms.alpha * terms.beta / (terms.alpha + terms.beta)
    x = log_optimal_params(theta, 1.0, FlopsPerToken.six_n())
    guess = (terms.log_bracket(x, -math.log(6.0) - x) - target) / power
    root = _root(above, guess) if abs(guess) < _LARGEST_LOG else guess
    # Exponents near zero: the loss hardly depends on C, and C may be anything above nothing.
    return math.exp(max(root, -_LARGEST_LOG)) if root < _LARGEST_LOG else math.inf


def _balance(terms: _Terms) -> float:
    return terms.log_b + math.log(terms.beta) - terms.log_a - math.log(terms.alpha)


def _at(
    law: Law, theta: FloatArray, x: float, y: float, cost: FlopsPerToken
) -> tuple[float, Optimum]:
    log_c = y + float(cost.log_and_slope(x)[0])
    value = float(log_loss(theta, np.array(x), np.array(y)))
    flops, n, d, best = np.exp(np.minimum([log_c, x, y, value], _LARGEST_LOG))
    return float(flops), Optimum(float(n), float(d), float(best))


def _positive(name: str, value: float, unit: str) -> float:
    if not (math.isfinite(value) and value > 0.0):
        raise InputError(f"{name} is {value}; it must be a positive number of {unit}")
    return value


@dataclass(frozen=True, kw_only=True)
class ServedOptimum:
    """The best model that a budget can both train and serve."""

    params: float
    """N, in parameters."""
    tokens: float
    """D, training tokens."""
    loss: float
    """L, in nats/token."""
    served_tokens: float
    """T, tokens in and out over the model's life."""
    training_flops: float
    """c(N) D, in FLOPs."""
    serving_flops: float
    """c(N) T / 3, in FLOPs: 2 N T where c = 6 N."""


def served_optimum(
    law: Law, theta: FloatArray, flops: float, served_tokens: float, cost: FlopsPerToken
) -> ServedOptimum:
    """The N and D of least loss among those with c(N) (D + T/3) = C.

    Serving a token takes the forward third of training on one, 2N FLOPs where c = 6N, at full
    utilisation: at batches of one request the bill is higher, and the best model smaller still.

    Parameters
    ----------
    law, theta
        The law and its constants.
    flops
        C, in FLOPs, for training and serving together. (Sardana et al. 2023, arXiv 2401.00448, ask
        for the least such C at a given loss: its optimum is the one here.)
    served_tokens
        T, in tokens; 0 gives the training optimum.
    cost
        Training FLOPs per token as a function of N.

    Raises
    ------
    InputError
        If C is not positive or T negative, if the budget leaves less than one parameter or token,
        or the law is not one of N and D.

    Examples
    --------
    Chinchilla's FLOPs, to be shared with two trillion served tokens:

    >>> from analysis.laws import PUBLISHED
    >>> paper = PUBLISHED["besiroglu-2024"]
    >>> best = served_optimum(paper.law, paper.theta, 5.88e23, 2e12, FlopsPerToken.six_n())
    >>> round(best.params / 1e9), round(best.tokens / 1e12, 1)
    (40, 1.8)
    """
    _positive("C", flops, "FLOPs")
    if not (math.isfinite(served_tokens) and served_tokens >= 0.0):
        raise InputError(f"served tokens are {served_tokens}; they must be 0 or more")
    _terms(law, theta)
    x, y = _served(law, theta, flops, served_tokens, cost)
    if x < 0.0 or y < 0.0:
        raise InputError(
            f"{flops:.3g} FLOPs cannot train a model that serves {served_tokens:.3g} tokens: "
            "N or D would be less than one; raise the budget or serve less"
        )
    _, best = _at(law, theta, x, y, cost)
    per_token = float(np.exp(cost.log_and_slope(x)[0]))
    return ServedOptimum(
        params=best.params,
        tokens=best.tokens,
        loss=best.loss,
        served_tokens=served_tokens,
        training_flops=per_token * best.tokens,
        serving_flops=per_token * served_tokens * FORWARD,
    )


def _served(
    law: Law, theta: FloatArray, flops: float, served_tokens: float, cost: FlopsPerToken
) -> tuple[float, float]:
    """The ln N and ln D of least loss with c(N) (D + T/3) = C."""
    terms = _terms(law, theta)
    x = log_optimal_params(theta, flops, cost)
    log_c, serving = math.log(flops), served_tokens * FORWARD
    if serving == 0.0:
        return x, log_c - float(cost.log_and_slope(x)[0])

    def tokens(x: float) -> float:
        return math.exp(log_c - float(cost.log_and_slope(x)[0])) - serving

    def spare(x: float) -> float:
        """Log of what tokens still gain over what N does: positive above the optimum."""
        d = tokens(x)
        if d <= 0.0:
            return math.inf
        slope = float(cost.log_and_slope(x)[1])
        gain = _balance(terms) + terms.alpha * x + math.log(slope) - terms.beta * math.log(d)
        return gain + math.log1p(serving / d)

    if spare(x) <= 0.0:  # a service too small to tell
        return x, math.log(tokens(x))
    low, high, step = x, x, 1.0
    while spare(low) >= 0.0:
        low, high, step = low - step, low, 2.0 * step
        if low < _LEAST_LOG:
            return low, low
    # A service may use the whole budget at the larger end: no tokens, no finite value there.
    while math.isinf(spare(high)):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return middle, -math.inf
        low, high = (low, middle) if spare(middle) >= 0.0 else (middle, high)
    x = float(brentq(spare, low, high, xtol=1e-12, rtol=1e-14))
    return x, math.log(tokens(x))
