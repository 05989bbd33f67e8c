"""What a training step keeps for backward: the formulas against what autograd hands to saved-tensor hooks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE
from models import tiny_config
from torch import Tensor, nn

import fastgpt
from fastgpt import accounting
from fastgpt.accounting import PRESETS, shape_of

BATCH, TOKENS = 2, 9
DROPOUT = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
# The second has heads that are padded, an MLP of another width and one layer.
SHAPES: list[dict[str, Any]] = [{}, {"n_embd": 60, "n_head": 5, "n_inner": 56, "n_layer": 1}]


def saved_storages(model: nn.Module, step: Callable[[], Tensor]) -> list[int]:
    """Bytes of each storage that autograd keeps after step(), and of its result; without parameters and scalars."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*kept, result.detach()]
        if tensor.ndim > 0
    }
    return [size for address, size in storages.items() if address not in parameters]


# --- on the kernels -------------------------------------------------------------------------------------------------


@contextmanager
def on_kernels(precision: str) -> Iterator[None]:
    autocast: AbstractContextManager = nullcontext()
    if precision == "autocast":
        autocast = torch.autocast(DEVICE, torch.bfloat16)
    with fastgpt.backend("triton"), torch.device(DEVICE), autocast:
        yield


def training_model(precision: str, **changes: Any) -> Any:
    with torch.device(DEVICE):
        model = fastgpt.GPT2LMHeadModel(tiny_config(**changes)).train()
    return model.bfloat16() if precision == "bf16" else model


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("changes", SHAPES)
def test_a_layer_on_kernels_saves_the_listed_tensors(changes: dict[str, Any], precision: str, dropout: bool) -> None:
    model = training_model(precision, **changes, **(DROPOUT if dropout else {}))
    x = torch.randn(BATCH, TOKENS, model.config.n_embd, device=DEVICE, dtype=model.dtype, requires_grad=True)
    with on_kernels(precision):
        # The result is the input of the next layer, which saves it.
        *saved, _ = saved_storages(model, lambda: model.transformer.h[0](x))
    listed = accounting.layer_saved_bytes(shape_of(model), precision, dropout=dropout, device_type=DEVICE)
    assert sorted(saved) == sorted(BATCH * TOKENS * size for size in listed.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("precision", accounting.PRECISIONS)
@pytest.mark.parametrize("changes", SHAPES)
def test_saved_bytes_are_what_autograd_keeps_on_kernels(
    changes: dict[str, Any], precision: str, dropout: bool, checkpointing: bool
) -> None:
    model = training_model(precision, **changes, **(DROPOUT if dropout else {}))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(model.config.vocab_size, (BATCH, TOKENS), device=DEVICE)
    with on_kernels(precision):
        saved = saved_storages(model, lambda: model(ids, labels=ids).loss)
    stated = accounting.saved_bytes(
        shape_of(model), BATCH, TOKENS, precision, dropout=dropout, checkpointing=checkpointing, device_type=DEVICE
    )
    # At the end of forward no layer is being computed again.
    again = stated.pop("layer_computed_again")
    assert sum(saved) == sum(stated.values())
    assert (again > 0) == checkpointing


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_a_layer_in_bf16_saves_24_c_bytes_a_token(name: str) -> None:
    shape = PRESETS[name]
    C, H = shape.n_embd, shape.n_head
    saved = accounting.layer_saved_bytes(shape)
    assert sum(saved.values()) == 24 * C + 8 * H
    # Each norm's result could be computed again from its input.
    assert saved["normalised input"] + saved["normalised sum"] == 4 * C
    # A mask of dropout on a GPU has one byte per element.
    assert sum(accounting.layer_saved_bytes(shape, dropout=True).values()) == 25 * C + 8 * H


@pytest.mark.parametrize("precision", accounting.PRECISIONS)
def test_a_layer_computed_again_saves_all_but_its_input(precision: str) -> None:
    kept = accounting.saved_bytes(PRESETS["gpt2"], 4, 100, precision)
    checkpointed = accounting.saved_bytes(PRESETS["gpt2"], 4, 100, precision, checkpointing=True)
    one_layer = (kept["layers"] + kept["weight_copies"] - checkpointed["layers"]) // 12
    assert checkpointed["layer_computed_again"] == one_layer


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown precision 'fp8': choose one of bf16, autocast, fp32"):
        accounting.saved_bytes(PRESETS["gpt2"], 1, 1, "fp8")


# --- in torch -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("full_logits", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("n_inner", [None, 56])
def test_activation_bytes_are_what_autograd_keeps(checkpointing, full_logits, n_inner):
    config = tiny_config(n_inner=n_inner)
    model = fastgpt.GPT2LMHeadModel(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(config.vocab_size, (BATCH, TOKENS))

    def chunked_step() -> Tensor:
        return model(ids, labels=ids).loss

    def full_step() -> Tensor:
        logits = model(ids).logits
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten().clone())
        return logits

    with fastgpt.backend("torch"):
        kept = sum(saved_storages(model, full_step if full_logits else chunked_step))
    stated = accounting.activation_bytes(
        shape_of(config), BATCH, TOKENS, element_bytes=4, checkpointing=checkpointing, full_logits=full_logits
    )
    # At the end of forward no block is being computed again.
    again = stated.pop("block_computed_again")
    assert sum(stated.values()) == kept
    assert (again > 0) == checkpointing


def test_activation_bytes_in_bf16_are_what_autograd_keeps_but_for_fp32_copies() -> None:
    """On a CPU a norm of bf16 keeps an fp32 copy of its input in place of the input, and copies of its parameters."""
    config = tiny_config()
    model = fastgpt.GPT2LMHeadModel(config).train().bfloat16()
    ids = torch.randint(config.vocab_size, (BATCH, TOKENS))
    with fastgpt.backend("torch"):
        kept = sum(saved_storages(model, lambda: model(ids, labels=ids).loss))
    n_norms, C = 2 * config.n_layer + 1, config.n_embd
    stated = accounting.activation_bytes(shape_of(config), BATCH, TOKENS)
    assert kept == sum(stated.values()) + n_norms * (BATCH * TOKENS * C * (4 - 2) + 2 * C * 4)


def test_a_block_computed_again_keeps_all_but_its_input():
    shape = PRESETS["gpt2-medium"]
    kept = accounting.activation_bytes(shape, 4, 100)
    checkpointed = accounting.activation_bytes(shape, 4, 100, checkpointing=True)
    one_block, one_input = kept["blocks"] // shape.n_layer, checkpointed["blocks"] // shape.n_layer
    assert checkpointed["block_computed_again"] == one_block - one_input
    # 8*C + 2*F bf16 elements, and statistics for two norms and 16 heads in fp32, for each of 400 rows.
    assert one_block == 400 * (16 * 1024 * 2 + (4 + 16) * 4)
