"""An exported model, loaded by the library that it is for, gives the same logits."""

import dataclasses
from pathlib import Path

import pytest
import torch

from analysis.errors import InputError
from trainers.decoders import LLAMA
from trainers.export import write_llama, write_tokenizer
from trainers.shape import Architecture, Shape
from trainers.tokenizer import trained
from trainers.transformer import Transformer


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"queries_per_key": 2}, {"tied": True}])
def test_transformers_gives_the_same_logits(tmp_path: Path, changes: dict) -> None:
    import transformers

    architecture = dataclasses.replace(LLAMA, **changes)
    shape = Shape(width=64, depth=3, heads=4, vocabulary=96, context=32, architecture=architecture)
    model = Transformer(shape, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    write_llama(shape, dict(model.state_dict()), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    inputs = torch.randint(96, (3, 32), generator=generator)
    with torch.no_grad():
        ours, found = model(inputs), theirs(inputs).logits
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5)
    assert ours.std() > 0.1
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        p.numel() for p in model.parameters()
    ) + shape.width * (2 * shape.depth + 1)  # the gains, all 1


def test_what_is_no_llama_is_refused(tmp_path: Path) -> None:
    shape = Shape(width=8, depth=1, heads=1, vocabulary=4, context=4, architecture=Architecture())
    with pytest.raises(InputError, match=r"has no norm layer, feed-forward relu"):
        write_llama(shape, {}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_transformers_gives_the_tokens_of_the_corpus(tmp_path: Path, loader: str) -> None:
    """A separator's name within a text is text, and the separator itself still ends it."""
    import transformers

    ours = trained(iter(["hello to the whole world and to others " * 20]), 300, None)
    write_tokenizer(ours, 64, tmp_path)
    theirs = getattr(transformers, loader).from_pretrained(tmp_path)
    texts = ["hello <|endoftext|> world", "<|endoftext|>", "hello"]
    wanted = [tokens.tolist() for tokens in ours.encode([text.encode() for text in texts])]
    assert theirs(texts)["input_ids"] == wanted
    assert theirs(texts, padding=True)["input_ids"][2][-1] == ours.separator
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == ours.separator
    assert theirs.decode([*wanted[0], ours.separator]) == texts[0] + "<|endoftext|>"
    assert theirs.decode([*wanted[0], ours.separator], skip_special_tokens=True) == texts[0]
