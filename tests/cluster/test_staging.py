"""What travels with a job: a sweep and all files that it names."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import unzip_package

from analysis.errors import InputError
from cluster.package import Package, own_files, packed
from orchestrator.shipping import pack


def _sweep(path: Path, glob: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'name = "x"\ncorpus = {{kind = "files", glob = "{glob}"}}\nbudgets = [1e10]\n')
    return path


@contextmanager
def _unpacked(
    to: Path, files: Mapping[str, Path], directory: Path | None = None
) -> Iterator[Package]:
    """Have a job's files unpacked as Ray does it on a node."""
    with packed(packages=(), files=files, directory=directory) as package:
        unzip_package(
            str(package.path), str(to), remove_top_level_directory=False, unlink_zip=False
        )
        yield package
    assert not package.path.exists()


@pytest.mark.parametrize("glob", ["text/*.txt", "../text/**/*.txt"])
def test_a_sweep_finds_its_corpus_where_it_is_unpacked(tmp_path: Path, glob: str) -> None:
    sweep = _sweep(tmp_path / "here/sweeps/x.toml", glob)
    text = sweep.parent / glob.split("*")[0] / "book.txt"
    text.parent.mkdir(parents=True)
    text.write_text("once")
    shipment = pack(sweep, tmp_path / "here")
    with _unpacked(tmp_path / "job", shipment.files):
        moved = tmp_path / "job" / shipment.sweep
        assert moved.read_text() == sweep.read_text()
        (found,) = moved.parent.glob(glob) if ".." not in glob else moved.parents[1].rglob("*.txt")
        assert found.read_text() == "once"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory with keys in it, and a directory for sweeps."""
    for name in (".ssh/id_ed25519", "keys/id_rsa", "sweeps/.env", "sweeps/text/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"the content of {name}")
    return tmp_path


@pytest.mark.parametrize("glob", ["../.ssh/*", "../keys/id_*", "text/../../keys/*"])
def test_a_sweep_cannot_send_what_lies_elsewhere(home: Path, glob: str) -> None:
    """The author of a downloaded sweep file would like to have keys in a job's files."""
    sweep = _sweep(home / "sweeps/x.toml", glob)
    with pytest.raises(InputError, match=r"names .*/id_\w+, which is not in .*/sweeps and is not"):
        pack(sweep)


@pytest.mark.parametrize("glob", ["../.ssh/*", ".env", ".*"])
def test_a_file_with_a_dot_is_never_sent(home: Path, glob: str) -> None:
    """Not even when its directory was named."""
    with pytest.raises(InputError, match=r"whose names begin with a dot are never sent"):
        pack(_sweep(home / "sweeps/x.toml", glob), home)


@pytest.mark.parametrize(
    ("target", "reason"), [("../keys/id_rsa", "is not in"), (".env", "begin with a dot")]
)
def test_a_link_does_not_lead_out(home: Path, target: str, reason: str) -> None:
    (home / "sweeps/text/b.txt").symlink_to(home / "sweeps" / target)
    sweep = _sweep(home / "sweeps/x.toml", "text/*.txt")
    with pytest.raises(InputError, match=rf"b\.txt, a link to .*, .*{reason}"):
        pack(sweep)
    (home / "sweeps/text/b.txt").unlink()
    (home / "sweeps/linked").symlink_to(home / "sweeps/text")  # this one may be followed
    assert sorted(pack(_sweep(home / "sweeps/x.toml", "linked/*")).files) == [
        "files/linked/a.txt",
        "files/x.toml",
    ]


def test_a_directory_that_a_link_leads_to_is_not_sent(home: Path) -> None:
    (home / "sweeps/data").symlink_to(home / "keys")
    with pytest.raises(InputError, match=r"id_rsa, a link to .*/keys/id_rsa, which is not in"):
        pack(_sweep(home / "sweeps/x.toml", "data/*"))


