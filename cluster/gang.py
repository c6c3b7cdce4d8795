"""A trial on several GPUs or nodes: one Ray actor a rank, inside the trial's own placement group.

The leader is whatever calls `train_in_gang`: the Tune actor of the trial. It takes nothing of the
group, since every GPU in it belongs to a rank: a `Placement` of several GPUs begins with an empty
bundle, which is the leader's and is not reserved. (Ray Train V2 would reserve a second group beside
the trial's, and may wait for ever.)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.errors import InputError
from cluster.machines import UnfitNodeError
from cluster.rank import Home, MakeWorkspace, Rank, Sign
from cluster.rank_errors import RankError, by_cause, others_in_a_clause
from trainers.registry import trainer
from trainers.template import NODE_GPUS, RANK_ADDRESSES
from trainers.trial import Event, Measurement, Trainer, Trial

if TYPE_CHECKING:
    from ray.exceptions import RayError
    from ray.util.placement_group import PlacementGroup

START_SECONDS = 300.0
"""For all ranks to start. Their room is reserved already; an earlier trial's ranks may still be
leaving it, and a process on a loaded node takes a minute."""
GRACE_SECONDS = 120.0
"""For a rank that is asked to stop: a step and a checkpoint."""
ANSWER_SECONDS = 5.0
"""For a living rank to say that it lives, once another has raised."""
OTHERS_SECONDS = 2.0
"""Seconds to wait for the errors of other ranks once one has raised, since the first to be heard is
often of one that only lost its connection to the one that failed."""
SIGN_SECONDS = 2.0
"""Between questions to the ranks whether they wait for the storage: a small part of any silence
that is worth permitting."""
EVENTS_AHEAD = 64
"""Events that rank 0 may be ahead of the leader, before it waits."""


class GangError(Exception):
    """A rank raised, died or never started, and the gang with it. Says which, where and why.

    A note (PEP 678) holds the rank's own traceback or Ray's account, so `traceback.format_exc` has
    it.
    """

    lost: bool = False
    """Whether a process died or never started, no fault of the trial's; otherwise it raised."""
    home: Home | None = None
    """Place of the rank that raised or died first, if it is known."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a rank sits: its bundle of the group, and its part of what that bundle holds."""

    bundle: int
    resources: Mapping[str, float]


def train_in_gang(
    trial: Trial,
    workspace: MakeWorkspace,
    *,
    make: Callable[[str], Trainer] = trainer,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Event | Sign]:
    """Train `trial` on all ranks of the current placement group, and yield rank 0's events.

    And signs of life of ranks that wait for their workspace, in which time there are no events.

    Every rank runs the trainer, with the environment of `torch.distributed`: RANK, WORLD_SIZE,
    LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. CUDA_VISIBLE_DEVICES names the rank's
    own GPU alone, which is therefore device 0 to it; a command's program sees those of all ranks of
    its node (`NODE_GPUS`). Steps are thinned to a few a second.

    Closing the generator stops the gang with a checkpoint: one becomes due at rank 0's next step,
    and all ranks are ended when it is written, or after `GRACE_SECONDS`. However the generator
    ends, its ranks are ended with it; if the leader's process dies, Ray ends them.

    Parameters
    ----------
    trial
        What is trained. Its trainer must run on as many ranks as there are.
    workspace
        Makes the trial's workspace; called in every rank's process, so it is pickled. Rank 0 alone
        is asked what is due and saves; all ranks see its checkpoints. What it is given to tell
        troubles with has them in the next sign of life.
    make
        Makes a trainer by name, in every rank's process.
    stopping
        Whether the caller wants to stop. Asked while there is no event; if so, a sign follows, so
        that the caller can close the generator.

    Raises
    ------
    GangError
        If a rank raises, dies or does not start. All ranks are ended first.
    InputError
        If the group leaves its ranks no room, or a rank's trainer refuses the trial.
    UnfitNodeError
        If a rank finds that its node cannot train.
    """
    gang = _Gang(_own_group())
    try:
        gang.start(trial, workspace, make)
        yield from gang.events(stopping)
    except GeneratorExit:
        gang.stop()
        raise
    finally:
        gang.end()


