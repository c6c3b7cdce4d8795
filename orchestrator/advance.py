"""How far an attempt has come in what was ordered, by the events of its trainer."""

from __future__ import annotations

from cluster.rank import Sign
from trainers.trial import Event, Measurement, Progress, Step, Trial


class Advance:
    """Of one attempt at a trial.

    Steps are counted from a trial's beginning, whoever did them, and branches of a trunk with them:
    where on the trunk an attempt begins is known only once a point of the curve is heard of, which
    says what the model has seen.
    """

    def __init__(self, ordered: Trial, left: Trial) -> None:
        """Of the horizons that were ordered, the attempt has those that are `left`."""
        self._left = left
        self._all = ordered.total_steps
        self._over = self._all - sum(ordered.marginal_steps[t] for t in left.measured_at)
        self._begun: int | None = None
        """Steps that were done before this attempt."""
        self._step = 0
        self._point: int | None = None
        """Of the curve, whose step has not been heard of."""
        self._branches: int | None = None
        """Of the steps done before, those of branches."""
        self._ended = 0
        """Steps of the branches that this attempt has ended."""

    def heard(self, event: Event | Sign) -> None:
        """Something of the trainer's, or a sign of life, which says nothing of how far it is."""
        match event:
            case Progress():
                self._point = event.step
            case Measurement():
                steps = event.tokens // self._left.hyperparameters.batch_tokens
                self._ended += steps - self._left.decay_start(event.tokens)
            case Step():
                self._step = event.step
                if self._begun is None:
                    self._begun = event.step - 1
                if self._point is not None:
                    # Of a gang not every step is heard: the least is nearest to the truth.
                    seen = event.step - self._point - self._ended
                    self._branches = seen if self._branches is None else min(self._branches, seen)
                    self._point = None

    @property
    def fraction(self) -> float:
        """Share of the steps that were ordered."""
        done = self._over + self._share * (self._all - self._over)
        return min(1.0, max(0.0, done / self._all))

    @property
    def _share(self) -> float:
        """Of the steps that are left; of a training with one horizon, of all."""
        left, total = self._left, self._left.total_steps
        if not left.horizons:
            return self._step / total
        begun = self._begun or 0
        branches = self._branches
        if branches is None:  # it begins no later than its first branch leaves
            branches = max(0, begun - left.decay_start(left.measured_at[0]))
        return (self._step - begun) / max(1, total - (begun - branches))
