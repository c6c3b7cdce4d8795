"""Mixtures: shares, passes, held-out sets, and batches that depend on seed and step alone."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from analysis.errors import InputError
from trainers.batches import MIXTURE_BLOCK, Batches, Corpus, heldout_windows, windows_per_pass
from trainers.corpus import Files, Mixture, TokenizerSource, load
from trainers.holdout import document_hash, levels
from trainers.sources import source_from_dict

WEIGHTS = (0.7, 0.25, 0.05)


def _mixture() -> Corpus:
    """Parts whose tokens say which part they are from, and where."""
    parts = []
    for number, weight in enumerate(WEIGHTS):
        place = np.arange(30_000 + 20_000 * number)
        tokens = (place * 3 + number).astype(np.uint32)
        starts = np.arange(0, 3000, 500)
        parts.append((weight, Corpus(f"p{number}", 1 << 20, tokens, tokens[:3000], starts=starts)))
    nothing = np.empty(0, np.uint32)
    return Corpus("mixture", 1 << 20, nothing, nothing, parts=tuple(parts))


def _rows(seed: int, steps: range, sequences: int = 48) -> np.ndarray:
    batches = Batches(_mixture(), context=8, sequences=sequences, seed=seed)
    return np.concatenate([batches.batch(step) for step in steps])


def test_parts_occur_by_weight() -> None:
    """To within one sequence of each a block, so well within what chance would do."""
    part = _rows(3, range(400))[:, 0] % 3
    for blocks in (1, 2, 4):
        counts = np.bincount(part[: blocks * MIXTURE_BLOCK], minlength=3)
        np.testing.assert_allclose(counts, np.array(WEIGHTS) * blocks * MIXTURE_BLOCK, atol=1)
    for start in range(0, len(part) - 1000, 1000):  # and within a block by chance
        share = (part[start : start + 1000] == 0).mean()
        assert abs(share - 0.7) < 4.5 * (0.7 * 0.3 / 1000) ** 0.5


def test_sequences_are_windows_of_one_part() -> None:
    rows = _rows(0, range(20))
    assert (np.diff(rows) == 3).all()


def test_no_window_of_a_part_is_seen_twice_in_a_pass() -> None:
    rows = _rows(1, range(200))
    for number, length in enumerate((30_000, 50_000, 70_000)):
        starts = rows[rows[:, 0] % 3 == number, 0] // 3
        windows = windows_per_pass(length, 8)
        first = starts[:windows]
        assert len(np.unique(first)) == len(first)
        assert len(np.unique(first % 8)) == 1


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    forward = _rows(5, range(300))
    batches = Batches(_mixture(), context=8, sequences=48, seed=5)
    for step in (299, 0, 171, 85, 86, 3):  # blocks end within the 86th batch and others
        np.testing.assert_array_equal(batches.batch(step), forward[step * 48 : (step + 1) * 48])
    assert not np.array_equal(_rows(6, range(1)), forward[:48])
    large = _rows(5, range(2), sequences=48 * 150)
    np.testing.assert_array_equal(large, forward)


def test_heldout_windows_are_shared_out_by_weight() -> None:
    held = heldout_windows(_mixture(), 8, 400)
    part = held.windows[:, 0] % 3
    assert np.bincount(part).tolist() == [280, 100, 20]
    assert len(np.unique(held.segment)) == 18
    for number in range(3):
        assert set(held.segment[part == number]) == set(range(number * 6, number * 6 + 6))


def test_a_short_heldout_part_bounds_the_others_shares() -> None:
    """Of the 374 windows of each, all of the first would be three quarters of 533."""
    held = heldout_windows(_mixture(), 8, 100_000)
    np.testing.assert_allclose(np.bincount(held.windows[:, 0] % 3), [374, 133, 26], atol=1)


def test_a_part_without_one_window_a_pass_is_refused_by_its_name() -> None:
    made = _mixture()
    (weight, last), *others = reversed(made.parts)
    for tokens, fits in ((15, False), (16, True)):
        short = replace(last, train=last.train[:tokens])
        corpus = replace(made, parts=(*others, (weight, short)))
        if fits:
            batches = Batches(corpus, context=8, sequences=400, seed=0)
            assert (batches.batch(0)[:, 0] % 3 == 2).any()
            continue
        with pytest.raises(InputError, match=r"corpus p2 has 15 tokens to train on, .* least 16"):
            Batches(corpus, context=8, sequences=4, seed=0)


def test_one_pass_ends_where_that_of_a_part_does() -> None:
    assert _mixture().train_tokens == int(30_000 / 0.7)


@pytest.fixture
def two(tmp_path: Path, texts: list[str]) -> tuple[Files, Files]:
    """Prose as JSON lines, and as code what has no letter in common with it."""
    code = [f"{number} = [{number}, {number * 7}]\n" * 90 for number in range(300)]
    for name, rows in (("prose", texts), ("code", code)):
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return (
        Files(glob=str(tmp_path / "prose.jsonl"), name="prose", weight=3.0),
        Files(glob=str(tmp_path / "code.jsonl"), name="code", weight=1.0),
    )


def test_parts_share_a_tokenizer_and_are_heldout_sets(
    cache: Path, two: tuple[Files, Files]
) -> None:
    source = Mixture(parts=two, tokenizer=TokenizerSource(train=500))
    made = load(source)
    assert [weight for weight, _ in made.parts] == [0.75, 0.25]
    assert {part.vocabulary for _, part in made.parts} == {500}
    assert set(made.domains) == {"prose", "code"}
    for (_, part), domain in zip(made.parts, ("prose", "code"), strict=True):
        assert made.domains[domain].bytes_per_token == part.bytes_per_token
    shares = [weight * (part.bytes_per_token or 0) for weight, part in made.parts]
    assert made.bytes_per_token == pytest.approx(sum(shares))
    assert made.frequencies.sum() == pytest.approx(1)
    assert source_from_dict(json.loads(json.dumps(_as_dict(source)))) == source


def _as_dict(source: Mixture) -> dict:
    return asdict(source)


def test_weights_and_heldout_sets_are_part_of_the_hashes(
    cache: Path, tmp_path: Path, two: tuple[Files, Files]
) -> None:
    (tmp_path / "web.txt").write_text("somewhere else\n" * 500)
    plain = load(Mixture(parts=two)).hashes
    twice = load(Mixture(parts=tuple(replace(part, weight=part.weight * 2) for part in two))).hashes
    other = load(Mixture(parts=(two[0], replace(two[1], weight=2.0)))).hashes
    more = load(Mixture(parts=two, heldout={"web": str(tmp_path / "web.txt")})).hashes
    assert plain == twice
    assert other[0] != plain[0]
    assert more[0] == plain[0]
    assert more[1] != plain[1]


def test_names_of_parts_and_the_scale_of_weights_are_no_part_of_the_hashes(
    cache: Path, tmp_path: Path, two: tuple[Files, Files]
) -> None:
    """7/10 and .7/1 are two floating-point numbers; names of held-out sets do matter."""
    (tmp_path / "web.txt").write_text("somewhere else\n" * 500)
    (tmp_path / "more.jsonl").write_text((tmp_path / "code.jsonl").read_text().replace("=", "<"))
    three = (*two, Files(glob=str(tmp_path / "more.jsonl"), name="more"))

    def hashes(weights: tuple[float, ...], suffix: str = "", heldout: str = "web") -> object:
        parts = [
            replace(part, weight=weight, name=f"{part.name}{suffix}")
            for part, weight in zip(three, weights, strict=True)
        ]
        tokens = TokenizerSource(train=300)  # what it sees depends on the weights
        sets = {heldout: str(tmp_path / "web.txt")}
        made = load(Mixture(parts=tuple(parts), tokenizer=tokens, heldout=sets))
        assert set(made.domains) == {f"{part.name}{suffix}" for part in three} | {heldout}
        return made.hashes, made.tokenizer

    plain = hashes((7.0, 2.0, 1.0))
    assert (0.7 / (0.7 + 0.2 + 0.1)) != 7 / 10
    assert hashes((0.7, 0.2, 0.1)) == plain
    assert hashes((7.0, 2.0, 1.0), suffix="-2") == plain
    assert hashes((7.0, 2.0, 1.0), heldout="net") != plain
    assert hashes((7.0, 2.0, 1.001)) != plain


def _part(path: Path, documents: list[str], **told: object) -> Files:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return Files(glob=str(path), name=path.stem, **told)


def _documents(tokens: np.ndarray) -> set[bytes]:
    return set(tokens.tobytes().split(b"\n\n")) - {b""}


def test_no_part_trains_on_what_another_holds_out(
    cache: Path, tmp_path: Path, texts: list[str]
) -> None:
    """Of few documents others are held out than by hash alone: of many, a sixteenth of the hashes.

    Of the first part that would be none, of the second most.
    """
    long = [f"{text.strip()}\n" * 5 for text in texts]
    level = levels(np.array([document_hash(text.encode()) for text in long], dtype=np.uint64))
    none = [text for text, zeros in zip(long, level, strict=True) if zeros < 4][:25]
    every = [text for text, zeros in zip(long, level, strict=True) if zeros >= 4]
    own = [f"{text}not elsewhere\n" for text in every[:8]]
    files = [("none", none), ("most", [*every, *own]), ("many", long)]
    parts = tuple(_part(tmp_path / f"{name}.jsonl", documents) for name, documents in files)
    alone = [load(part) for part in parts]
    held = set.union(*(_documents(corpus.heldout) for corpus in alone))
    leaks = [_documents(corpus.train) & held for corpus in alone]
    assert [bool(leak) for leak in leaks] == [False, True, True]
    made = load(Mixture(parts=parts))
    for (_, part), before, leak in zip(made.parts, alone, leaks, strict=True):
        assert _documents(part.heldout) == _documents(before.heldout)
        assert _documents(part.train) == _documents(before.train) - leak
        assert len(before.train) - len(part.train) == sum(len(text) + 2 for text in leak)
        assert part.frequencies.sum() == pytest.approx(1)


def test_a_part_that_others_hold_out_altogether_is_refused(
    cache: Path, tmp_path: Path, texts: list[str]
) -> None:
    long = [text * 5 for text in texts]
    level = levels(np.array([document_hash(text.encode()) for text in long], dtype=np.uint64))
    held = [text for text, zeros in zip(long, level, strict=True) if zeros >= 4]
    parts = _part(tmp_path / "held.jsonl", held), _part(tmp_path / "many.jsonl", long)
    with pytest.raises(InputError, match=r"corpus held has nothing to train on: .* held out"):
        load(Mixture(parts=parts))


def test_parts_that_share_nothing_are_stored_once(cache: Path, two: tuple[Files, Files]) -> None:
    load(Mixture(parts=two))
    assert len([path for path in (cache / "corpora").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": 1}, "needs at least 2 parts, but has 1"),
        ({"tokenizer": TokenizerSource(train=300)}, "a part with a tokenizer of its own"),
        ({"heldout": {"a": "b"}}, "a part with a heldout of its own"),
        ({"weight": 1e-9}, "a part of 3.3e-10 of its weight, less than 0.001"),
        ({"weight": -1.0}, "has weight = -1, but it should be finite and more than 0"),
        ({"name": "prose"}, "two parts or held-out sets called 'prose'"),
    ],
)
def test_an_impossible_mixture_is_refused(
    two: tuple[Files, Files], changes: dict, message: str
) -> None:
    count = changes.pop("parts", 2)
    with pytest.raises(ValueError, match=message):
        Mixture(parts=(two[0], replace(two[1], **changes))[:count])


def test_a_part_without_text_is_named(
    cache: Path, tmp_path: Path, two: tuple[Files, Files]
) -> None:
    nothing = Files(glob=str(tmp_path / "none*.txt"), name="none")
    with pytest.raises(InputError, match=r"no file matches .*none\*\.txt"):
        load(Mixture(parts=(two[0], nothing)))