def test_a_file_elsewhere_is_sent_where_its_directory_was_named(home: Path) -> None:
    shipment = pack(_sweep(home / "sweeps/x.toml", "../keys/*"), home / "keys")
    assert sorted(shipment.files) == ["files/keys/id_rsa", "files/sweeps/x.toml"]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's working directory with much in it that is not to be sent."""
    directory = tmp_path / "mine"
    names = [
        "code.py", "run.sh", "sub/data.txt", "sub/large.bin", ".env", ".git/config", ".ssh/id",
        "sub/.netrc", "venv/x", "__pycache__/y", "build/z", "secret.txt",
    ]  # fmt: skip
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x" * (9 if name == "sub/large.bin" else 1))
    (directory / "run.sh").chmod(0o755)
    (directory / ".gitignore").write_text("secret.txt\nbuild/\n")
    (directory / "sub/.gitignore").write_text("data.txt\n")
    (directory / "build/out").symlink_to("/etc")  # ignored, and so no matter
    (directory / "sub/again").symlink_to(directory)  # for ever
    os.mkfifo(directory / "sub/pipe")
    return directory


def test_of_a_working_directory_no_dotfile_and_nothing_ignored_is_sent(
    mine: Path, tmp_path: Path
) -> None:
    with _unpacked(tmp_path / "job", {}, mine) as package:
        assert package.summary == (
            "3 files of yours, 11 bytes (the largest is user/sub/large.bin, 9 bytes)"
        )
    unpacked = tmp_path / "job"
    there = [path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()]
    assert sorted(map(str, there)) == ["user/code.py", "user/run.sh", "user/sub/large.bin"]
    assert os.access(unpacked / "user/run.sh", os.X_OK)


@pytest.mark.parametrize("target", ["/etc/passwd", "/etc", "../keys", ".env", ".ssh"])
def test_a_link_out_of_a_working_directory_is_refused(mine: Path, target: str) -> None:
    (mine.parent / "keys").mkdir()
    (mine / "sub/link").symlink_to(mine / target)
    with pytest.raises(InputError, match=r"sub/link leads to .*, which is not to be sent"):
        list(own_files(mine))


def test_equal_content_is_an_equal_package(mine: Path) -> None:
    """Ray keeps a package by the hash of the file."""
    digests = []
    for _ in range(2):
        with packed(packages=(), files={}, directory=mine) as package:
            digests.append(package.path.read_bytes())
        os.utime(mine / "code.py", (1, 1))
    assert digests[0] == digests[1]


def test_all_files_that_a_corpus_names_travel(tmp_path: Path) -> None:
    names = ["prose/a.txt", "code/b.jsonl", "tokenizer [2].json", "held/web.parquet", "d/x/1.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("once")
    (tmp_path / "x.toml").write_text("""
        name = "x"
        budgets = [1e10]
        [corpus]
        kind = "mixture"
        tokenizer = { file = "tokenizer [2].json" }
        heldout = { web = "held/*.parquet" }
        parts = [
            { kind = "files", glob = "prose/*.txt" }, { kind = "files", glob = "code/*.jsonl" },
            { kind = "hugging_face", dataset = "./d", tokens = 1_000_000 },
        ]
    """)
    assert sorted(pack(tmp_path / "x.toml").files) == sorted(
        f"files/{name}" for name in [*names, "x.toml"]
    )
    (tmp_path / "held/web.parquet").unlink()
    with pytest.raises(
        InputError, match=r"no file matches .*held/\*\.parquet, the corpus of x\.toml"
    ):
        pack(tmp_path / "x.toml")


def test_a_corpus_at_an_absolute_path_stays_there(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("once")
    assert len(pack(_sweep(tmp_path / "x.toml", f"{tmp_path}/*.txt")).files) == 1


def test_a_corpus_that_is_not_there_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file matches .*\*\.txt"):
        pack(_sweep(tmp_path / "x.toml", "*.txt"))


def test_a_corpus_too_large_to_travel_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "book.txt").open("w") as file:
        file.truncate(70 << 20)
    files = pack(_sweep(tmp_path / "x.toml", "*.txt")).files
    with (
        pytest.raises(InputError, match="73 MB, more than the 67 MB"),
        packed(packages=(), files=files),
    ):
        pass
