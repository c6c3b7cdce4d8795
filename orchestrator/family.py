"""What a sweep's trials share: the family of buildable shapes, and the corpus."""

from __future__ import annotations

import numpy as np

from analysis.observations import FloatArray, FlopsConvention, ParamsConvention
from analysis.optimum import FlopsPerToken
from orchestrator.spec import SweepSpec
from orchestrator.spec_command import Declared
from trainers.corpus import (
    HuggingFace,
    declared_hash,
    describe,
    domain_windows,
    heldout_windows,
    load,
    require_window,
    require_windows,
)
from trainers.corpus import vocabulary as corpus_vocabulary
from trainers.flops import flops_per_token, params
from trainers.shape import Shape
from trainers.trial import CorpusId

SIMULATED_VOCABULARY = 256


def vocabulary(spec: SweepSpec) -> int:
    """Symbols of the models of a sweep."""
    if spec.trainer == "simulated":
        return SIMULATED_VOCABULARY
    source = spec.corpus
    return source.vocabulary if isinstance(source, Declared) else corpus_vocabulary(source)


def family(spec: SweepSpec) -> list[Shape]:
    """Every buildable shape of a sweep, narrowest first."""
    return spec.shapes.family(vocabulary(spec), spec.recipe.rules.architecture)


def family_params(spec: SweepSpec, convention: ParamsConvention) -> tuple[list[Shape], FloatArray]:
    """Every buildable shape of a sweep, and its N, ascending."""
    shapes = family(spec)
    return shapes, np.array([getattr(params(s), convention) for s in shapes], dtype=np.float64)


def family_cost(
    spec: SweepSpec, *, params: ParamsConvention, flops: FlopsConvention
) -> FlopsPerToken:
    """Training FLOPs a token of a sweep's family of shapes as a function of N."""
    if flops == "6nd":
        return FlopsPerToken.six_n()
    shapes, n = family_params(spec, params)
    return FlopsPerToken(n, np.array([flops_per_token(shape) for shape in shapes]))


def corpus_caution(spec: SweepSpec) -> str | None:
    """Why rows of one key may come to be of different text, unnoticed; None where they cannot."""
    source = spec.corpus
    if spec.trainer == "simulated" or not isinstance(source, HuggingFace) or not source.unpinned:
        return None
    return (
        f"corpus: {describe(source)} is known by what is declared of it, and "
        f"{' and '.join(source.unpinned)} may come to name other text, which nothing would notice: "
        "write a commit there"
    )


def corpus_id(spec: SweepSpec) -> CorpusId:
    """The corpus of a sweep's trials: its hashes, and its length where that is known.

    Raises
    ------
    InputError
        If the corpus cannot be read, or has not one window to train on or to be measured on.
    """
    if spec.trainer == "simulated":
        return CorpusId(name="none", hash="", heldout_hash="", train_tokens=0, source=None)
    source, context = spec.corpus, spec.shapes.context
    if isinstance(source, Declared):  # only the command's program can read it
        require_window(source.name, source.tokens, context)
        return CorpusId(
            name=source.name,
            hash=source.hash,
            heldout_hash=source.hash,
            train_tokens=source.tokens,
            source=None,
        )
    if isinstance(source, HuggingFace):  # planned without downloading it
        require_window(describe(source), source.train_tokens, context)
        declared = declared_hash(source)
        return CorpusId(
            name=describe(source),
            hash=declared,
            heldout_hash=declared,
            train_tokens=source.train_tokens,
            source=source,
        )
    corpus = load(source)
    require_windows(corpus, context)
    heldout_windows(corpus, context)
    for domain in corpus.domains.values():
        domain_windows(domain, context)
    return CorpusId(
        name=corpus.name,
        hash=corpus.hashes[0],
        heldout_hash=corpus.hashes[1],
        train_tokens=corpus.train_tokens,
        source=source,
    )
