"""Bodies of GPT-2 as others change them: in text-to-speech, time series and torch's old DataParallel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from models import assert_same_within_rounding, lively, tiny_config
from torch import Tensor, nn
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

import fastgpt
from fastgpt.model.compat import CACHE


def theirs(config: GPT2Config, change: Callable[[Any], Any]) -> Any:
    return change(body(GPT2Model, config))


def ours(config: GPT2Config, change: Callable[[Any], Any]) -> Any:
    return change(body(fastgpt.GPT2Model, config))


def patched_before(config: GPT2Config, change: Callable[[Any], Any]) -> Any:
    return change(fastgpt.patch(body(GPT2Model, config)))


def patched_after(config: GPT2Config, change: Callable[[Any], Any]) -> Any:
    return fastgpt.patch(change(body(GPT2Model, config)))


def body(kind: Any, config: GPT2Config) -> Any:
    model = kind(config).eval()
    model.load_state_dict(weights(kind.__name__, config))
    return model


def weights(kind: str, config: GPT2Config) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return lively(getattr(transformers, kind)(config)).state_dict()


MADE = [ours, patched_before, patched_after]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, wanted in zip(found, expected, strict=True):
        assert_same_within_rounding(mine.detach(), wanted.detach(), n_ulps=512)


# --- text to speech: no tables of tokens and positions ---------------------------------------------------------------


def no_positions(positions: Tensor, n_embd: int) -> Tensor:
    return torch.zeros((*positions.shape, n_embd))


class NoPositions(nn.Module):
    def forward(self, positions: Tensor) -> Tensor:
        return no_positions(positions, 64)


class Speech(GPT2PreTrainedModel, GenerationMixin):
    """A model of sounds over the body: a prompt of vectors, then tokens with tables of its own."""

    def __init__(self, body: Any):
        super().__init__(body.config)
        self.transformer = body
        self.sounds, self.places = nn.Embedding(131, 64), nn.Embedding(64, 64)
        self.lm_head = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 131))
        self.prompt = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids, **{name: kwargs.get(name) for name in (CACHE, "use_cache")}}

    def forward(self, input_ids, use_cache=None, **options):
        n_cached = 0 if options[CACHE] is None else options[CACHE].get_seq_length()
        x = self.sounds(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        x = torch.cat([self.prompt.expand(len(x), -1, -1), x[:, 5:]], 1)[:, n_cached:]
        outputs = self.transformer(inputs_embeds=x, use_cache=use_cache, **{CACHE: options[CACHE]})
        logits: Any = self.lm_head(outputs.last_hidden_state)
        return CausalLMOutputWithCrossAttentions(logits=logits, **{CACHE: getattr(outputs, CACHE)})


def without_tables(model: Any) -> Any:
    del model.wpe, model.wte
    model.wpe = partial(no_positions, n_embd=64)
    return model


def other_positions(model: Any) -> Any:
    model.wpe = NoPositions()
    return model


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("change", [without_tables, other_positions])
def test_a_body_without_its_tables(change: Callable[[Any], Any], made: Callable) -> None:
    """Longer than the context of the configuration, in one call and with a cache, and its gradients."""
    vectors = torch.randn(2, 60, 64, generator=torch.Generator().manual_seed(1))

    def results(model: Any) -> list[Tensor]:
        whole = model(inputs_embeds=vectors).last_hidden_state
        cache = getattr(model(inputs_embeds=vectors[:, :50], use_cache=True), CACHE)
        rest = model(inputs_embeds=vectors[:, 50:], **{CACHE: cache}).last_hidden_state
        whole.square().mean().backward()
        return [whole, rest, *(x.grad for x in model.parameters() if x.grad is not None)]

    found, expected = results(made(tiny_config(), change)), results(theirs(tiny_config(), change))
    assert len(expected) > 2 + 2 * 12
    assert_same(found, expected)


@pytest.mark.parametrize("made", MADE)
def test_tokens_past_the_context_with_other_positions(made: Callable) -> None:
    ids = torch.arange(60)[None]
    found, expected = (make(tiny_config(), other_positions)(ids).last_hidden_state for make in (made, theirs))
    assert_same([found], [expected])


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}])
def test_speech(options: dict[str, Any], made: Callable) -> None:
    def tokens(make: Callable) -> Tensor:
        body = make(tiny_config(), without_tables)
        torch.manual_seed(3)
        model: Any = Speech(body).eval()
        ids = torch.ones(1, 6, dtype=torch.long)
        return model.generate(ids, max_new_tokens=20, **options)

    assert torch.equal(tokens(made), tokens(theirs))


def test_quantize_needs_a_finished_model() -> None:
    """A class that forgets post_init, as one of text-to-speech does: refused, and not changed."""
    model = Speech(body(GPT2Model, tiny_config()))
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TypeError, match=r"Speech must end with self\.post_init"):
        fastgpt.quantize(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


# --- time series: the first layers, norms and positions trained ------------------------------------------------------


def first_layers(model: Any) -> Any:
    model.h = model.h[:2]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln" in name or "wpe" in name)
    return model


@pytest.mark.parametrize("made", MADE)
def test_first_layers_with_trained_norms(made: Callable) -> None:
    series = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))

    def results(make: Callable) -> list[Tensor]:
        model = make(tiny_config(n_layer=4, output_attentions=True, output_hidden_states=True), first_layers)
        optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1)
        for _ in range(3):
            output = model(inputs_embeds=series)
            output.last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [*output.hidden_states, *output.attentions, *model.parameters()]

    assert_same(results(made), results(theirs))


# --- torch's DataParallel, which Trainer takes where it finds several GPUs --------------------------------------------


def replica(model: nn.Module) -> Any:
    """What DataParallel makes for each GPU: modules without parameters, whose attributes are copies of the weights."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            setattr(copy, name, copies[child] if child is not None else None)
        for name, parameter in module._parameters.items():
            setattr(copy, name, parameter.clone() if parameter is not None else None)
    return copies[model]


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_replicas(recomputes: bool, is_patched: bool) -> None:
    ids = torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(1))

    def results(kind: type, patch: bool) -> list[Tensor]:
        model = body(kind, tiny_config())
        model = (fastgpt.patch(model) if patch else model).train()
        if recomputes:
            model.gradient_checkpointing_enable()
        outputs = [replica(model)(row[None], labels=row[None]) for row in ids]
        logits = [output.logits.detach() + 0 for output in outputs]
        (outputs[0].loss + outputs[1].loss).backward()
        with torch.no_grad():
            logits += [replica(model.eval())(row[None]).logits for row in ids]
        return logits + [parameter.grad for parameter in model.parameters()]

    found = results(GPT2LMHeadModel if is_patched else fastgpt.GPT2LMHeadModel, is_patched)
    assert_same(found, results(GPT2LMHeadModel, False))
