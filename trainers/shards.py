"""Documents to stored tokens: in parallel processes, in bounded memory, the held-out part apart.

Each process tokenises one unit of documents at a time into a file of its own, with a record of each
document. When all are there, `trainers.joining` makes a store of them.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from analysis.visible import visible
from trainers.batches import Tokens
from trainers.documents import Document, Span, UnfitError, read
from trainers.holdout import document_hash
from trainers.joining import RECORD, Need, Seen, Taken, join
from trainers.tokenizer import Tokenizer

ENCODED_BYTES = 1 << 20
"""Text that is given to the tokenizer at a time."""
CHECKED_BYTES = 1 << 16
"""Of these, text of which it is seen whether it comes back from its tokens, about."""
SERIAL_UNITS = 2
"""So few units are done before other processes would have started."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one process tokenises at a time: parts of files, or documents themselves."""

    spans: tuple[Span, ...] = ()
    texts: tuple[bytes, ...] = ()
    size: int
    """For the progress bar."""


def build(
    place: Path,
    units: Iterable[Unit],
    *,
    name: str,
    column: str,
    tokenizer: Tokenizer,
    excluded: NDArray[np.uint64],
    untrained: NDArray[np.uint64],
    all_heldout: bool = False,
    need: Need | None = None,
    total: int | None = None,
    processes: int | None = None,
) -> None:
    """Tokenise `units` into the directory `place`.

    `name` is for the progress bar and errors, `column` that of a row's text. Documents whose hashes
    are `excluded` are left out, those that are `untrained` are held out here or left out; a set is
    `all_heldout`. It stops where there is as much as `need` says. `total` is the sum of the units'
    sizes, where it is known, and `processes` how many tokenise side by side, None for one a core.

    Raises
    ------
    InputError
        If a document cannot be read, or there is less text than is needed.
    """
    jobs = (
        _Job(unit=unit, column=column, tokenizer=tokenizer, place=str(place / f"unit-{number:07}"))
        for number, unit in enumerate(units)
    )
    taken = Taken(excluded=excluded, untrained=untrained, all_heldout=all_heldout)
    with (
        _bar(f"tokenising {name}", total) as advance,
        closing(_in_order(jobs, processes or _cores())) as done,
    ):
        for job, seen in done:
            taken.add(Path(job.place), seen)
            advance(job.unit.size)
            if need is not None and taken.satisfies(need):
                break
        else:
            taken.refuse_too_few(name, need)
    join(place, taken, tokenizer)


@dataclass(frozen=True, kw_only=True)
class _Job:
    unit: Unit
    column: str
    tokenizer: Tokenizer
    place: str


def documents(unit: Unit, column: str) -> Iterator[tuple[Document, str]]:
    """Its documents, and the files that they are from."""
    for span in unit.spans:
        for document in read(span, column):
            yield document, span.path
    for text in unit.texts:
        yield Document(text, True), "a document"


def _tokenise(job: _Job) -> Seen:
    """Write tokens and records of one unit."""
    seen = Seen()
    with open(f"{job.place}.tokens", "wb") as tokens, open(f"{job.place}.records", "wb") as records:
        batch: list[tuple[Document, str]] = []
        size = 0
        for document, path in documents(job.unit, job.column):
            if not document.text:
                seen += Seen(empty=1)
                continue
            batch.append((document, path))
            size += len(document.text)
            if size >= ENCODED_BYTES:
                seen += _write(batch, job.tokenizer, tokens, records)
                batch, size = [], 0
        return seen + _write(batch, job.tokenizer, tokens, records)


def _write(
    batch: list[tuple[Document, str]], tokenizer: Tokenizer, tokens: BinaryIO, records: BinaryIO
) -> Seen:
    try:
        encoded = tokenizer.encode([document.text for document, _ in batch])
    except UnicodeDecodeError:
        for document, path in batch:
            try:
                document.text.decode()
            except UnicodeDecodeError as error:
                raise UnfitError(
                    f"{path} is not UTF-8 ({error.reason}, {error.object[error.start]:#x}): "
                    'convert it, or set tokenizer = "bytes"'
                ) from error
        raise
    separator = np.array([tokenizer.separator], dtype=tokenizer.dtype)
    for (document, _), ids in zip(batch, encoded, strict=True):
        tokens.write(ids.data)
        if document.ends:
            tokens.write(separator.data)
    made = np.empty(len(batch), RECORD)
    made["hash"] = [document_hash(document.text) for document, _ in batch]
    ends = np.array([document.ends for document, _ in batch], dtype=np.int64)
    made["tokens"] = ends + np.array([len(ids) for ids in encoded], dtype=np.int64)
    made["bytes"] = ends + np.array([len(d.text) for d, _ in batch], dtype=np.int64)
    records.write(made.data)
    return _checked([document.text for document, _ in batch], encoded, tokenizer)


def _checked(texts: list[bytes], encoded: list[Tokens], tokenizer: Tokenizer) -> Seen:
    """Whether some of those texts, evenly spread, come back from their tokens."""
    every = max(1, sum(map(len, texts)) // CHECKED_BYTES)
    sample = list(zip(texts, encoded, strict=True))[::every]
    return Seen(
        checked=sum(len(text) for text, _ in sample),
        lost=sum(tokenizer.lost(text, tokens) for text, tokens in sample),
    )


def _in_order(jobs: Iterator[_Job], processes: int) -> Generator[tuple[_Job, Seen], None, None]:
    """Each job and what `_tokenise` gave for it, in their order, few of them ahead."""
    first = list(islice(jobs, SERIAL_UNITS + 1))
    jobs = chain(first, jobs)
    if processes == 1 or len(first) <= SERIAL_UNITS:
        yield from ((job, _tokenise(job)) for job in jobs)
        return
    # Not forked: this process may have threads, which a fork leaves holding their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)
    waiting: deque[tuple[_Job, Future[Seen]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(_tokenise, job)))
            if len(waiting) > 2 * processes:
                job, done = waiting.popleft()
                yield job, done.result()
        while waiting:
            job, done = waiting.popleft()
            yield job, done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Start a process that tokenises: it ends with its parent, also where that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; counts bytes."""
    if not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(visible(description), total=total)
        yield lambda size: shown.advance(task, size)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