def seats(bundles: Sequence[Mapping[str, float]]) -> list[Seat]:
    """One seat a GPU, in the bundles' order; one a core where the group has no GPU.

    Examples
    --------
    >>> [(s.bundle, dict(s.resources)) for s in seats([{"CPU": 4, "GPU": 2}, {"GPU": 1}])]
    [(0, {'CPU': 2.0, 'GPU': 1.0}), (0, {'CPU': 2.0, 'GPU': 1.0}), (1, {'GPU': 1.0})]
    """
    unit = "GPU" if any(bundle.get("GPU") for bundle in bundles) else "CPU"
    made = []
    for i, bundle in enumerate(bundles):
        count = int(bundle.get(unit, 0))
        # The bundle's node has the GPU type; a part of a mark such as 0.001 is too fine for Ray.
        shared = {n: a for n, a in bundle.items() if not n.startswith("accelerator_type:")}
        resources = {name: amount / count for name, amount in shared.items()} if count else {}
        made += [Seat(bundle=i, resources=resources)] * count
    return made


def environments(homes: Sequence[Home]) -> list[dict[str, str]]:
    """The environment of `torch.distributed` of each rank, in the order of ranks."""
    on_node = Counter(home.node for home in homes)
    gpus = {node: ",".join(h.gpu for h in homes if h.node == node and h.gpu) for node in on_node}
    seen: Counter[str] = Counter()
    made = []
    for rank, home in enumerate(homes):
        values = {
            "RANK": rank,
            "WORLD_SIZE": len(homes),
            "LOCAL_RANK": seen[home.node],
            "LOCAL_WORLD_SIZE": on_node[home.node],
            "MASTER_ADDR": homes[0].address,
            "MASTER_PORT": homes[0].port,
            NODE_GPUS: gpus[home.node],
            RANK_ADDRESSES: " ".join(home.address for home in homes),
        }
        made.append({name: str(value) for name, value in values.items()})
        seen[home.node] += 1
    return made


