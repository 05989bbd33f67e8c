"""Models and configurations that the tests of accounting count."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, GPTBigCodeConfig, LlamaConfig, MixtralConfig, T5Config

FAMILY = json.loads((Path(__file__).parents[1] / "data" / "gpt2_family.json").read_text())["models"]
TINY: dict[str, Any] = {"n_layer": 3, "n_embd": 24, "n_head": 4, "n_positions": 32, "vocab_size": 101, "n_inner": 56}
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def tiny_config(**changes) -> GPT2Config:
    return GPT2Config(**TINY | TOKENS | NO_DROPOUT | changes)


def on_meta(config: GPT2Config) -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(config)


def n_stored(model: nn.Module) -> int:
    """Elements in memory: a storage that several parameters share counts once."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() // 4 for p in model.parameters()}.values())


OTHERS = {
    "llama": LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "llama tied": LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    ),
    "mixtral": MixtralConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    ),
    "gpt_bigcode": GPTBigCodeConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=16, **TOKENS),
    "bert": BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, is_decoder=True
    ),
    "t5": T5Config(vocab_size=99, d_model=32, d_ff=48, d_kv=8, num_layers=3, num_heads=4),
}
