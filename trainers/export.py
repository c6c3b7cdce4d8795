"""A trained model in Hugging Face's format, for the tools that people have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis.errors import InputError
from analysis.writing import replacing
from trainers.one_core import NORM_EPSILON
from trainers.shape import Shape
from trainers.tokenizer import Tokenizer


def write_llama(
    shape: Shape, weights: Mapping[str, Tensor], directory: Path, *, separator: int | None = None
) -> None:
    """Write `config.json` and `model.safetensors` of a Llama that gives the same logits.

    Parameters
    ----------
    shape
        Of a Llama-like architecture.
    weights
        By the names of `trainers.transformer.Transformer`.
    directory
        Made if it is not there.
    separator
        The token between documents, with which generation begins and ends.

    Raises
    ------
    InputError
        If the architecture is no Llama's.
    """
    from safetensors.torch import save

    require_llama(shape)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in _renamed(shape, weights).items()}
    # Not by `save_file`, whose files only their owner may read.
    with replacing(directory / "model.safetensors") as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    ends = {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": separator}
    dtype = next(iter(tensors.values())).dtype
    _write_json(directory / "config.json", _config(shape, dtype) | ends)
    _write_json(
        directory / "generation_config.json",
        {name: token for name, token in ends.items() if token is not None},
    )


def write_tokenizer(tokenizer: Tokenizer, context: int, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which give the tokens of the corpus.

    Names of special tokens that occur in a text are but text, as they were in training: the token
    that ends documents is to be given by its number. A program that reads `tokenizer.json` alone
    takes such a name for the token.

    Parameters
    ----------
    tokenizer
        Not that of bytes, which Hugging Face's library does not have.
    context
        Of the model, tokens.
    directory
        It exists.
    """
    assert tokenizer.definition is not None
    definition = json.loads(tokenizer.definition)
    # Somebody's tokenizer may put a token before each text, which these models have never seen.
    definition["post_processor"] = None
    _write_json(directory / "tokenizer.json", definition)
    end = tokenizer.token(tokenizer.separator)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


def require_llama(shape: Shape) -> None:
    """Refuse what `write_llama` cannot write.

    Raises
    ------
    InputError
        With what Llama has not.
    """
    a = shape.architecture
    wrong = [
        said
        for said, differs in (
            (f"norm {a.norm}", a.norm != "rms"),
            (f"feed-forward {a.feed_forward}", a.feed_forward != "swiglu"),
            ("normalised queries and keys", a.qk_norm),
        )
        if differs
    ]
    if wrong:
        raise InputError(
            f"Hugging Face's Llama has no {', '.join(wrong)}: only models of Llama-like recipes "
            "(llama-adamw, step-law, deepseek, mup) can be exported"
        )


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    a = shape.architecture
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // a.queries_per_key,
        "head_dim": shape.head_width,
        "max_position_embeddings": shape.context,
        "rope_theta": a.rotary_base,
        "rms_norm_eps": NORM_EPSILON,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": a.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _renamed(shape: Shape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ones = torch.ones(shape.width, dtype=weights["embedding"].dtype)
    found = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": ones}
    if not shape.architecture.tied:
        found["lm_head.weight"] = weights["head"].t()
    for i in range(shape.depth):
        own, theirs = f"blocks.{i}", f"model.layers.{i}"
        q, k, v = torch.split(
            weights[f"{own}.qkv"], [shape.width, shape.key_width, shape.key_width]
        )
        gate, up = weights[f"{own}.up"].chunk(2)
        found |= {
            f"{theirs}.input_layernorm.weight": ones.clone(),
            f"{theirs}.post_attention_layernorm.weight": ones.clone(),
            f"{theirs}.self_attn.q_proj.weight": _halves(q, shape.head_width),
            f"{theirs}.self_attn.k_proj.weight": _halves(k, shape.head_width),
            f"{theirs}.self_attn.v_proj.weight": v,
            f"{theirs}.self_attn.o_proj.weight": weights[f"{own}.attention_out"].t(),
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": weights[f"{own}.down"].t(),
        }
    return found


def _halves(rows: Tensor, head_width: int) -> Tensor:
    """Rows of each head, the even ones first.

    Rotary embeddings turn neighbours here; there, a unit of the first half with one of the second.
    """
    by_pair = rows.view(-1, head_width // 2, 2, rows.shape[1])
    return by_pair.transpose(1, 2).reshape(rows.shape)
