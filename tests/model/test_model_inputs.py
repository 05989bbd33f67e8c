"""Inputs that transformers' GPT-2 takes give its numbers here too, and what is no input is refused in one line."""

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

import fastgpt
from fastgpt import modeling, ops
from fastgpt.model.compat import CACHE

# --- inputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_left_padded_batch_equals_single_sequences() -> None:
    _, ours = pair(tiny_config())
    prompts = [token_ids(1, n_tokens, 131, seed=n_tokens) for n_tokens in (3, 11, 7)]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = ours(ids, attention_mask=mask, position_ids=positions).logits
    for row, prompt in enumerate(prompts):
        assert_same_within_rounding(logits[row, -prompt.shape[1] :], ours(prompt).logits[0])
    generated = ours.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, prompt in enumerate(prompts):
        single = ours.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert generated[row, -6:].tolist() == single[0, -6:].tolist()


def _masks(n_batch: int, n_tokens: int) -> dict[str, Tensor]:
    left, right = torch.ones(n_batch, n_tokens, dtype=torch.long), torch.ones(n_batch, n_tokens, dtype=torch.long)
    left[0, :3], right[1, -4:] = 0, 0
    causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril().expand(n_batch, 1, -1, -1).clone()
    causal[:, :, 6:, 1] = False
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    return {"none": torch.ones_like(left), "left": left, "right": right, "4d": causal, "4d additive": additive}


# transformers' eager attention would add a boolean mask to the scores, so that has no meaning there.
@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, "sdpa") for kind in ("none", "left", "right", "4d", "4d additive")]
    + [(kind, "eager") for kind in ("none", "left", "right", "4d additive")],
)
@torch.no_grad()
def test_masks_with_default_positions(kind: str, attention: str) -> None:
    """Positions count from 0 whatever the mask hides, as in transformers; only rows that see something are compared."""
    theirs, ours = pair(tiny_config(), attn_implementation=attention)
    ids, mask = token_ids(2, 10, 131), _masks(2, 10)[kind]
    shown = mask.bool() if mask.ndim == 2 else torch.ones(2, 10, dtype=torch.bool)
    expected, logits = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    assert_same_within_rounding(logits[shown], expected[shown])


@torch.no_grad()
def test_other_inputs() -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(2, 10, 131)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], list(range(10))])
    for inputs in (
        {"input_ids": ids, "token_type_ids": ids.flip(1)},
        {"input_ids": ids, "position_ids": ids % 48},
        {"input_ids": ids, "position_ids": packed},
        {"inputs_embeds": torch.randn(2, 10, 64)},
        {"input_ids": ids, "logits_to_keep": 3},
        {"input_ids": ids[:, :1]},
    ):
        assert_same_within_rounding(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("of_modules", [None, False])
@pytest.mark.parametrize("asked", [False, True])
@torch.no_grad()
def test_attention_that_is_asked_to_be_causal_or_not(asked: bool, of_modules: bool | None) -> None:
    """It overrides the modules, with padding and without, in a continued sequence, and in generate()."""
    theirs, ours = pair(tiny_config())
    ids, mask, results = token_ids(2, 10, 131), _masks(2, 10)["left"], []
    for model in (theirs, ours):
        for block in model.transformer.h:
            block.attn.is_causal = block.attn.is_causal if of_modules is None else of_modules
        past = DynamicCache(config=model.config)
        logits = [
            model(ids, is_causal=asked).logits,
            model(ids, attention_mask=mask, is_causal=asked).logits[mask.bool()],
            model(ids[:, :6], is_causal=asked, **{CACHE: past}).logits,
            model(ids[:, 6:], is_causal=asked, **{CACHE: past}).logits,
        ]
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        tokens = [
            model.generate(ids, is_causal=asked, **options),
            model.generate(ids, attention_mask=mask, is_causal=asked, **options),
        ]
        results.append((torch.cat([part.flatten() for part in logits]), torch.cat(tokens)))
    assert_same_within_rounding(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])


