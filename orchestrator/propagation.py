"""Which of the driver's environment variables Ray Tune copies to its workers: no secrets.

Tune puts some of the driver's variables, those with the keys of AWS among them, into the runtime
environment of each worker, which Ray writes into log files that everybody on the node may read;
and there they would override the node's own role.
"""

from __future__ import annotations

import os

SETTINGS = ("RAY_", "TRAIN_", "TUNE_")
"""How the names of Ray's own settings begin."""
SECRETS = "AWS_"


def keep_secrets_here() -> str | None:
    """Have Ray Tune copy no variables but Ray's own settings; call it before a `Tuner` runs.

    Returns a warning if this Ray keeps their names elsewhere, and there are secrets to copy. (Tried
    with Ray 2.60, where they are a set in a private module.)
    """
    import ray
    from ray.tune.execution import class_cache

    names = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", None)
    if isinstance(names, set):
        names.difference_update([name for name in names if not name.startswith(SETTINGS)])
        return None
    if not any(name.startswith(SECRETS) for name in os.environ):
        return None
    return (
        f"Ray {ray.__version__} may write {SECRETS}* variables of this process into its logs: "
        "isoflop does not know where this version keeps their names. Unset them, or use Ray 2.60"
    )
