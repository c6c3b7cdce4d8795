"""Counts the steps that trainers do, from outside of isoflop: Python imports this at its start.

Wherever this directory is on PYTHONPATH and FAULTS_STEPS names a directory, every process that
trains appends a line an event to a file of its own there: time in ns, the trial's key, the step;
step 0 is the start of an attempt. What a killed process has written stays. Where FAULTS_BAD_GPU
names a GPU, whatever trains on that one fails as CUDA would have it.
"""

import os
import sys
import time
from functools import partial
from importlib.machinery import PathFinder

WRAPPED = "trainers.registry"


class Counted:
    """A trainer whose steps are written down before anybody hears of them.

    That is when it asks whether a checkpoint is due: one that is written while its step is not
    would, killed in between, look like a step that nobody did.
    """

    def __init__(self, trainer, file):
        self._trainer, self._file = trainer, file

    def train(self, trial, workspace):
        self._write(trial, 0)
        if os.environ.get("FAULTS_BAD_GPU", "none") == os.environ.get("CUDA_VISIBLE_DEVICES"):
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        yield from self._trainer.train(trial, Watched(workspace, partial(self._write, trial)))

    def _write(self, trial, step):
        os.write(self._file, f"{time.time_ns()} {trial.key} {step}\n".encode())


class Watched:
    """A workspace that tells which steps are done."""

    def __init__(self, inner, tell):
        self._inner, self._tell = inner, tell

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def due(self, step):
        self._tell(step)
        return self._inner.due(step)


class Finder:
    """Wraps `trainer` of the registry as soon as that has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != WRAPPED:
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def wrapped(module):
            execute(module)
            made = module.trainer
            module.trainer = lambda called: Counted(made(called), _file())

        spec.loader.exec_module = wrapped
        return spec


def _file():
    path = os.path.join(os.environ["FAULTS_STEPS"], f"{os.getpid()}.steps")
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


if "FAULTS_STEPS" in os.environ:
    sys.meta_path.insert(0, Finder())
