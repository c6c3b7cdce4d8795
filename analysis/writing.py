"""Files written whole and in place of what had their name: a link there is replaced, not followed.

Who can write into a directory can plant a link in it, and would choose what is written over.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that takes the name `path` when the block ends without an error.

    Until then it lies beside it under a name that nobody can guess, and is removed after an error.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("xb") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
