"""Nodes on which nothing is started for a while."""

from __future__ import annotations

from collections.abc import Callable

AGAIN_SECONDS = 300.0
"""Until such a node is tried again."""
LEFT_OUT = f"nothing more is started there for {AGAIN_SECONDS / 60:.0f} minutes"
FRUITLESS = 3
"""So many trials that a node ended without a row, and none with one, while another gave a row, are
its fault."""


class Nodes:
    """Those that cannot work on the sweep, and those that end trials which others would not.

    Of the latter one at least that gives rows is never left out.
    """

    def __init__(self, clock: Callable[[], float], told: Callable[[str, str], None]) -> None:
        """Nothing is known yet; `told` is called with a node's id, and why it is left out."""
        self._clock, self._told = clock, told
        self._unfit: dict[str, float] = {}  # until when
        self._accused: dict[str, float] = {}  # the same, of those that gave no rows
        self._row_at: dict[str, float] = {}  # when a node gave its last row
        self._ended: dict[str, dict[str, float]] = {}  # trials it ended since then, and when
        self._to_blame: set[str] = set()  # trials that a sound node could not measure either

    @property
    def out(self) -> frozenset[str]:
        """Nodes to start nothing on."""
        now, why = self._clock(), (self._accused, self._unfit)
        return frozenset(node for out in why for node, until in out.items() if until > now)

    def unfit(self, node: str) -> None:
        """It says itself that it cannot work on the sweep."""
        self._unfit[node] = self._clock() + AGAIN_SECONDS

    def row(self, node: str) -> None:
        """A trial on it was measured: it is sound, and those that it could not were to blame."""
        self._row_at[node] = self._clock()
        self._to_blame |= self._ended.pop(node, {}).keys()
        for other, keys in self._ended.items():
            self._ended[other] = {key: at for key, at in keys.items() if key not in self._to_blame}
        self._accused = {n: until for n, until in self._accused.items() if self._suspect(n)}

    def ended(self, node: str, key: str) -> None:
        """A trial on it came back without a row: its fault, unless that of the trial."""
        if key in self._to_blame:
            return
        keys, out = self._ended.setdefault(node, {}), self.out
        keys.setdefault(key, self._clock())
        others = [at for n, at in self._row_at.items() if n != node and n not in out]
        if (
            node not in out
            and self._suspect(node)
            and max(others, default=0.0) > min(keys.values())
        ):
            self._told(node, f"ended {len(keys)} trials and gave no row: {LEFT_OUT}")
            self._accused[node] = self._clock() + AGAIN_SECONDS

    def _suspect(self, node: str) -> bool:
        return len(self._ended.get(node, ())) >= FRUITLESS
