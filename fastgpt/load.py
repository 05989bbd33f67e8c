"""What a command loads: a model and its tokenizer, by what was typed of their name, device and dtype."""

import logging
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .checkpoint.tokenizer import load_tokenizer
from .demo import load_demo
from .model.rounded import quantize
from .modeling import GPT2LMHeadModel

logger = logging.getLogger("fastgpt")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_and_dtype(device: str | None = None, dtype: str | None = None) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype in which a model runs.

    device: None takes the GPU when there is one. dtype: a key of `DTYPES`; None takes float32 on the CPU and bfloat16
    on a GPU. Raises ValueError on another dtype, and on a device that does not exist here.
    """
    try:
        torch_device = torch.device(default_device() if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: say cpu or cuda") from error
    if torch_device.type not in ("cpu", "cuda"):
        raise ValueError(f"fastgpt runs on cpu and cuda, not on {torch_device.type}")
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: leave --device out or say --device cpu")
    if torch_device.type == "cuda" and (torch_device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {torch_device} here: there are {torch.cuda.device_count()}")
    dtype = ("float32" if torch_device.type == "cpu" else "bfloat16") if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    return torch_device, DTYPES[dtype]


def load_model_and_tokenizer(
    name: str, device: str | None = None, dtype: str | None = None, *, bits: int | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the demo, a Hub id or a local directory, ready to run.

    device, dtype: as for `device_and_dtype`. bits: `quantize` the weights to 8 or 4, before they get that dtype. If the
    checkpoint lacks an untied head, the model gets a new one, with a warning. Raises ValueError on another dtype or
    device, OSError or ValueError on a model that cannot be loaded.
    """
    model: Any
    device_dtype = device_and_dtype(device, dtype)
    if name == "demo":
        model, tokenizer = load_demo()
    else:
        loaded: Any = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
        model, info = loaded
        if "lm_head.weight" in info["missing_keys"]:
            logger.warning("warning: %s holds no lm_head.weight, and its head is untied: the text will be noise", name)
        tokenizer = load_tokenizer(name)
    return (model if bits is None else quantize(model, bits=bits)).to(*device_dtype).eval(), tokenizer