def _own_group() -> PlacementGroup:
    """The placement group that this process runs in, taking no GPU of it."""
    import ray

    group = ray.util.get_current_placement_group()
    if group is None:
        raise RuntimeError("a gang needs a placement group, and this process runs in none")
    # Ray leaves functions like this one without types.
    held: dict[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
    if held.get("GPU"):
        raise InputError(
            f"the leader of a gang holds {held['GPU']:g} GPU of its group, which a rank needs: "
            "put an empty bundle before those of the placement"
        )
    return group


class _Gang:
    """The ranks of one trial, seen from its leader."""

    def __init__(self, group: PlacementGroup) -> None:
        self._actors = [_actor(seat, group) for seat in seats(group.bundle_specs)]
        if not self._actors:
            raise InputError(f"no rank fits into the placement group's {group.bundle_specs}")
        self._homes: list[Home] = []
        self._stream: Any = None
        self._followers: dict[Any, int] = {}
        self._last = 0
        """The last horizon, tokens."""

    def start(self, trial: Trial, workspace: MakeWorkspace, make: Callable[[str], Trainer]) -> None:
        """Wait for all processes, tell them of each other and start training."""
        import ray

        self._last = trial.tokens
        asked = [actor.home.remote() for actor in self._actors]
        _, late = ray.wait(asked, num_returns=len(asked), timeout=START_SECONDS)
        if late:
            ranks = ", ".join(str(asked.index(ref)) for ref in late)
            error = GangError(
                f"of {len(asked)} ranks these found no room in the trial's placement group within "
                f"{START_SECONDS:.0f} s: {ranks}"
            )
            error.lost = True
            raise error
        for rank, ref in enumerate(asked):
            self._homes.append(self._get(ref, rank))
        work = [(env, trial, workspace, make) for env in environments(self._homes)]
        self._stream = (
            self._actors[0]
            .lead.options(num_returns="streaming", _generator_backpressure_num_objects=EVENTS_AHEAD)
            .remote(*work[0])
        )
        for rank, actor in enumerate(self._actors[1:], 1):
            self._followers[actor.follow.remote(*work[rank])] = rank

    def events(self, stopping: Callable[[], bool]) -> Iterator[Event | Sign]:
        """Rank 0's events, as long as every rank is well, and signs of life."""
        import ray

        asked = time.monotonic()
        while True:
            # Followers first: rank 0 is nearly always ready, and only the first is returned.
            waited = [*self._followers, self._stream]
            found, _ = ray.wait(waited, num_returns=1, timeout=SIGN_SECONDS)
            if time.monotonic() - asked >= SIGN_SECONDS:
                yield from self._signs()
                asked = time.monotonic()
            if not found:
                if stopping():
                    yield Sign()
                continue
            (ready,) = found
            if ready in self._followers:
                self._get(ready, self._followers.pop(ready))
                continue
            try:
                ref = next(self._stream)
            except StopIteration:
                return
            event: Event = self._get(ref, 0)
            yield event
            if isinstance(event, Measurement) and event.tokens == self._last:
                return  # nobody waits for the followers' last words

    def _signs(self) -> Iterator[Sign]:
        """Of the ranks that answer; of one that has died its own work tells."""
        import ray

        asked = [actor.sign.remote() for actor in self._actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)
        for ref in answered:
            with suppress(ray.exceptions.RayError):
                sign: Sign | None = ray.get(ref)
                if sign is not None:
                    yield sign

    def stop(self) -> None:
        """Have rank 0 write a checkpoint, for at most `GRACE_SECONDS`. Its events are dropped."""
        import ray

        deadline = time.monotonic() + GRACE_SECONDS
        if self._stream is None:
            return
        self._actors[0].stop.remote()
        while time.monotonic() < deadline:
            ready, _ = ray.wait([self._stream], timeout=max(0.0, deadline - time.monotonic()))
            try:
                if ready:
                    ray.get(next(self._stream))
            except (StopIteration, ray.exceptions.RayError):
                return

    def end(self) -> None:
        """End every rank's process, wherever it is."""
        import ray

        for actor in self._actors:
            ray.kill(actor, no_restart=True)

    def _get(self, ref: Any, rank: int) -> Any:
        """What a rank returned, or the error that says why it did not."""
        import ray

        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            errors = [RankError(rank, error.cause, str(error)), *self._other_errors(rank)]
            # A rank whose peer has died raises too, often before Ray knows of the death.
            dead = self._dead(except_for={other.rank for other in errors})
            if dead:
                raise self._death(*dead) from error
            first, *others = by_cause(errors)
            if isinstance(first.cause, InputError | UnfitNodeError):
                raise first.cause from error
            what = f"raised {type(first.cause).__name__}: {first.cause}"
            failed = _noted(
                f"{self._name(first.rank)} {what}{others_in_a_clause(others)}",
                *(other.account for other in (first, *others)),
            )
            failed.home = self._home(first.rank)
            raise failed from error
        except ray.exceptions.RayActorError as error:
            raise self._death(rank, error) from error

    def _other_errors(self, failed: int) -> Iterator[RankError]:
        """Yield errors that other ranks raise within `OTHERS_SECONDS` after one has `failed`."""
        import ray

        deadline = time.monotonic() + OTHERS_SECONDS
        while True:
            waited = list(self._followers)
            if self._stream is not None and failed:
                waited.append(self._stream)
            left = deadline - time.monotonic()
            if not waited or left <= 0:
                return
            ready, _ = ray.wait(waited, num_returns=1, timeout=left)
            for ref in ready:
                rank = self._followers.pop(ref, 0)
                try:
                    ray.get(ref if rank else next(self._stream))  # rank 0's events are dropped
                except StopIteration:
                    self._stream = None
                except ray.exceptions.RayError as error:  # of one that died is asked next
                    if not rank:
                        self._stream = None
                    if isinstance(error, ray.exceptions.RayTaskError):
                        yield RankError(rank, error.cause, str(error))

    def _dead(self, *, except_for: Collection[int]) -> tuple[int, RayError] | None:
        """One of the other ranks that has died, and Ray's word for it."""
        import ray

        asked = {
            actor.home.remote(): rank
            for rank, actor in enumerate(self._actors)
            if rank not in except_for
        }
        answered: list[Any] = []
        if asked:  # Ray refuses to wait for nothing
            answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        for ref in answered:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                return asked[ref], error
        return None

    def _death(self, rank: int, error: RayError) -> GangError:
        gone = _noted(
            f"{self._name(rank)} died: its process crashed, was killed or lost its node", str(error)
        )
        gone.lost, gone.home = True, self._home(rank)
        return gone

    def _home(self, rank: int) -> Home | None:
        return self._homes[rank] if rank < len(self._homes) else None

    def _name(self, rank: int) -> str:
        name = f"rank {rank} of {len(self._actors)}"
        home = self._home(rank)
        if home is None:
            return f"{name}, which was starting,"
        return f"{name} on node {home.address} ({home.node[:8]}, process {home.pid})"


def _noted(message: str, *notes: str) -> GangError:
    error = GangError(message)
    for note in notes:
        error.add_note(note)
    return error


def _actor(seat: Seat, group: PlacementGroup) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    custom = dict(seat.resources)
    return (
        ray.remote(Rank)
        .options(
            num_cpus=custom.pop("CPU", 0),
            num_gpus=custom.pop("GPU", 0),
            memory=custom.pop("memory", None),
            resources=custom,
            max_concurrency=2,  # so that it answers while it trains
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=seat.bundle
            ),
        )
        .remote()
    )
