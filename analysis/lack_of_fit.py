"""Whether residuals are noise: against scatter that owes nothing to any law, and each other.

Where they are not, intervals made from them are about a law that does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import fdtri

from analysis.approaches import IsoflopFit
from analysis.fitting import Fit, fit
from analysis.laws import loss
from analysis.observations import FloatArray, Observations
from analysis.wording import plural

OVER_REPLICATES = 2.0
"""Residual over replicate standard deviation from which a law is said not to fit."""
OVER_PARABOLAS = 4.0
"""The same over the scatter around parabolas, which three constants a budget keep low."""
_CONFIDENCE = 0.999  # of the F test: by luck alone one study in a thousand is warned of a law
STRAY = 6.0
"""Robust standard deviations from which an observation is said to be a stray one."""
_LEAST_DOF = 12  # below, a fit bends to its worst residual
_EXACT = 1e-5  # residuals of ln L below this are rounding and the optimiser's tolerance


def lack_of_fit(item: Fit, obs: Observations, valleys: IsoflopFit) -> str | None:
    """Say that a law does not describe the observations, or None.

    Parameters
    ----------
    item
        The law, as fitted to `obs`.
    obs
        All observations.
    valleys
        Their parabolas.

    Notes
    -----
    An F test of the law's residual variance of ln L, by more than a fixed factor so that it
    matters. Against replicates, where there are any, the law's own part alone is tested (Draper and
    Smith 1998, section 2.1): residuals less what replicates scatter by themselves.
    """
    scatter, dof = _replicates(obs)
    variance, against, least = item.sigma**2, "of replicates", OVER_REPLICATES
    spare: float = item.dof
    if dof:
        spare = item.dof - dof
        variance = max(item.rss - dof * scatter**2, 0.0) / spare if spare > 0 else 0.0
    else:
        scatter, dof = _around_parabolas(valleys)
        against, least = "around the parabolas", OVER_PARABOLAS
    if dof == 0.0 or item.sigma < max(least * scatter, _EXACT):
        return None
    if variance <= scatter**2 * float(fdtri(spare, dof, _CONFIDENCE)):
        return None
    times = f"{item.sigma / scatter:.1f} times" if scatter > _EXACT else "far more than"
    return (
        f"lack of fit, its residuals ({item.sigma:.2%}) are {times} the scatter {against} "
        f"({scatter:.2%}): these observations do not follow one such law"
    )


def strays(fits: Sequence[Fit], obs: Observations) -> str | None:
    """Say that single observations pull fits by squares, or None.

    Parameters
    ----------
    fits
        Laws, as fitted to `obs`. The last sound one is asked, which bends the most.
    obs
        All observations.

    Notes
    -----
    Those whose residual of ln L, for a row of weight 1, is above 6 robust standard deviations
    (Huber 1981, section 5.1), from a fit by Huber's loss: what pulls a fit by squares has small
    residuals from it. It speaks of one in a hundred sweeps of 28 observations with normal noise; a
    loss that is off by 17 times the noise it told wherever in the grid that was.
    """
    sound = [item for item in fits if item.sound and not np.isfinite(item.method.threshold)]
    if not sound or sound[-1].dof < _LEAST_DOF:
        return None
    item = sound[-1]
    obs = obs.select(obs.weight > 0)
    delta = _robust(item, _residuals(item, obs))
    robust = fit(item.law, obs, method=replace(item.method, objective="huber", delta=delta))
    if not robust.sound:
        return None
    residual = _residuals(robust, obs)
    scale = _robust(robust, residual)
    stray = np.flatnonzero(np.abs(residual) > STRAY * scale)
    if not stray.size:
        return None
    worst = stray[np.argmax(np.abs(residual[stray]))]
    off = np.expm1(residual[worst] / np.sqrt(obs.weight[worst]))
    which = f"{plural(stray.size, 'observation')} {'is' if stray.size == 1 else 'are'}"
    return (
        f"{which} off by more than {STRAY:g} times the usual scatter ({scale:.2%}), the worst by "
        f"{off:+.1%} at N = {obs.params[worst]:.3g}, D = "
        f"{obs.tokens[worst]:.3g}: squares give such points the most weight; --objective huber "
        "gives them little, and what is wrong of them is best left out"
    )


def _residuals(item: Fit, obs: Observations) -> FloatArray:
    """Of ln L, for rows of weight 1."""
    return np.sqrt(obs.weight) * np.log(obs.loss / loss(item.theta, obs.params, obs.tokens))


def _robust(item: Fit, residual: FloatArray) -> float:
    """Standard deviation from the median of absolute residuals, corrected for what a fit takes."""
    median = float(np.median(np.abs(residual)))
    return max(1.4826 * median * math.sqrt(item.n / item.dof), _EXACT)


def _replicates(obs: Observations) -> tuple[float, float]:
    """Pooled standard deviation of ln L, for weight 1, among rows of one N and budget (or D)."""
    log_loss = np.log(obs.loss)
    level = np.where(np.isfinite(obs.budget), obs.budget, -obs.tokens)
    _, index = np.unique(np.stack([obs.params, level], axis=1), axis=0, return_inverse=True)
    weight = np.bincount(index, obs.weight)
    residual = log_loss - (np.bincount(index, obs.weight * log_loss) / weight)[index]
    dof = float(len(obs) - len(weight))
    return (float(np.sqrt(obs.weight @ residual**2 / dof)) if dof else 0.0), dof


def _around_parabolas(valleys: IsoflopFit) -> tuple[float, float]:
    """Pooled residual standard deviation of the parabolas, as a fraction of L, and its freedom."""
    known = [(v.dof, v.sigma) for v in valleys.vertices if v.sigma is not None]
    dof = sum(part for part, _ in known)
    pooled = sum(part * sigma**2 for part, sigma in known)
    return (float(np.sqrt(pooled / dof)) if dof else 0.0), dof
