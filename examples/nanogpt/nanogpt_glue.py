"""Runs nanoGPT's own train.py as it is, and says in JSON lines what it prints.

python nanogpt_glue.py STEPS CHECKPOINTS OPTIONS_OF_TRAIN_PY...

For a clone of nanoGPT (github.com/karpathy/nanoGPT), in which this file and nanogpt.toml lie. What
its prints mean: "step K" is an evaluation after K updates; "iter K" is the loss of the batch of
update K + 1, by the weights after K; "saving checkpoint" comes before the file is written.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

VOCABULARY = 50304
"""Symbols of the model, as train.py takes them where the data set has no meta.pkl."""


def tell(**line: object) -> None:
    """One line for isoflop."""
    print(json.dumps(line), flush=True)


def interval(steps: int) -> int:
    """Steps between evaluations, of which the last must be that of the last step."""
    return next((steps // n for n in (5, 4, 6, 3, 7, 8, 9, 10, 2) if steps % n == 0), steps)


def parameters(options: dict[str, int]) -> dict[str, int]:
    """Counts of its GPT without biases: its head is its embedding, its positions are learnt."""
    depth, width = options["n_layer"], options["n_embd"]
    blocks = depth * (12 * width**2 + 2 * width) + width
    matmul = blocks + VOCABULARY * width
    total = matmul + options["block_size"] * width
    return {"params_non_embedding": blocks, "params_matmul": matmul, "params_total": total}


def main() -> int:
    """Train, from the checkpoint if there is one; the exit status is the training's."""
    steps, checkpoints, *options = sys.argv[1:]
    given = {k: int(v) for k, v in re.findall(r"--(\w+)=(\d+)(?:\s|$)", " ".join(options))}
    resumed = Path(checkpoints, "ckpt.pt").exists()
    command = [sys.executable, "train.py", *options, f"--out_dir={checkpoints}"]
    command += [f"--max_iters={steps}", f"--lr_decay_iters={steps}"]
    command += [f"--eval_interval={interval(int(steps))}", "--always_save_checkpoint=True"]
    command += [f"--init_from={'resume' if resumed else 'scratch'}"]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    step, saving, loss = 0, False, None
    for line in training.stdout or ():
        if saving:  # whatever is printed next is printed when the file is whole
            saving = False
            tell(checkpoint=step)
        print(line, end="", flush=True)
        if found := re.match(r"step (\d+): train loss (\S+), val loss (\S+)", line):
            step, train, heldout = int(found[1]), float(found[2]), float(found[3])
            tell(step=step, train_loss=train, heldout_loss=heldout)
            loss = heldout if step == int(steps) else None
        elif found := re.match(r"iter (\d+): loss (\S+),", line):
            tell(step=int(found[1]), train_loss=float(found[2]))
        saving = line.startswith("saving checkpoint")
    if training.wait() == 0 and loss is not None:
        tell(loss=loss, **parameters(given))
    return training.returncode


if __name__ == "__main__":
    sys.exit(main())
