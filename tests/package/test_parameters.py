"""accounting.count_parameters: closed formulas against models that exist, on the meta device where they are large."""

import re
from collections import Counter

import pytest
import torch
from counted_models import FAMILY, OTHERS, TINY, TOKENS, n_stored, on_meta, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig

import fastgpt
from fastgpt.accounting import PRESETS, Shape, count_parameters, report, shape_of

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


def test_the_bundled_model_is_counted_by_its_name():
    model, _ = fastgpt.load_demo()
    assert fastgpt.count_parameters("demo").total == model.num_parameters()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'gpt2-xxl' \(did you mean gpt2-xl\?\).* gpt3-175b, or a directory with"):
        count_parameters("gpt2-xxl")
    with pytest.raises(ValueError, match="unknown model 'someone/something': give one of demo, gpt2, "):
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
