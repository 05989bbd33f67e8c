"""Models for the tests: tiny configurations, pairs with the same weights, and weights like trained ones."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GPT2Config

import fastgpt

DATA = Path(__file__).parent / "data"
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
HEADS = [
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
]


def tiny_config(**changes) -> GPT2Config:
    """2 layers, C = 64, H = 4, V = 131 (odd), context 48, no dropout."""
    values: dict[str, Any] = {
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "vocab_size": 131,
        "n_positions": 48,
        **NO_DROPOUT,
    }
    values |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return GPT2Config(**(values | changes))


def family() -> dict[str, dict[str, Any]]:
    """Published configurations by name, without `parameters`."""
    models = json.loads((DATA / "gpt2_family.json").read_text())["models"]
    return {name: {k: v for k, v in fields.items() if k != "parameters"} for name, fields in models.items()}


def lively(model: Any, seed: int = 0) -> Any:
    """Random biases and gains, and weights that keep the variance: every parameter matters and attention is sharp."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.add_(0.2 * noise.to(parameter.device))
            elif "wte" not in name and "wpe" not in name:
                parameter.mul_(1.5 / (0.02 * parameter.shape[0] ** 0.5))
    return model


def pair(config: GPT2Config, head: str = "GPT2LMHeadModel", **attention) -> tuple[Any, Any]:
    """(transformers' model, fastgpt's model) with the same weights, in eval mode, without shared tensors."""
    torch.manual_seed(0)
    theirs = lively(getattr(transformers, head)._from_config(copy.deepcopy(config), **attention)).eval()
    ours = getattr(fastgpt, head)(copy.deepcopy(config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def look_trained(model: Any) -> Any:
    """Give a model the outliers of a trained GPT-2: huge channels at position 0 and a growing residual stream."""
    n_channels = model.config.n_embd
    outliers = [channel * n_channels // 768 for channel in (447, 138, 378)]
    with torch.no_grad():
        model.transformer.wte.weight *= 7
        model.transformer.wpe.weight *= 5
        model.transformer.wpe.weight[0, outliers] = torch.tensor([3000.0, -600.0, 500.0])
        for layer, block in enumerate(model.transformer.h):
            block.attn.c_proj.weight *= 6 * 1.045**layer
            block.mlp.c_proj.weight *= 6 * 1.045**layer
            block.attn.c_attn.weight[:, : 2 * n_channels] *= 7
            block.mlp.c_fc.weight *= 6
            block.ln_1.weight[outliers] = 0.02
            block.ln_2.weight[outliers] = 0.02
        model.transformer.ln_f.weight.normal_(8.0, 2.0)
    return model


def token_ids(n_batch: int, n_tokens: int, vocab_size: int, seed: int = 0) -> Tensor:
    """(B, T) ids on the default device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab_size, (n_batch, n_tokens), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def assert_same_within_rounding(ours: Tensor, theirs: Tensor, n_ulps: float = 64) -> None:
    """Assert equality up to `n_ulps` ulps of the largest value, the rounding of fp32 sums over a few layers."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if ours.numel() == 0:
        return
    assert torch.isfinite(ours).all()
    allowed = n_ulps * torch.finfo(theirs.dtype).eps * theirs.abs().max().item()
    error = (ours - theirs).abs().max().item()
    assert error <= allowed, f"differs by {error:.3g}, allowed {allowed:.3g}"
