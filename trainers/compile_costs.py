"""What compiling a training for a GPU costs and saves, as the trainer and forecasts take it.

Own allowances, none measured on a GPU yet. A ledger's rows take their place in forecasts.
"""

COMPILE_SECONDS = 15.0
"""Seconds to compile one block and one chunk of the loss, forward and backward, in one process."""
EAGER_FACTOR = 1.5
"""Time of training that is not compiled, over that of training that is: compiling is taken to save
a third. A training that would take longer to compile than that saves is not compiled."""
LAUNCH_SECONDS_PER_BLOCK = 0.4e-3
"""Least seconds of an eager pass through a block: a step of the model and its optimiser launches 37
to 41 kernels a block (counted by a TorchDispatchMode), at about 10 microseconds each."""
