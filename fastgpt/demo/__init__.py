"""A small trained model and its tokenizer; `train` is the recipe that made them."""

from importlib import resources

import torch
import transformers

from ..modeling import GPT2LMHeadModel


def load_demo() -> "tuple[GPT2LMHeadModel, transformers.PreTrainedTokenizerFast]":
    """The bundled model, in float32 on the CPU and ready for use, and its tokenizer; no network is needed."""
    with resources.as_file(resources.files(__name__)) as folder:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return model.eval(), tokenizer