@pytest.mark.parametrize("n_new", [1, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_continuing_from_a_cache(cache: str, padded: bool, n_new: int) -> None:
    theirs, ours = pair(tiny_config())
    ids, mask = token_ids(2, 12, 131), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0 if padded else 1
    results = []
    for model in (theirs, ours):
        config = model.config
        past = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=20)
        first = model(ids[:, : 12 - n_new], attention_mask=mask[:, : 12 - n_new], **{CACHE: past})
        second = model(ids[:, 12 - n_new :], attention_mask=mask, **{CACHE: past})
        results.append(torch.cat([first.logits, second.logits], 1)[mask.bool()])
    assert_same_within_rounding(results[1], results[0])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", [None, CACHE, "past_key_values"])
@torch.no_grad()
def test_a_cache_by_position_and_by_either_name(name: str | None) -> None:
    theirs, ours = pair(tiny_config())
    hidden, ids = torch.randn(1, 5, 64), token_ids(1, 5, 131)
    for path, inputs in ("transformer.h.0", hidden), ("transformer.h.0.attn", hidden), ("transformer", ids):
        results = []
        for model in (theirs, ours):
            module, past = model.get_submodule(path), DynamicCache(config=model.config)
            position, names = ([past], {}) if name is None else ([], {name: past})
            outputs = [module(part, *position, **names) for part in (inputs[:, :4], inputs[:, 4:])]
            assert past.get_seq_length() == 5
            results += [outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1][0]]
        assert_same_within_rounding(results[1], results[0])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "repetition_penalty": 1.3, "return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_generate_equals_transformers(options: dict) -> None:
    # `test_model_on_kernels.py` runs this too.
    if options.get("do_sample") and ops.selected_backend() == "triton":
        pytest.skip("the sampling kernel draws other numbers than torch.multinomial")
    theirs, ours = pair(tiny_config())
    ids, mask = token_ids(2, 8, 131), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    sequences = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
        sequences.append(output if isinstance(output, Tensor) else output.sequences)
    assert sequences[1].tolist() == sequences[0].tolist()


def test_continuous_batching_equals_transformers_and_gives_the_attention_back() -> None:
    theirs, ours = pair(tiny_config())
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [row.tolist()[: 4 + 3 * i] for i, row in enumerate(token_ids(2, 7, 131))]
    memory = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    expected, found = (
        [result.generated_tokens for result in model.generate_batch(prompts, options, memory).values()]
        for model in (theirs, ours)
    )
    assert found == expected
    assert [len(tokens) for tokens in found] == [6, 6]
    assert ours.config._attn_implementation == "fastgpt"


@torch.no_grad()
def test_output_attentions_with_eager() -> None:
    theirs, _ = pair(tiny_config(), attn_implementation="eager")
    ours = fastgpt.patch(copy.deepcopy(theirs))
    ids = token_ids(1, 7, 131)
    expected, output = (model(ids, output_attentions=True) for model in (theirs, ours))
    assert len(output.attentions) == 2
    for ours_weights, their_weights in zip(output.attentions, expected.attentions, strict=True):
        assert_same_within_rounding(ours_weights, their_weights)


