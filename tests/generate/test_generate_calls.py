"""Unusual calls of generate() give what they give in transformers: result, or error."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from models import pair, tiny_config, token_ids
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import MaxLengthCriteria

from fastgpt.generate import api
from fastgpt.generate import options as sampling

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """(transformers' model, fastgpt's model)."""
    return pair(tiny_config(n_positions=96))


def outcome(model: Any, ids: Tensor, **options) -> Any:
    """The tokens that a call gives, or the class of its error."""
    torch.manual_seed(3)
    try:
        return model.generate(ids, **{"max_new_tokens": 6} | options).tolist()
    except Exception as error:
        return type(error)


def assert_as_transformers(models: tuple[Any, Any], ids: Tensor, **options) -> Any:
    expected, result = (outcome(model, ids, **options) for model in models)
    assert result == expected
    return result


@pytest.mark.parametrize("lookup", [None, 3])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8), (3, 8), (7,)], ids=str)
def test_position_ids_of_any_shape(models, shape: tuple[int, ...], lookup: int | None) -> None:
    positions = torch.arange(2, 2 + shape[-1]).expand(shape)
    options = GREEDY | {"position_ids": positions, "prompt_lookup_num_tokens": lookup}
    for n_rows in (1,) if lookup else (1, 2):
        result = assert_as_transformers(models, token_ids(n_rows, 8, 131), **options)
        assert isinstance(result, list) or shape not in ((8,), (1, 8))


@pytest.mark.parametrize("lookup", [None, 3])
@pytest.mark.parametrize("lengths", [(4,), (8,), (9,), (12,), (12, 10), (10, 12), (3, 12)], ids=str)
def test_the_shortest_length_counts_and_one_token_is_always_added(models, lengths, lookup: int | None) -> None:
    criteria = StoppingCriteriaList(map(MaxLengthCriteria, lengths))
    options = GREEDY | {"stopping_criteria": criteria, "prompt_lookup_num_tokens": lookup, "max_new_tokens": 20}
    (sequence,) = assert_as_transformers(models, token_ids(1, 8, 131), **options)
    assert len(sequence) == max(9, min(lengths))


@pytest.mark.parametrize("loop", ["_sample", "_assisted_decoding", "_beam_search"])
def test_loops_have_the_parameters_that_are_read_by_position(loop: str) -> None:
    parameters = inspect.signature(getattr(transformers.GenerationMixin, loop)).parameters.values()
    _, *names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    assert tuple(names) == api.LOOP[: len(names)]


def test_loops_may_be_called_by_position(models) -> None:
    """As functions given as custom_generate call them."""
    seen: list[list] = []

    def by_position(model: Any, input_ids, logits_processor, stopping_criteria, generation_config, **options):
        seen.append(list(logits_processor))
        given = options.pop("synced_gpus", False), options.pop("streamer", None)
        loop = type(model)._sample
        return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, *given, **options)

    expected = outcome(models[0], token_ids(2, 8, 131), **GREEDY)
    assert assert_as_transformers(models, token_ids(2, 8, 131), custom_generate=by_position, **GREEDY) == expected
    assert seen == [[], []], "a custom function sees processors that nobody asked for"


def test_a_loop_without_a_length_stops_at_the_end_of_text(models) -> None:
    def without_length(model: Any, input_ids, **call):
        call["stopping_criteria"] = StoppingCriteriaList(
            [c for c in call["stopping_criteria"] if not hasattr(c, "max_length")]
        )
        return model._sample(input_ids, **call)

    ids = token_ids(1, 8, 131)
    free = outcome(models[0], ids, **GREEDY)
    end = free[0][11]
    options = {"do_sample": False, "eos_token_id": end, "custom_generate": without_length}
    assert assert_as_transformers(models, ids, **options)[0][-1] == end


class MakesNaN(transformers.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores * float("nan")


@pytest.mark.parametrize("options", [GREEDY, {"do_sample": True}, {"num_beams": 2, **GREEDY}], ids=str)
def test_nan_of_the_users_processor_is_not_the_models(models, options: dict) -> None:
    assert_as_transformers(models, token_ids(1, 8, 131), logits_processor=LogitsProcessorList([MakesNaN()]), **options)


@pytest.mark.parametrize("options", [GREEDY, {"do_sample": True}, {"num_beams": 2, **GREEDY}], ids=str)
def test_nan_of_the_model_is_refused_in_every_loop(options: dict) -> None:
    _, ours = pair(tiny_config())
    with torch.no_grad():
        ours.transformer.ln_f.bias[3] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        ours.generate(token_ids(1, 8, 131), max_new_tokens=3, **options)


@pytest.mark.parametrize(
    "options",
    [
        *({"top_p": 0.0}, {"top_p": 1.5}, {"top_p": 0}, {"temperature": float("inf")}, {"temperature": 1}),
        *({"temperature": float("inf"), "top_k": 3}, {"temperature": float("inf"), "min_new_tokens": 2}),
        *({"temperature": "0.3"}, {"top_p": "0.3"}, {"top_k": "3"}, {"top_k": 2.5}, {"top_k": -1}, {"top_p": -0.5}),
        *({"temperature": 0.0}, {"temperature": float("nan")}, {"min_p": 2.0}, {"repetition_penalty": 0.0}),
        {"repetition_penalty": float("inf")},
    ],
    ids=str,
)
def test_sampling_options_at_the_edge(models, options: dict) -> None:
    assert_as_transformers(models, token_ids(2, 8, 131), do_sample=True, eos_token_id=[3, 17], **options)


def test_signature_holds_the_parameters_of_transformers(models) -> None:
    theirs, ours = (inspect.signature(type(model).generate).parameters for model in models)
    *parameters, options = theirs.values()
    assert list(ours.values())[:-2] == parameters
    assert list(ours.values())[-1] == options
    assert [*ours][-2] == "seed"


@pytest.mark.parametrize(
    "processor",
    [
        logits_process.TemperatureLogitsWarper(float("inf")),
        logits_process.TopPLogitsWarper(0.0),
        logits_process.RepetitionPenaltyLogitsProcessor(float("inf")),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_edges_have_no_kernel(processor) -> None:
    assert sampling.device_options(LogitsProcessorList([processor]), True, 1, torch.device("cpu")) is None
