"""What the driver sends to a worker."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from orchestrator.proof import fingerprint
from orchestrator.spec_running import Checkpoints
from trainers.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the driver wants of a worker: one trial, and under which conditions."""

    trial: Trial
    project: str
    """URI of its storage."""
    generation: int
    """Of the driver's lease."""
    nonce: str
    """What lies in the project, if this node sees the same one as the driver."""
    ranks: int
    """Processes that train it together."""
    gpus: float = 0.0
    """GPUs that Ray gives it: a share of one, or the number of all ranks together."""
    report_seconds: float
    """Between reports of a running trial: each waits for the driver."""
    silent_seconds: float | None
    """After which a trial that gives no sign of life is ended; None is never."""
    checkpoints: Checkpoints
    sources: str = field(default_factory=fingerprint)
    """Which isoflop the driver is."""

    def dump(self) -> str:
        """As text, as Tune carries it."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        nested = {"trial": self.trial.to_dict(), "checkpoints": self.checkpoints.model_dump()}
        return json.dumps(values | nested)

    @staticmethod
    def load(text: str) -> Order:
        """What `dump` made text of."""
        data = json.loads(text)
        trial = Trial.from_dict(data.pop("trial"))
        return Order(trial=trial, checkpoints=Checkpoints(**data.pop("checkpoints")), **data)
