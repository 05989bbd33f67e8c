"""accounting: bytes, FLOPs and ceilings against models that run, and the report of them."""

import copy
import io
import json
from itertools import chain
from typing import Any

import pytest
import torch
from counted_models import OTHERS, n_stored, on_meta, tiny_config
from fastgpt_kernels.common.decode_weights import RoundedMatrix
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

import fastgpt
from fastgpt import accounting
from fastgpt.accounting import PRESETS, count_parameters, report, shape_of, tables
from fastgpt.accounting.tables import render
from fastgpt.generate import view_weights
from fastgpt.model.compat import CACHE

# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_weight_bytes_are_those_of_the_tensors(tied, cross):
    model: Any = GPT2LMHeadModel(
        tiny_config(n_embd=64, n_inner=None, tie_word_embeddings=tied, add_cross_attention=cross)
    )
    stated = accounting.weight_bytes(shape_of(model))
    assert stated["fp32"] == 4 * n_stored(model)
    assert stated["bf16"] == 2 * n_stored(model)

    for bits in (8, 4):
        rounded = copy.deepcopy(model)
        for head, kind in ((False, f"int{bits}"), (True, f"int{bits}_head")):
            held = fastgpt.quantize(rounded, bits=bits, head=head).to(torch.bfloat16).parameters()
            assert stated[kind] == sum(tensor.nbytes for tensor in held)


def test_kv_cache_bytes_are_those_of_a_cache():
    config = tiny_config()
    cache = GPT2LMHeadModel(config)(torch.zeros(2, 9, dtype=torch.int64), use_cache=True)[CACHE]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert accounting.kv_cache_bytes(shape_of(config), 9, batch=2, element_bytes=4) == held
    assert accounting.kv_cache_bytes(PRESETS["gpt2"]) == 2 * 12 * 768 * 2


def test_training_state_is_what_adamw_holds():
    model = GPT2LMHeadModel(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    n_parameters = count_parameters(model).total
    stated = accounting.training_state_bytes(n_parameters)
    held = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "master_weights": 0,
        "moments": sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim),
    }
    assert stated == held
    # A step reads all of it, and writes all but the gradients.
    assert accounting.adamw_bytes(n_parameters) == 2 * sum(held.values()) - held["gradients"]
    assert accounting.training_state_bytes(10, "mixed") == {
        "weights": 20,
        "gradients": 20,
        "master_weights": 40,
        "moments": 80,
    }
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        accounting.training_state_bytes(10, "fp8")


