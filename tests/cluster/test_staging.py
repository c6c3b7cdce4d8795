"""What travels with a job: a sweep and all files that it names."""

from pathlib import Path

import pytest

from analysis.errors import InputError
from cluster.submit import Job, staged
from orchestrator.shipping import pack


def _sweep(path: Path, glob: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'name = "x"\ncorpus = {{kind = "files", glob = "{glob}"}}\nbudgets = [1e10]\n')
    return path


@pytest.mark.parametrize("glob", ["text/*.txt", "../text/**/*.txt"])
def test_a_sweep_finds_its_corpus_where_it_is_staged(tmp_path: Path, glob: str) -> None:
    sweep = _sweep(tmp_path / "here/sweeps/x.toml", glob)
    text = sweep.parent / glob.split("*")[0] / "book.txt"
    text.parent.mkdir(parents=True)
    text.write_text("once")
    shipment = pack(sweep)
    with staged(Job(name="x", command=(), packages=(), files=shipment.files)) as directory:
        moved = directory / shipment.sweep
        assert moved.read_text() == sweep.read_text()
        (found,) = moved.parent.glob(glob) if ".." not in glob else moved.parents[1].rglob("*.txt")
        assert found.read_text() == "once"
    assert not directory.exists()


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
        staged(Job(name="x", command=(), packages=(), files=files)),
    ):
        pass