def test_empty_inputs() -> None:
    _, ours = pair(tiny_config())
    no_rows, no_tokens = torch.zeros(0, 5, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    assert ours(no_rows).logits.shape == (0, 5, 131)
    with pytest.raises(ValueError, match=r"no tokens.*\(2, 0\)"):
        ours(no_tokens)
    for empty in (no_rows, no_tokens):
        with pytest.raises(ValueError, match="nothing to continue"):
            ours.generate(empty, max_new_tokens=2)


@pytest.mark.parametrize("name", ["attn_pdrop", "resid_pdrop"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_dropout_that_leaves_nothing(name: str, is_padded: bool) -> None:
    theirs, ours = pair(tiny_config(**{name: 1.0}))
    ids = token_ids(2, 10, 131)
    mask = _masks(2, 10)["left"] if is_padded else None
    results = []
    for model in (theirs.train(), ours.train()):
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters()]
        results.append(torch.cat([loss.detach()[None], *gradients]))
    assert_same_within_rounding(results[1], results[0])


@pytest.mark.parametrize("n_layer", [1, 3])
def test_attention_dropout_is_seeded_and_drops(n_layer: int) -> None:
    _, ours = pair(tiny_config(attn_pdrop=0.5, n_layer=n_layer))
    ids = token_ids(1, 16, 131)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(ours.train()(ids).logits)
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    assert not torch.allclose(runs[0], ours.eval()(ids).logits)


def test_attention_name_is_registered_with_its_mask() -> None:
    """transformers' own classes take attn_implementation="fastgpt", padding included."""
    reference = transformers.GPT2LMHeadModel._from_config(tiny_config(), attn_implementation="sdpa").eval()
    model = transformers.GPT2LMHeadModel._from_config(tiny_config(), attn_implementation="fastgpt").eval()
    model.load_state_dict(reference.state_dict())
    assert type(model.transformer.h[0].attn) is not modeling.GPT2Attention
    ids, mask = token_ids(2, 10, 131), _masks(2, 10)["left"]
    logits, expected = model(ids, attention_mask=mask).logits, reference(ids, attention_mask=mask).logits
    assert_same_within_rounding(logits[mask.bool()], expected[mask.bool()])


def test_attention_name_serves_grouped_queries() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=131, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    ours = transformers.LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="fastgpt").eval()
    ours.load_state_dict(theirs.state_dict())
    ids, mask = token_ids(2, 10, 131), _masks(2, 10)["left"]
    expected, logits = theirs(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    assert_same_within_rounding(logits[mask.bool()], expected[mask.bool()])


def test_an_attention_registered_as_sdpa_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that names no attention has "sdpa" in transformers and "fastgpt" here."""
    theirs, ours = pair(tiny_config())
    ids = token_ids(2, 9, 131)
    before = theirs(ids).logits
    registered = transformers.AttentionInterface._global_mapping

    def flat(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return sdpa(module, query * 0, *args, **kwargs)

    sdpa = registered["sdpa"]
    monkeypatch.setitem(registered, "sdpa", flat)
    after = theirs(ids).logits
    assert (after - before).abs().max() > 0.1
    assert_same_within_rounding(ours(ids).logits, before)
    ours.set_attn_implementation("sdpa")
    assert_same_within_rounding(ours(ids).logits, after)
    expected, tokens = (it.generate(ids, max_new_tokens=8, do_sample=False) for it in (theirs, ours))
    assert tokens.tolist() == expected.tolist()


# --- refused inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 131, 10**12])
def test_token_id_outside_the_vocabulary(token: int) -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match=rf"token id {token} .*131"):
        ours(torch.tensor([[1, token]]))
    with pytest.raises(ValueError, match=rf"token id {token} "):
        ours(torch.tensor([[1, 2]]), token_type_ids=torch.tensor([[1, token]]))


def test_position_past_the_context() -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match=r"position 48 .*n_positions is 48"):
        ours(token_ids(1, 49, 131))
    with pytest.raises(ValueError, match="position -1 "):
        ours(token_ids(1, 2, 131), position_ids=torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match="position 48 "):
        ours.generate(token_ids(1, 40, 131), max_new_tokens=20, do_sample=False, eos_token_id=None)


def test_token_ids_are_checked_after_resizing_the_vocabulary() -> None:
    _, ours = pair(tiny_config())
    ours.resize_token_embeddings(140)
    ours(torch.tensor([[139]]))
    with pytest.raises(ValueError, match="token id 140 "):
        ours(torch.tensor([[140]]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("given", ["by name", "by position", "with embeddings"])
@pytest.mark.parametrize(
    ("head", "shape", "name"),
    [
        ("GPT2LMHeadModel", (1, 5), "labels"),
        ("GPT2LMHeadModel", (1, 5), "shift_labels"),
        ("GPT2DoubleHeadsModel", (1, 2, 5), "labels"),
        ("GPT2DoubleHeadsModel", (1,), "mc_labels"),
        ("GPT2ForSequenceClassification", (1,), "labels"),
        ("GPT2ForTokenClassification", (1, 5), "labels"),
    ],
)
def test_label_out_of_range(head: str, shape: tuple[int, ...], name: str, given: str, training: bool) -> None:
    """One rule in every class and mode, where torch knows another for each."""
    _, ours = pair(tiny_config(), head)
    ours.train(training)
    ids = token_ids(2, 5, 131).view(1, 2, 5) if "Double" in head else token_ids(1, 5, 131)
    labels = torch.ones(shape, dtype=torch.int64)

    def call() -> Any:
        options = {name: labels, **({"labels": ids} if name == "shift_labels" else {})}
        if given == "with embeddings":
            return ours(inputs_embeds=ours.transformer.wte(ids.flatten(0, -2)), **options)
        if given == "by name" or name == "shift_labels":
            return ours(ids, **options)
        _, *names = inspect.signature(ours.forward).parameters
        return ours(ids, *[None] * names.index(name), labels)

    for label in (131, -7):
        labels.flatten()[-1] = label
        with pytest.raises(ValueError, match=rf"label {label} is outside .* it must be in \[0, "):
            call()
    labels.fill_(-100)
    call()


def test_labels_that_are_ignored_under_another_number() -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(1, 5, 131)
    labels = ids.clone()
    labels[0, 2] = -7
    for training in (False, True):
        losses = [model.train(training)(ids, labels=labels, ignore_index=-7).loss for model in (theirs, ours)]
        torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e-38},
        {"top_p": -0.5},
        {"top_p": float("nan")},
        {"top_k": -1},
    ],
    ids=str,
)
def test_sampling_options_that_describe_no_distribution(options: dict) -> None:
    _, ours = pair(tiny_config())
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"{name} must .*{value}"):
        ours.generate(token_ids(1, 3, 131), do_sample=True, max_new_tokens=2, **options)


@pytest.mark.parametrize("do_sample", [False, True])
def test_nan_logits_are_not_sampled(do_sample: bool) -> None:
    _, ours = pair(tiny_config())
    with torch.no_grad():
        ours.transformer.ln_f.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        ours.generate(token_ids(1, 3, 131), do_sample=do_sample, max_new_tokens=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 65}, "n_embd 65 .*n_head 4"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon"),
        ({"activation_function": "swoosh"}, "swoosh"),
    ],
)
def test_configuration_that_describes_no_model(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastgpt.GPT2LMHeadModel(tiny_config(**changes))


def test_cross_attention_needs_its_layers() -> None:
    _, ours = pair(tiny_config())
    with pytest.raises(ValueError, match="add_cross_attention"):
        ours(token_ids(1, 3, 131), encoder_hidden_states=torch.randn(1, 2, 64))
