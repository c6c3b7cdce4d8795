"""The order in which trials start: one policy, used by the sweep and by the makespan forecast.

List scheduling with backfilling. The first trial that does not fit holds a reservation, so that no
wide trial starves while narrow ones keep coming; others pass it only if they end before the room is
there, or take none of it. A pure state machine: it is told what happens, and says what is next.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.budget import Caps, Purse
from cluster.machines import Cluster
from cluster.placement import Placement
from cluster.room import NONE, Held, Names, Reservation, Room, Spot

LEAST_SECONDS = 1.0
"""What any trial is taken to last: with zeros, those of no length would always pass a wide one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trial as the queue sees it."""

    key: str
    placement: Placement
    seconds: float
    """Expected."""
    flops: float = 0.0

    @property
    def gpu_seconds(self) -> float:
        """GPUs x seconds; 0 on a core."""
        return self.placement.gpus * self.seconds


Ranking = Callable[[Job], float]
"""The higher, the earlier. Within a class it must be longest first."""

ORDERS: dict[str, Ranking] = {
    "longest first": lambda job: job.seconds,
    "largest first": lambda job: job.seconds * _width(job),
    "widest first": lambda job: _width(job) + job.seconds / (1e9 + job.seconds),
}
"""By time (Graham 1969, LPT), by GPU-seconds, by GPUs and then time. On 500 trials of mixed classes
the first comes within 2% of the bound, the second within 7%, the third within 16%; with few trials
another may win."""


def _width(job: Job) -> float:
    return job.placement.gpus or job.placement.cpus


@dataclass
class _Running:
    job: Job
    started: float
    begun: bool = False
    """Whether it was told that it runs."""
    nodes: frozenset[str] | None = None
    """Names, once they are known; until then the room is a guess."""
    settled: bool = False
    """Whether the purse has what it took."""


class Queue:
    """What waits, what runs where, and what is next.

    Every time is in seconds on one clock of the caller's, and never goes back.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        cluster: Cluster,
        *,
        order: str = "longest first",
        slots: int | None = None,
        caps: Caps | None = None,
    ) -> None:
        self._ranking = ORDERS[order]
        self._slots = slots
        self._purse = Purse(caps or Caps())
        self._room = Room(cluster)
        self._waiting: dict[tuple[Placement, Names], list[tuple[float, str]]] = {}
        self._avoided: dict[str, Names] = {}  # nodes, by key
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, _Running] = {}
        self._apart: dict[str, _Running] = {}  # room in which nothing runs, by name
        self._crowded = False  # whether something runs that has no room, for all that is known
        self.held: dict[str, str] = {}
        """Keys of trials that are not started, with the cap that holds them back."""
        self.kept_back: frozenset[str] = frozenset()
        """Keys of trials that are not started because the caller said so."""
        for job in jobs:
            self._jobs[job.key] = job
            self._wait(job)
        self._admit()

    @property
    def waiting(self) -> int:
        """Trials that may still start."""
        return sum(map(len, self._waiting.values()))

    @property
    def waiting_keys(self) -> frozenset[str]:
        """Their keys."""
        return frozenset(key for jobs in self._waiting.values() for _, key in jobs)

    @property
    def running(self) -> frozenset[str]:
        """Keys of the trials that were handed out and have not come back."""
        return frozenset(self._running)

    def job(self, key: str) -> Job:
        """A trial, wherever it is."""
        return self._jobs[key]

    def next(self, now: float) -> str | None:
        """The trial to start now, from then on taken as running; None while none should.

        Ask again until it is None, and then when something has ended or a node has joined.
        """
        self._expire(now)
        found = None if self._full else self._pick(now)
        return None if found is None else self._start(*found, now)

    def relay(self, key: str, now: float) -> str | None:
        """The trial that follows `key`, which ends now, in its room and its process.

        None if the next in turn is of another class, or there is none. `key` holds its room then
        until it has `ended`, which is when its process has gone.
        """
        run = self._running[key]
        self._settle_account(run, now)
        self._expire(now)
        held = self._room.release(key)
        if held is None:
            return None
        found = self._pick(now, held)
        if found is None or found[0].placement != run.job.placement or found[1] != held.spot:
            self._room.take(key, *held)
            return None
        del self._running[key]
        follower = self._start(*found, now)
        self._running[follower].nodes = run.nodes
        return follower

    def _pick(self, now: float, held: Held | None = None) -> tuple[Job, Spot] | None:
        """The next trial, and the room for it; of the class of `held` there, if that may be."""
        blocked: Job | None = None
        kept: Reservation | None = None
        for job in self._heads():
            but = self._avoids(job)
            here = held.spot if held is not None and held.placement == job.placement else None
            if here is not None and not but.isdisjoint(self._room.named(here)):
                here = None
            spot = here or self._room.find(job.placement, but=but)
            if spot is None:
                blocked = blocked or (job if self._room.could_hold(job.placement) else None)
                continue
            if blocked is None:
                return job, spot
            kept = kept or self._room.reserve(blocked.placement, now, but=self._avoids(blocked))
            passing = self._passing(job, spot, kept, now)
            if passing:
                return passing
        return None

    def where(self, key: str) -> str | None:
        """The node, or the first of several, on which there is room for a trial that runs."""
        return self._room.where(key)

    def avoid(self, key: str, node: str) -> bool:
        """Start a trial that runs on other nodes than this from now on; whether any could hold it.

        If none could, it starts anywhere.
        """
        self._avoided[key] = self._avoided.get(key, NONE) | {node}
        return bool(self._avoids(self._jobs[key]))

    def started(self, key: str, nodes: Iterable[str], now: float) -> None:
        """`key` runs on these nodes, whatever was guessed; on some, if none is given.

        Its time counts from when this is told first: it may have waited for others' trials.
        """
        run = self._running[key]
        run.nodes = frozenset(nodes) or None
        if not run.begun:
            run.begun, run.started = True, now
        self._settle()

    def ended(self, key: str, now: float) -> None:
        """`key` has ended for good, or what was `set_apart` by that name."""
        self._leave(key, now)

    def lost(self, key: str, now: float) -> None:
        """`key` has to start again and takes its place in the order."""
        self._wait_again(self._leave(key, now))

    def set_apart(self, key: str, name: str, seconds: float, now: float) -> None:
        """Have `key` start again, and nothing else in its room until `name` has `ended`.

        That is expected in so many seconds.
        """
        run = self._running.pop(key)
        self._settle_account(run, now)
        job = Job(key=name, placement=run.job.placement, seconds=seconds)
        self._jobs[name] = job
        self._apart[name] = _Running(job, now, begun=True, nodes=run.nodes, settled=True)
        room = self._room.release(key)
        if room is not None:
            self._room.take(name, room.placement, room.spot, now + _length(job))
        self._wait_again(run.job)

    def keep_back(self, but: Collection[str] = ()) -> None:
        """Start none of the trials that wait now, `but` these, until `let_go`."""
        chosen = self.waiting_keys - set(but)
        for key in chosen:
            self._remove(self._jobs[key])
        self.kept_back |= chosen

    def let_go(self) -> None:
        """Have the trials that were kept back wait again."""
        for key in self.kept_back:
            self._wait(self._jobs[key])
        self.kept_back = frozenset()
        self._admit()

    def move(self, cluster: Cluster) -> None:
        """The cluster is now this one: nodes have joined or left. What ran there must be `lost`."""
        self._settle(Room(cluster))

    @property
    def _full(self) -> bool:
        return self._slots is not None and len(self._running) >= self._slots

    def _heads(self) -> list[Job]:
        """The longest trial of each class that may go to the same nodes, in order of priority."""
        heads = [self._jobs[jobs[0][1]] for jobs in self._waiting.values() if jobs]
        return sorted(heads, key=lambda job: (-self._ranking(job), job.key))

    def _passing(
        self, job: Job, spot: Spot, kept: Reservation | None, now: float
    ) -> tuple[Job, Spot] | None:
        """Of the class of `job`, the longest that does not delay what room is kept for."""
        if kept is None or _length(job) <= kept.time - now:
            return job, spot
        if self._room.is_beside(spot, job.placement, kept):
            return job, spot
        beside = self._room.find(job.placement, kept, but=self._avoids(job))
        if beside is not None:
            return job, beside
        jobs = self._waiting[self._class(job)]
        first = bisect_left(jobs, (-(kept.time - now), ""))
        return (self._jobs[jobs[first][1]], spot) if first < len(jobs) else None

    def _start(self, job: Job, spot: Spot, now: float) -> str:
        self._remove(job)
        self._room.take(job.key, job.placement, spot, now + _length(job))
        self._running[job.key] = _Running(job, now)
        self._purse.commit(job.flops, job.gpu_seconds)
        return job.key

    def _wait_again(self, job: Job) -> None:
        self._purse.commit(-job.flops, 0.0)  # promised again when it starts again
        self._wait(job)
        self._admit()

    def _leave(self, key: str, now: float) -> Job:
        run = self._running.pop(key, None) or self._apart.pop(key)
        self._room.release(key)
        if self._crowded:
            self._settle()
        self._settle_account(run, now)
        return run.job

    def _settle_account(self, run: _Running, now: float) -> None:
        """Replace what a trial was expected to take by what it took, once."""
        if run.settled:
            return
        run.settled = True
        taken = run.job.placement.gpus * (now - run.started)
        if self._purse.settle(run.job.gpu_seconds, taken):
            self._admit()

    def _settle(self, room: Room | None = None) -> None:
        """Lay out anew what runs: first what is known to be somewhere, then the rest, by guess.

        A guess stays what it was, since that is where the trial was sent, as long as there is room.
        What finds no room holds none: the guess was wrong, or its node has gone.
        """
        sent: dict[str, Names] = {}
        taken = self._running | self._apart
        for key in taken:
            held = self._room.release(key)
            sent[key] = self._room.named(held.spot) if held is not None else NONE
        self._room = room or self._room
        self._crowded = False
        for key, run in sorted(taken.items(), key=lambda item: item[1].nodes is None):
            placement = run.job.placement
            spot = self._room.on(run.nodes or sent[key], placement)
            if spot is None and not run.nodes:
                spot = self._room.find(placement, but=self._avoids(run.job))
            if spot is None:
                self._crowded = True
            else:
                self._room.take(key, placement, spot, run.started + _length(run.job))

    def _class(self, job: Job) -> tuple[Placement, Names]:
        return job.placement, self._avoided.get(job.key, NONE)

    def _avoids(self, job: Job) -> Names:
        """Nodes on which a trial is not started; none if no other could hold it."""
        avoided = self._avoided.get(job.key, NONE)
        could = avoided and self._room.could_hold(job.placement, but=avoided)
        return avoided if could else NONE

    def _wait(self, job: Job) -> None:
        insort(self._waiting.setdefault(self._class(job), []), (-_length(job), job.key))

    def _remove(self, job: Job) -> None:
        jobs = self._waiting[self._class(job)]
        del jobs[bisect_left(jobs, (-_length(job), job.key))]

    def _expire(self, now: float) -> None:
        """Hold back what would end after the deadline: the longest of each class come first."""
        left = self._purse.seconds_left(now)
        for jobs in self._waiting.values():
            while jobs and self._jobs[jobs[0][1]].seconds > left:
                self.held[jobs.pop(0)[1]] = "deadline"

    def _admit(self) -> None:
        """Let in what the caps on spending allow, the cheapest first, and hold back the rest.

        So the most trials are trained; what a trial took less than expected lets in others.
        """
        if self._purse.unlimited:
            return
        spending = {key for key, cap in self.held.items() if cap != "deadline"}
        keys = spending | {key for jobs in self._waiting.values() for _, key in jobs}
        self._waiting = {}
        self.held = {key: cap for key, cap in self.held.items() if key not in keys}
        jobs = [self._jobs[key] for key in keys]
        purse = self._purse.copy()
        for job in sorted(jobs, key=lambda job: (job.gpu_seconds, job.flops, job.key)):
            broken = purse.broken(job.flops, job.gpu_seconds)
            if broken:
                self.held[job.key] = broken
            else:
                purse.commit(job.flops, job.gpu_seconds)
                self._wait(job)


def _length(job: Job) -> float:
    return max(LEAST_SECONDS, job.seconds)
