"""Runs train_gpt.py, which knows nothing of isoflop, and says in JSON lines what it prints.

python adapter.py CHECKPOINTS SCRATCH LEARNING_RATE OPTIONS_OF_TRAIN_GPT...
"""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

RATE = 0.25
"""Of the recipe's rate: tried at three widths, since the recipe was tuned for another model."""


def tell(**line: object) -> None:
    """One line for isoflop."""
    print(json.dumps(line), flush=True)


def main() -> int:
    """Train, from the checkpoint if there is one; the exit status is the training's."""
    checkpoints, scratch, given, *options = sys.argv[1:]
    rate = RATE * float(given)
    text = Path(scratch, "input.txt")  # yours is on the disk already: name it in the sweep
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    text.write_bytes(b"\n".join(module.read_bytes() for module in modules))
    command = [sys.executable, "train_gpt.py", f"--data={text}", f"--out_dir={checkpoints}"]
    command += [f"--learning_rate={rate}", f"--min_lr={0.1 * rate}"]
    command += [*options, *(["--resume"] if Path(checkpoints, "ckpt.pt").exists() else [])]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    result: dict[str, object] = {}
    for line in training.stdout or ():
        print(line, end="", flush=True)
        if found := re.match(r"number of parameters: (\d+), of which in blocks: (\d+)", line):
            result |= {"params_total": int(found[1]), "params_non_embedding": int(found[2])}
        elif found := re.match(r"iter (\d+): loss (\S+),", line):
            tell(step=int(found[1]), train_loss=float(found[2]))
        elif found := re.match(r"step (\d+): train loss (\S+), val loss (\S+)", line):
            step, train, heldout = int(found[1]), float(found[2]), float(found[3])
            tell(step=step, train_loss=train, heldout_loss=heldout)
            result["loss"] = heldout
        elif found := re.match(r"saved .* at iter (\d+)", line):
            tell(checkpoint=int(found[1]))
    if training.wait() == 0:
        tell(**result)
    return training.returncode


if __name__ == "__main__":
    sys.exit(main())
