"""accounting: closed formulas against models that exist, on the meta device where they are large."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTBigCodeConfig,
    LlamaConfig,
    MixtralConfig,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

import fastgpt
from fastgpt import accounting
from fastgpt.accounting import PRESETS, Shape, count_parameters, report, shape_of, tables
from fastgpt.accounting.tables import render
from fastgpt.model.compat import CACHE

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


# --- parameters of GPT-2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-small", 124_439_808),
        ("openai-community/gpt2-medium", 354_823_168),
        ("GPT2-Large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_totals_of_the_four_sizes(name, total):
    assert count_parameters(name).total == total


COMPONENT_OF = [
    (r"\.wte\.", "token embedding"),
    (r"\.wpe\.", "position embedding"),
    (r"\.attn\.", "attention"),
    (r"\.crossattention\.", "cross-attention"),
    (r"\.ln_cross_attn\.", "cross-attention norm"),
    (r"\.mlp\.", "MLP"),
    (r"\.ln_[12]\.", "two layer norms"),
    (r"\.ln_f\.", "final norm"),
    (r"lm_head", "head"),
]


def real_components(model: nn.Module) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        component = next(component for pattern, component in COMPONENT_OF if re.search(pattern, name))
        sizes[component] += parameter.numel()
    return sizes


def closed_components(config: GPT2Config) -> dict[str, int]:
    return {part.name: part.subtotal for part in count_parameters(config).components if part.subtotal}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "add_cross_attention": True, "n_inner": 1000}])
def test_components_equal_the_real_model(name, changes):
    entry = dict(FAMILY[name])
    published = entry.pop("parameters", None)
    config = GPT2Config(**entry | changes | TOKENS)
    assert closed_components(config) == dict(real_components(on_meta(config)))
    if published and not changes:
        assert count_parameters(config).total == published


@given(
    n_layer=st.integers(1, 4),
    n_head=st.integers(1, 5),
    head_size=st.integers(1, 20),
    n_inner=st.none() | st.integers(1, 200),
    n_positions=st.integers(1, 300),
    vocab_size=st.integers(1, 500),
    tied_head=st.booleans(),
    cross_attention=st.booleans(),
)
def test_any_shape(n_layer, n_head, head_size, n_inner, n_positions, vocab_size, tied_head, cross_attention):
    config = GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_head * head_size,
        n_inner=n_inner,
        n_positions=n_positions,
        vocab_size=vocab_size,
        tie_word_embeddings=tied_head,
        add_cross_attention=cross_attention,
        **TOKENS,
    )
    model = on_meta(config)
    assert closed_components(config) == dict(real_components(model))
    assert shape_of(config) == shape_of(model)


@pytest.mark.parametrize("shape", [PRESETS["gpt2"], Shape(**TINY, tied_head=False, cross_attention=True)])
def test_formulas_say_what_is_counted(shape):
    sizes = {"C": shape.n_embd, "F": shape.hidden_width, "V": shape.vocab_size, "P": shape.n_positions}
    components = count_parameters(shape).components
    assert [eval(part.formula.replace("^", "**"), sizes) for part in components] == [part.each for part in components]
    assert {part.count for part in components} == {1, shape.n_layer}


def test_gpt3_sizes_match_their_names_and_nothing_is_built(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a parameter was built")

    monkeypatch.setattr(nn.Parameter, "__new__", refuse)
    stated = {
        "gpt3-small": 125e6,
        "gpt3-medium": 350e6,
        "gpt3-large": 760e6,
        "gpt3-xl": 1.3e9,
        "gpt3-2.7b": 2.7e9,
        "gpt3-6.7b": 6.7e9,
        "gpt3-13b": 13e9,
        "gpt3-175b": 175e9,
    }
    assert {name for name in PRESETS if name.startswith("gpt3")} == set(stated)
    for name, size in stated.items():
        assert report(name)["total"] == pytest.approx(size, rel=0.02)
        assert (PRESETS[name].n_positions, PRESETS[name].vocab_size) == (2048, 50257)
    assert count_parameters("gpt3").total == 174_604_259_328


# --- parameters of anything else ------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_hold_what_is_counted(name):
    config = OTHERS[name]
    before = config.to_dict()
    count = count_parameters(config)
    assert config.to_dict() == before
    model = (AutoModel if name == "t5" else AutoModelForCausalLM).from_config(config)
    assert count.total == n_stored(model.float())
    assert all(part.formula == "" for part in count.components)


def test_other_architectures_are_grouped_by_part():
    llama = {part.name: part.count for part in count_parameters(OTHERS["llama"]).components}
    assert llama == {"model.embed_tokens": 1, "model.layers": 3, "model.norm": 1, "lm_head": 1}
    # Attention, MLP and two norms; the first block alone holds 32 relative positions of 4 heads.
    block = 4 * 32 * 32 + 2 * 32 * 48 + 2 * 32
    t5_blocks = [part for part in count_parameters(OTHERS["t5"]).components if part.name == "encoder.block"]
    assert sorted((part.count, part.each) for part in t5_blocks) == [(1, block + 32 * 4), (2, block)]


@pytest.mark.parametrize("cls", [GPT2LMHeadModel, fastgpt.GPT2LMHeadModel, GPT2Model, fastgpt.GPT2DoubleHeadsModel])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_counts_what_it_holds(cls, tied):
    model = cls(tiny_config(tie_word_embeddings=tied, num_labels=1))
    assert count_parameters(model).total == n_stored(model)
    assert shape_of(model) == shape_of(model.config)


def test_a_module_counts_shared_and_own_parameters():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(7))
            first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            second.weight = first.weight
            self.stack = nn.ModuleList([first, second, nn.Linear(3, 5)])

    parts = [(part.name, part.each, part.count) for part in count_parameters(Own()).components]
    assert parts == [("scale", 7, 1), ("stack", 9, 1), ("stack", 20, 1)]
    nested = count_parameters(nn.Sequential(Own(), nn.Linear(2, 2)))
    assert [(part.name, part.subtotal) for part in nested.components] == [("0", 7), ("0.stack", 29), ("1", 6)]


# --- names and directories ------------------------------------------------------------------------------------------


def test_a_directory_is_read(tmp_path, monkeypatch):
    tiny_config(tie_word_embeddings=False).save_pretrained(tmp_path / "gpt2")
    OTHERS["llama"].save_pretrained(tmp_path / "llama")
    assert count_parameters(tmp_path / "llama").total == count_parameters(OTHERS["llama"]).total
    assert shape_of(str(tmp_path / "gpt2")) == Shape(**TINY, tied_head=False)
    # As in from_pretrained, a directory of that name goes first.
    monkeypatch.chdir(tmp_path)
    assert count_parameters("gpt2").total == count_parameters(tiny_config(tie_word_embeddings=False)).total


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'gpt2-xxl' \(did you mean gpt2-xl\?\).* gpt3-175b, or a directory with"):
        count_parameters("gpt2-xxl")
    with pytest.raises(ValueError, match="unknown model 'someone/something': give one of gpt2, "):
        report("someone/something")
    with pytest.raises(TypeError, match="not int"):
        count_parameters(7)  # type: ignore[arg-type]


def test_layers_beyond_building_are_refused_at_once(tmp_path) -> None:
    LlamaConfig(num_hidden_layers=10**7).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_hidden_layers 10000000 is more than"):
        count_parameters(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model_type": "no-such-model"}', '{"model_type": "gpt2", "n_embd": "wide"}']
)
def test_a_directory_that_describes_no_model_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        count_parameters(str(tmp_path))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"describes no known model: .+") as refusal:
        count_parameters(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="n_embd 100 is not divisible by n_head 12"):
        Shape(n_layer=1, n_embd=100, n_head=12)
    with pytest.raises(ValueError, match="n_layer must be 1 or more, not 0"):
        Shape(n_layer=0, n_embd=96, n_head=12)
    with pytest.raises(ValueError, match="Llama is not a GPT-2"):
        shape_of(OTHERS["llama"])


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_weight_bytes_are_those_of_the_tensors(tied, cross):
    model = GPT2LMHeadModel(tiny_config(tie_word_embeddings=tied, add_cross_attention=cross))
    stated = accounting.weight_bytes(shape_of(model))
    assert stated["fp32"] == 4 * n_stored(model)
    assert stated["bf16"] == 2 * n_stored(model)

    matrices: set[torch.Tensor] = {m.weight for m in model.modules() if isinstance(m, Conv1D)}
    outputs = sum(weight.shape[1] for weight in matrices) + model.lm_head.out_features
    matrices.add(model.lm_head.weight)
    rest = [p for p in model.parameters() if p not in matrices]
    quantised = [torch.empty_like(p, dtype=torch.int8) for p in matrices] + [torch.empty(outputs)]
    kept = [p.to(torch.bfloat16) for p in rest]
    assert stated["int8"] == sum(tensor.nbytes for tensor in [*quantised, *kept])


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
