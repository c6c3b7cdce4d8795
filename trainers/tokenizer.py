"""Text to tokens: bytes, a byte-level BPE trained here, or anybody's tokenizer.json.

The work is done by the library `tokenizers`, of the extra `text`; bytes need no library.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.errors import InputError
from trainers.batches import Tokens
from trainers.sources import TokenizerSource

if TYPE_CHECKING:
    import tokenizers

TRAINED_SEPARATOR = "<|endoftext|>"
USUAL_SEPARATORS = (
    TRAINED_SEPARATOR,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|end▁of▁sentence|>",
    "[SEP]",
)
"""What ends a document: GPT-2, NeoX; Llama 3; Llama 2, T5; Gemma; others; DeepSeek; BERT."""
INSTALL = "pip install 'isoflop[text]'"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A way to tell text apart into tokens: small, and the same wherever it travels."""

    definition: str | None
    """As JSON of `tokenizers`; None for bytes."""
    vocabulary: int
    """Symbols."""
    separator: int
    """The token after each document."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest in which a file can store its tokens, least byte first."""
        least = next(d for d in ("u1", "<u2", "<u4") if self.vocabulary - 1 <= np.iinfo(d).max)
        return np.dtype(least)

    @property
    def identity(self) -> str:
        """Equal for tokenizers that give equal tokens."""
        if self.definition is None:
            return "bytes"
        return hashlib.sha256(f"{self.separator} {self.definition}".encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[bytes]) -> list[Tokens]:
        """Tokens of each text, without separators; special tokens in the text are but text.

        Raises
        ------
        UnicodeDecodeError
            If a text is not UTF-8 and the tokenizer is not bytes.
        """
        if self.definition is None:
            return [np.frombuffer(text, dtype=np.uint8) for text in texts]
        encoded = _library_tokenizer(self.definition).encode_batch_fast(
            [text.decode() for text in texts], add_special_tokens=False
        )
        return [np.array(e.ids, dtype=self.dtype) for e in encoded]

    def decode(self, tokens: NDArray[Any]) -> bytes:
        """The text of tokens, with their separators."""
        if self.definition is None:
            return bytes(tokens.astype(np.uint8))
        text: str = _library_tokenizer(self.definition).decode(
            tokens.tolist(), skip_special_tokens=False
        )
        return text.encode()

    def lost(self, text: bytes, tokens: Tokens) -> int:
        """Bytes of the text's lines that do not come back from its tokens.

        A space before the text, which some tokenizers add, is no loss.
        """
        if self.definition is None:
            return 0
        back = Counter(self.decode(tokens).removeprefix(b" ").splitlines(keepends=True))
        lines = Counter(text.removeprefix(b" ").splitlines(keepends=True))
        return sum(count * len(line) for line, count in (lines - back).items())

    def token(self, number: int) -> str:
        """How the library writes one of its tokens."""
        assert self.definition is not None, "a byte has no name"
        written: str | None = _library_tokenizer(self.definition).id_to_token(number)
        assert written is not None, f"{number} is no token of it"
        return written


BYTES = Tokenizer(definition=None, vocabulary=256, separator=ord("\n"))
"""A byte is a token, and a line feed ends a document."""


def pretrained(source: TokenizerSource) -> Tokenizer:
    """Somebody's tokenizer, from a file or from the hub.

    Raises
    ------
    InputError
        If it cannot be read or has no known separator.
    """
    where = source.file or f"{source.hub} at revision {source.revision}"
    found = (
        _file(Path(source.file)) if source.file else _from_hub(source.hub or "", source.revision)
    )
    return _tokenizer(found, where, source.separator)


def trained(texts: Iterator[str], vocabulary: int, separator: str | None) -> Tokenizer:
    """A byte-level BPE of `vocabulary` symbols, trained on `texts`; deterministic.

    Few texts may not have merges for all of the symbols: the last ones then never occur.
    """
    library = library_or_refuse()
    made = library.Tokenizer(library.models.BPE())
    # The pattern of GPT-2 keeps merges within words; its bytes stand for all text.
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[separator or TRAINED_SEPARATOR],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return Tokenizer(definition=made.to_str(), vocabulary=vocabulary, separator=0)


def stored(path: Path, vocabulary: int) -> Tokenizer | None:
    """A tokenizer that was trained before; None where there is none that can be read."""
    try:
        definition = path.read_text(encoding="utf-8")
        _library_tokenizer(definition)
    except FileNotFoundError:
        return None
    except InputError:
        raise
    except Exception:  # the library raises nothing narrower; it is trained again
        return None
    return Tokenizer(definition=definition, vocabulary=vocabulary, separator=0)


def _tokenizer(found: tokenizers.Tokenizer, where: str, separator: str | None) -> Tokenizer:
    found.no_padding()
    found.no_truncation()
    candidates = USUAL_SEPARATORS if separator is None else (separator,)
    number = next((n for n in map(found.token_to_id, candidates) if n is not None), None)
    if number is None:
        special = [str(t.content) for t in found.get_added_tokens_decoder().values()]
        such = f", such as {', '.join(special[:5])}" if special else ""
        raise InputError(
            f"the tokenizer {where} has no token {' or '.join(candidates)} to end documents with: "
            f"set separator to one of its own{such}"
        )
    # Vocabularies may have holes, so that their size is not their largest number.
    size = max(found.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(definition=found.to_str(), vocabulary=size, separator=number)


def _file(path: Path) -> tokenizers.Tokenizer:
    library = library_or_refuse()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the tokenizer {path}: {error}") from error
    try:
        found: tokenizers.Tokenizer = library.Tokenizer.from_str(text)
        return found
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{path} is no tokenizer.json of the library tokenizers: {error}"
        ) from error


@lru_cache(maxsize=4)
def _from_hub(name: str, revision: str) -> tokenizers.Tokenizer:
    library = library_or_refuse()
    try:
        found: tokenizers.Tokenizer = library.Tokenizer.from_pretrained(name, revision=revision)
        return found
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"cannot get the tokenizer {name} at revision {revision} from the hub: {error}"
        ) from error


@lru_cache(maxsize=4)
def _library_tokenizer(definition: str) -> tokenizers.Tokenizer:
    made: tokenizers.Tokenizer = library_or_refuse().Tokenizer.from_str(definition)
    made.encode_special_tokens = True
    return made


def library_or_refuse() -> ModuleType:
    """The library `tokenizers`."""
    try:
        import tokenizers
    except ImportError as error:
        raise InputError(
            f"this corpus's tokenizer needs `tokenizers`, which is not installed here: {INSTALL}"
        ) from error
    return tokenizers
