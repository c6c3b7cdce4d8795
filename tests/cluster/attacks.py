"""What another user of the machine tries with files."""

from __future__ import annotations

from tests.strangers import run

LIST = "os.listdir(sys.argv[1])"
READ = "open(sys.argv[1]).read()"
WRITE = "open(sys.argv[1], 'w').write('theirs')"
MOVE = "os.rename(sys.argv[1], sys.argv[1] + '-moved')"


def is_refused(statement: str, path: object) -> bool:
    """Return whether another user who does this with a path is refused."""
    program = f"""
try:
    {statement}
except PermissionError:
    print("true")
else:
    print("false")
"""
    return bool(run(program, path))
