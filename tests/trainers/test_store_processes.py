"""Stored corpora: made by processes side by side, by ones that are killed, in bounded memory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.waiting import wait
from trainers.corpus import Files, TokenizerSource, load

BPE = TokenizerSource(train=1000)


def _stores(cache: Path) -> list[Path]:
    return [path for path in (cache / "corpora").iterdir() if path.is_dir()]


def _big(path: Path, megabytes: int) -> None:
    """JSON lines of random words, a megabyte of which is repeated with a number before each row."""
    rng = np.random.default_rng(1)
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(3000)]
    rows = [" ".join(rng.choice(words, 150)) for _ in range(1200)]
    with path.open("w") as file:
        number = 0
        while file.tell() < megabytes << 20:
            for row in rows:
                file.write(f'{{"text": "{number} {row}"}}\n')
                number += 1


_LOAD = """
import json, resource, sys
from trainers.corpus import Files, TokenizerSource, load

if __name__ == "__main__":
    glob, train = sys.argv[1:]
    tokenizer = TokenizerSource(train=int(train)) if train != "0" else "bytes"
    made = load(Files(glob=glob, tokenizer=tokenizer))
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps([made.hashes, len(made.train), *(u.ru_maxrss / 1024 for u in usages)]))
"""


def _start(tmp_path: Path, source: Path, train: int = 0) -> subprocess.Popen[str]:
    script = tmp_path / "load.py"
    script.write_text(_LOAD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, str(script), str(source), str(train)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_half_valid(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "big.jsonl"
    _big(source, 40)
    process = _start(tmp_path, source, 1000)
    wait(lambda: len(list((cache / "corpora").glob("*.tmp/unit-*.tokens"))) >= 3)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert workers
    wait(lambda: all(map(_gone, workers)))
    (left,) = _stores(cache)
    assert left.name.endswith(".tmp")
    out, err = _start(tmp_path, source, 1000).communicate()
    assert out, err
    (store,) = _stores(cache)
    assert not store.name.endswith(".tmp")
    assert not list(store.glob("unit-*"))
    made = load(Files(glob=str(source), tokenizer=BPE))
    assert list(made.hashes) == json.loads(out)[0]
    rows = sum(1 for _ in source.open())
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["train"]["documents"] + manifest["heldout"]["documents"] == rows


@pytest.mark.slow
def test_two_processes_that_want_one_corpus_make_it_once(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "big.jsonl"
    _big(source, 40)
    both = [_start(tmp_path, source) for _ in range(2)]
    outs, errs = zip(*(process.communicate() for process in both), strict=True)
    assert all(outs), errs
    first, second = (json.loads(out) for out in outs)
    assert first[:2] == second[:2]
    assert sum("waiting for it" in err for err in errs) == 1
    assert len(_stores(cache)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("train", [0, 1000])
def test_memory_is_bounded_however_long_the_text_is(
    cache: Path, tmp_path: Path, train: int
) -> None:
    """Ten or four times the text takes no process much more than it did."""
    peaks = []
    for megabytes in (40, 400) if train == 0 else (20, 50):
        source = tmp_path / f"{megabytes}.jsonl"
        _big(source, megabytes)
        out, err = _start(tmp_path, source, train).communicate()
        assert out, err
        peaks.append(json.loads(out)[2:])
        source.unlink()
    (own, children), (own_long, children_long) = peaks
    assert own_long < own + 120
    assert children_long < children + 60
