"""Which rows of a ledger a fit takes, by what plans asked for them as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa

from analysis.observations import ObservationId, observation_ids
from analysis.rungs import PROBES, is_probe
from orchestrator.planner import Role


def of_roles(
    table: pa.Table, asked: Mapping[ObservationId, frozenset[Role]], roles: tuple[Role, ...]
) -> tuple[pa.Table, dict[str, int]]:
    """Rows that some plan asks for in one of `roles`, or that none asks for; and why not others.

    A row says itself that it is a probe's, so that none enters a fit where its plan is not known.
    """
    kept, excluded = [], Counter[str]()
    marks = is_probe(table).to_pylist()
    for name, probe in zip(observation_ids(table), marks, strict=True):
        found = asked.get(name, frozenset())
        known = not found or not found.isdisjoint(roles)
        kept.append("probe" in roles if probe else known)
        if not kept[-1]:
            reason = PROBES if probe else f"asked for as {' and '.join(sorted(found))} only"
            excluded[reason] += 1
    return table.filter(pa.array(kept, pa.bool_())), dict(excluded)
