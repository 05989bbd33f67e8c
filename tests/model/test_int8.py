"""Products with int8 weights: how they are rounded, and that everything else works as before, as with int4 weights."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from accuracy import assert_as_accurate
from fastgpt_kernels.common.int8 import Int8Matrix
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from torch import nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

import fastgpt
from fastgpt.evaluation import mean_loss
from fastgpt.model import digits
from fastgpt.model.rounded import Int8Linear, RoundedLinear

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def in_floats(quantised: Any) -> Any:
    """A copy in which every product holds the floats of its int8 weights."""
    model = copy.deepcopy(quantised)
    for name, module in quantised.named_modules():
        if isinstance(module, RoundedLinear):
            weight = module.matrix.to_float(quantised.dtype)
            if name == "lm_head":
                product: Any = nn.Linear(module.in_features, module.out_features, bias=False)
                product.weight = nn.Parameter(weight.t())
            else:
                product = Conv1D(module.out_features, module.in_features)
                product.weight = nn.Parameter(weight.contiguous())
                product.bias = nn.Parameter(module.bias.detach().clone())
            model.set_submodule(name, product)
    del model.config.quantization_config
    return model.eval()


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_every_weight_is_rounded_to_the_nearest_value(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    matrix = (torch.randn(33, 50) * torch.logspace(-2, 1, 50) * scale).to(dtype)
    matrix[:, 7] = 0
    rounded = Int8Matrix.nearest(matrix)
    largest = matrix.double().abs().amax(0)
    # A scale has 17 bits, so it may lie 2^-17 of itself away.
    assert torch.allclose(rounded.scale.double(), (largest / 127).where(largest > 0, 1.0), rtol=2**-17, atol=0)
    assert rounded.values.abs().amax(1).tolist() == [0 if column == 7 else 127 for column in range(50)]
    error = (rounded.to_float(torch.float64) - matrix.double()).abs()
    assert (error <= rounded.scale.double() / 2).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rounding_again_changes_nothing(dtype: torch.dtype) -> None:
    """The matrix in float32 is exact, down to columns of which float32 holds but the smallest numbers."""
    torch.manual_seed(0)
    matrix = torch.randn(16, 4096) * torch.logspace(-42, 30, 4096)
    once = Int8Matrix.nearest(matrix)
    floats = once.to_float(dtype)
    again = Int8Matrix.nearest(floats)
    assert torch.equal(floats.double(), once.values.t().double() * once.scale.double())
    assert torch.equal(again.values, once.values)
    assert torch.equal(again.scale, once.scale)


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes() -> None:
    _, ours = pair(tiny_config())
    with torch.no_grad():
        ours.transformer.h[1].mlp.c_fc.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"^transformer\.h\.1\.mlp\.c_fc\.weight: .* NaN or Inf"):
        fastgpt.quantize(ours)
    assert not any(isinstance(module, Int8Linear) for module in ours.modules())
    with torch.no_grad():
        ours.transformer.h[1].mlp.c_fc.weight[3, 5] = 1
        ours.transformer.wte.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^lm_head\.weight: .* NaN or Inf"):
        fastgpt.quantize(ours, head=True)
    assert not any(isinstance(module, Int8Linear) for module in ours.modules())
    assert ours.lm_head.weight is ours.transformer.wte.weight


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_bytes_are_those_that_params_counts(bits: int, name: str) -> None:
    shape = fastgpt.accounting.PRESETS[name]
    sizes = {key: getattr(shape, key) for key in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")}
    with torch.device("meta"), no_init_weights():
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.tie_weights()
    kinds = {False: f"int{bits}", True: f"int{bits}_head"}
    for head, kind in kinds.items():
        held = fastgpt.quantize(model, bits=bits, head=head).to(torch.bfloat16).parameters()
        assert sum(tensor.nbytes for tensor in held) == fastgpt.accounting.weight_bytes(shape)[kind]


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "head"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_forward_is_that_of_the_rounded_weights(bits: int, dtype: torch.dtype, head: bool) -> None:
    models = pair(tiny_config(add_cross_attention=True))
    theirs, ours = (fastgpt.quantize(model, bits=bits, head=head).to(dtype) for model in models)
    products = [module for module in ours.modules() if isinstance(module, RoundedLinear)]
    assert {type(product).matrix_type.kind for product in products} == {f"int{bits}"}
    assert {product.scale.dtype for product in products} == {torch.float32}
    call = {"input_ids": token_ids(2, 9, 131), "encoder_hidden_states": torch.randn(2, 5, 64).to(dtype)}
    expected = in_floats(theirs)(**call).logits
    for model in (theirs, ours):
        assert_same_within_rounding(model(**call).logits, expected, n_ulps=64 if dtype == torch.float32 else 4)


@pytest.mark.skipif(not digits.is_exact(digits.Stored), reason="bytes overflow here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_few_rows_are_multiplied_by_the_values_as_they_lie(dtype: torch.dtype, has_bias: bool, monkeypatch) -> None:
    """Beside float64, as accurate as by a float copy, which is made for more rows and where gradients are asked for."""
    torch.manual_seed(0)
    matrix = Int8Matrix.nearest(torch.randn(96, 50) * torch.logspace(-2, 1, 50))
    bias = nn.Parameter(torch.randn(50, dtype=dtype)) if has_bias else None
    product = Int8Linear(matrix, bias)
    copied, to_float = [], Int8Matrix.to_float
    monkeypatch.setattr(Int8Matrix, "to_float", lambda *call: copied.append(call[1]) or to_float(*call))
    x = torch.randn(3, 7, 96).transpose(0, 1).to(dtype)
    true = x.double() @ to_float(matrix, torch.float64) + (0 if bias is None else bias.double())
    eager = product(x)
    assert copied == [dtype]
    with torch.no_grad():
        found = product(x)
        assert copied == [dtype]
        assert_as_accurate(found, eager, true)
        assert product(x[:0]).shape == (0, 3, 50)
        product(x.repeat(7, 1, 1))
        with torch.autocast("cpu"):
            product(x)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert product(x).equal(eager)
        monkeypatch.undo()
    assert len(copied) == 5
    if dtype == torch.float32:
        with torch.no_grad():
            tangent = torch.func.jvp(product, (x,), (x.flip(1),))[1]
        assert_same_within_rounding(tangent, eager.flip(1) - (0 if bias is None else bias), n_ulps=64)


@pytest.mark.skipif(not digits.is_exact(digits.Stored), reason="bytes overflow here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_are_rounded_where_that_is_asked_for_and_no_gradient_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product = Int8Linear(Int8Matrix.nearest(torch.randn(96, 50)), None, rounds_input=True)
    x = torch.randn(150, 2, 96).to(dtype)
    assert product(x).equal(x @ product.matrix.to_float(dtype))
    with torch.no_grad():
        found = product(x)
        alone = product(x[7:8, 1])
    assert (found.shape, found.dtype) == ((150, 2, 50), dtype)
    assert alone.equal(found[7:8, 1])
    rounded = digits.rounded(x.flatten(0, 1)) @ product.matrix.to_float(torch.float64)
    n_ulps = 8 if dtype.itemsize < 8 else 2**32  # the products of bytes are added in float32
    assert_same_within_rounding(found.flatten(0, 1), rounded.to(dtype), n_ulps)
    assert found.double().sub((x @ product.matrix.to_float(dtype)).double()).abs().max() > 0.05


@torch.no_grad()
def test_activations_of_a_model_that_is_quantised_already() -> None:
    ours = fastgpt.quantize(pair(tiny_config())[1], head=True)
    before, ids = copy.deepcopy(ours), token_ids(2, 9, 131)
    assert fastgpt.quantize(fastgpt.quantize(ours, activations=True)) is ours
    assert {(part.rounds_input) for part in ours.modules() if isinstance(part, Int8Linear)} == {True}
    assert vars(ours.config.quantization_config).items() >= {"head": True, "activations": True}.items()
    assert all(map(torch.equal, before.state_dict().values(), ours.state_dict().values()))
    difference = (ours(ids).logits - before(ids).logits).abs().max() / before(ids).logits.std()
    assert (0.001 < difference < 0.1) == digits.is_exact(digits.Stored)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_flow_through_but_not_into_the_weights(bits: int) -> None:
    ours = fastgpt.quantize(pair(tiny_config())[1], bits=bits, head=True)
    embeddings = torch.randn(2, 7, 64)
    given = [embeddings.clone().requires_grad_() for _ in range(2)]
    for model, x in zip((ours, in_floats(ours)), given, strict=True):
        model(inputs_embeds=x).logits.square().mean().backward()
    assert given[0].grad is not None
    assert given[1].grad is not None
    assert_same_within_rounding(given[0].grad, given[1].grad, n_ulps=512)
    product = ours.transformer.h[0].attn.c_attn
    assert (product.weight.grad, product.scale.grad) == (None, None)
    assert product.bias.grad is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_learn_on_top(bits: int) -> None:
    model = fastgpt.quantize(pair(tiny_config())[1], bits=bits)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    ids = token_ids(2, 9, 131)
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    learned = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert len(learned) == 2 * 3 * 2
    assert all("lora" in name for name in learned)


def test_what_was_changed_is_not_rounded() -> None:
    _, ours = pair(tiny_config())
    ours.transformer.h[0].mlp.c_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_proj was changed"):
        fastgpt.quantize(ours)
    with pytest.raises(TypeError, match="takes a GPT-2, not Linear"):
        fastgpt.quantize(nn.Linear(2, 2))  # type: ignore[type-var]


def test_an_int8_head_leaves_the_token_table_as_it_is() -> None:
    _, ours = pair(tiny_config())
    fastgpt.quantize(ours)
    table = ours.transformer.wte.weight
    before, products = table.clone(), [module for module in ours.modules() if isinstance(module, Int8Linear)]
    assert fastgpt.quantize(ours, head=True) is ours
    assert ours.transformer.wte.weight is table
    assert torch.equal(table, before)
    assert products == [
        module for module in ours.modules() if isinstance(module, Int8Linear) and module.bias is not None
    ]
    assert not ours.config.tie_word_embeddings
    assert ours.all_tied_weights_keys == {}
    ours.tie_weights()
    assert ours.lm_head.weight.dtype == torch.int8
    rounded = Int8Matrix.nearest(table.t())
    assert torch.equal(ours.lm_head.weight, rounded.values)
    assert torch.equal(ours.lm_head.scale, rounded.scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_vocabulary_of_a_rounded_head_is_not_resized(bits: int) -> None:
    model = fastgpt.quantize(pair(tiny_config(n_layer=1))[1], bits=bits, head=True)
    with pytest.raises(ValueError, match=rf"the head has int{bits} weights: resize before fastgpt\.quantize"):
        model.resize_token_embeddings(140)
    assert len(model.transformer.wte.weight) == len(model.lm_head.weight) == 131


def test_a_model_without_a_head_of_tokens_has_none_to_round() -> None:
    with pytest.raises(ValueError, match="GPT2Model has no head of tokens: quantize it without head=True"):
        fastgpt.quantize(fastgpt.GPT2Model(tiny_config()), head=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_losses_with_a_rounded_head(bits: int, training: bool) -> None:
    """The training loss, which reads a plain head, calls this one; that of a text reads its floats."""
    ours = fastgpt.quantize(pair(tiny_config())[1], bits=bits, head=True).train(training)
    ids = token_ids(1, 30, 131)
    expected = in_floats(ours).train(training)
    losses = [model(ids, labels=ids).loss for model in (ours, expected)]
    assert_same_within_rounding(*losses, n_ulps=8)
    assert mean_loss(ours, ids[0], context=30) == pytest.approx(losses[0].item(), rel=1e-5)


def test_models_of_the_same_configuration_stay_as_they_are() -> None:
    config = tiny_config()
    ours, other = fastgpt.GPT2LMHeadModel(config), fastgpt.GPT2LMHeadModel(config)
    assert fastgpt.quantize(fastgpt.quantize(ours)) is ours
    assert not hasattr(other.config, "quantization_config")
    assert {id(module.config) for module in ours.modules() if hasattr(module, "config")} == {id(ours.config)}


# --- generation -----------------------------------------------------------------------------------------------------


def float_scale(model: Any) -> None:
    product = model.transformer.h[0].mlp.c_fc
    product.scale = nn.Parameter(product.scale.double(), requires_grad=False)


def float_weight(model: Any) -> None:
    product = model.transformer.h[0].mlp.c_fc
    product.weight = nn.Parameter(product.weight.float())


def one_product(model: Any) -> None:
    model.transformer.h[0].mlp.c_fc = Conv1D(256, 64).eval()


def hooked(model: Any) -> None:
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [float_scale, float_weight, one_product, hooked])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_changed_product_is_called(bits: int, change: Any) -> None:
    ours = fastgpt.quantize(pair(tiny_config())[1], bits=bits)
    assert fastgpt.explain(ours).startswith("the engine")
    change(ours)
    assert fastgpt.explain(ours).startswith("transformers' loop: transformer.h.0.mlp.c_fc is not a plain module")


@pytest.mark.parametrize(("bits", "head"), [(8, False), (8, True), (4, True)])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate_gives_the_tokens_of_the_rounded_weights(options: dict[str, Any], head: bool, bits: int) -> None:
    theirs, ours = (fastgpt.quantize(model, bits=bits, head=head) for model in pair(tiny_config()))
    assert fastgpt.explain(ours).startswith("the engine")
    expected = in_floats(theirs)
    for n_new in (6, 40):
        ids = token_ids(1 if "prompt_lookup_num_tokens" in options else 2, 5, 131)
        tokens = expected.generate(ids, **GREEDY, **options, max_new_tokens=n_new)
        assert ours.generate(ids, **GREEDY, **options, max_new_tokens=n_new).tolist() == tokens.tolist()