# --- FLOPs and bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_inner", [None, 56])
def test_flops_are_those_counted_while_a_model_runs(n_inner):
    B, T = 2, 7
    config = tiny_config(n_inner=n_inner, attn_implementation="eager")
    shape, model = shape_of(config), GPT2LMHeadModel(config)
    with FlopCounterMode(display=False) as forward:
        logits = model(torch.zeros(B, T, dtype=torch.int64), use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()

    # Explicit attention computes all T*T scores, of which a causal one needs T*(T+1)/2.
    unmasked = 4 * T**2 * shape.n_layer * shape.n_embd
    masked_share = unmasked - 2 * T * (T + 1) * shape.n_layer * shape.n_embd
    assert forward.get_total_flops() == B * (accounting.forward_flops(shape, T) + masked_share)
    in_training = forward.get_total_flops() + backward.get_total_flops()
    assert in_training == B * (accounting.training_flops(shape, T) + 3 * masked_share)


def test_flops_and_decode_bytes_of_the_standard_width():
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3-175b"):
        shape, T, B = PRESETS[name], 700, 5
        L, C, V = shape.n_layer, shape.n_embd, shape.vocab_size
        assert accounting.forward_flops(shape, T) == 24 * T * L * C**2 + 2 * T * (T + 1) * L * C + 2 * T * V * C
        weights = 2 * (L * (12 * C**2 + 13 * C) + 2 * C + V * C)
        assert accounting.decode_bytes(shape, B, T) == weights + B * T * 4 * L * C


@pytest.mark.parametrize("tied", [True, False])
def test_decode_reads_each_weight_that_a_token_meets(tied):
    config = tiny_config(tie_word_embeddings=tied)
    model = on_meta(config)
    tables = {model.transformer.wpe.weight, model.transformer.wte.weight} - {model.lm_head.weight}
    n_read = sum(p.numel() for p in model.parameters() if p not in tables)
    assert accounting.decode_bytes(shape_of(config), 1, 0, element_bytes=4) == 4 * n_read
    cache = accounting.kv_cache_bytes(shape_of(config), 10, batch=3, element_bytes=4)
    assert accounting.decode_bytes(shape_of(config), 3, 10, element_bytes=4) == 4 * n_read + cache


def test_groups_that_do_not_divide_the_width_are_not_counted():
    odd = shape_of(tiny_config(n_embd=66, n_head=2))
    assert accounting.weight_bytes(odd).keys() == {"fp32", "bf16", "int8", "int8_head"}
    assert "int4_decode_bytes_per_step" not in report(tiny_config(n_embd=66, n_head=2))["ceilings"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_decode_reads_rounded_weights_and_their_scales(tied, head, bits):
    """Every tensor that a decode step of the quantised model views, but for the tables, of which it reads rows."""
    config = tiny_config(n_embd=64, n_inner=None, tie_word_embeddings=tied)
    model = fastgpt.quantize(fastgpt.GPT2LMHeadModel(config), bits=bits, head=head).bfloat16()
    weights = view_weights(model)
    parts = [*chain.from_iterable(weights.layers), weights.ln_f_weight, weights.ln_f_bias, weights.head]
    tensors = chain.from_iterable(part if isinstance(part, RoundedMatrix) else (part,) for part in parts)
    n_bytes = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    kinds = {"block_bits": bits, "head_bits": bits if head else None}
    assert accounting.decode_bytes(shape_of(config), 1, 0, **kinds) == n_bytes
    cache = accounting.kv_cache_bytes(shape_of(config), 10, batch=3)
    assert accounting.decode_bytes(shape_of(config), 3, 10, **kinds) == n_bytes + cache


# --- ceilings -------------------------------------------------------------------------------------------------------

# Tokens/s of one H200 at 4.3e12 B/s and 7.9e14 FLOP/s: decoding one and 64 sequences at context 512, then prefill and
# training at T = 1024.
CEILINGS = {
    "gpt2": ("16.2k", "189k", "2.97M", "990k"),
    "gpt2-medium": ("5.67k", "70.0k", "1.04M", "348k"),
    "gpt2-large": ("2.62k", "36.3k", "482k", "161k"),
    "gpt2-xl": ("1.32k", "20.9k", "242k", "80.6k"),
}


def assert_rounds_to(value: float, printed: str) -> None:
    digits, unit = printed[:-1], {"k": 1e3, "M": 1e6}[printed[-1]]
    n_decimals = len(digits.partition(".")[2])
    assert f"{value / unit:.{n_decimals}f}" == digits


@pytest.mark.parametrize("name", CEILINGS)
def test_ceilings_of_one_h200(name):
    decode_1, decode_64, prefill, training = CEILINGS[name]
    assert_rounds_to(report(name, context=512)["ceilings"]["decode_tokens_per_s"], decode_1)
    assert_rounds_to(report(name, context=512, batch=64)["ceilings"]["decode_tokens_per_s"], decode_64)
    assert_rounds_to(report(name, batch=16)["ceilings"]["prefill_tokens_per_s"], prefill)
    assert_rounds_to(report(name)["ceilings"]["training_tokens_per_s"], training)


def test_ceilings_follow_the_machine():
    slow = report("gpt2", bandwidth=1e9, matrix_rate=1e10, context=100)["ceilings"]
    fast = report("gpt2", bandwidth=2e9, matrix_rate=4e10, context=100)["ceilings"]
    assert fast["decode_tokens_per_s"] == pytest.approx(2 * slow["decode_tokens_per_s"])
    assert fast["prefill_tokens_per_s"] == pytest.approx(4 * slow["prefill_tokens_per_s"])
    assert fast["training_tokens_per_s"] == pytest.approx(4 * slow["training_tokens_per_s"])


# --- report ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["gpt2", "gpt3-175b", OTHERS["llama"], tiny_config(add_cross_attention=True)])
def test_report_survives_json_and_adds_up(source):
    made = report(source)
    assert json.loads(json.dumps(made)) == made
    assert made["total"] == count_parameters(source).total == sum(part["subtotal"] for part in made["components"])
    assert sum(part["share"] for part in made["components"]) == pytest.approx(1)
    assert made["weight_bytes"]["bf16"] == 2 * made["total"]


def test_report_on_a_batch_and_a_context():
    made, shape = report("gpt2", batch=3, context=100), PRESETS["gpt2"]
    assert made["kv_cache_bytes"] == {"token": 36_864, "batch": 3 * 100 * 36_864}
    assert made["flops"]["forward_per_sequence"] == accounting.forward_flops(shape, 100)
    assert made["flops"]["training_per_token"] == pytest.approx(3 * made["flops"]["forward_per_token"])
    checkpointed = accounting.activation_bytes(shape, 3, 100, element_bytes=4, checkpointing=True)
    assert made["activation_bytes"]["fp32"]["checkpointed, chunked loss"] == sum(checkpointed.values())
    saved, precision = made["saved_for_backward"]["autocast"], "autocast"
    assert saved["token_and_layer"] == accounting.layer_saved_bytes(shape, precision, dropout=True)
    assert saved["model"]["kept"] == sum(accounting.saved_bytes(shape, 3, 100, precision).values())
    assert report("gpt3-small")["context"] == 2048


def test_report_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match=r"context must be in \[1, 1024\], the positions of gpt2, not 1025"):
        report("gpt2", context=1025)
    with pytest.raises(ValueError, match="batch must be a finite number above 0, not 0"):
        report("gpt2", batch=0)
    with pytest.raises(ValueError, match="bandwidth must be a finite number above 0, not nan"):
        report("gpt2", bandwidth=float("nan"))


def rendered(made: dict) -> str:
    console = Console(file=io.StringIO(), width=140)
    render(made, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_render_shows_the_figures():
    text = rendered(report("gpt2", context=512))
    for figure in ("124,439,808", "4*C^2 + 4*C", "8*C^2 + 5*C", "248,879,616", "16.2 k tokens/s", "45.5%", "18,528"):
        assert figure in text
    other = rendered(report(OTHERS["t5"]))
    assert "encoder.block" in other
    assert "tokens/s" not in other


def test_short_numbers():
    assert [tables._short(value) for value in (0, 7, 999.4, 999.6, 16154, 7.9e14, 2e18)] == [
        "0 ",
        "7 ",
        "999 ",
        "1 k",
        "16.2 k",
        "790 T",
        "2e+03 P",
    ]
