"""Decides which calls of `generate()` the engine runs, and says why others go to transformers' own loop."""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

import fastgpt.ops as ops

from ..model import twin
from ..model.checks import check_module
from ..model.compat import CACHE
from .device_loop import DeviceGeneration
from .host_loop import Generation, Request
from .lookup import LONGEST_LOOKUP, DeviceLookupGeneration, LookupGeneration
from .options import ON_DEVICE, RefuseNaN, device_options
from .workspace import obstacle as kernel_obstacle

logger = logging.getLogger("fastgpt")

_PROCESSORS: set[type[LogitsProcessor]] = {*ON_DEVICE, RefuseNaN}
_OTHER_ASSISTANTS = "assistant_early_exit", "assistant_ensemble_weight", "use_mtp"
# Only stop strings read the tokenizer, and they are a criterion.
_INPUTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_tensor", "tokenizer"}


class Handover(BaseStreamer):
    """A streamer that makes `try_engine` return the generation itself, over which the caller iterates."""

    def put(self, value: Tensor) -> None:
        """Does nothing: transformers passes the prompt here."""

    def end(self) -> None:
        """Does nothing."""


def why_not_model(model: nn.Module) -> str | None:
    """Why the engine cannot replace this model's forward; None when it can."""
    return next(_obstacles_in_model(model), None)


@torch.no_grad()
def describe(model: GPT2LMHeadModel) -> str:
    """Where a plain call of `generate()` on this model runs, for `fastgpt doctor`."""
    obstacle = why_not_model(model)
    if obstacle is not None:
        return f"transformers' loop: {obstacle}"
    if not ops.runs_kernels(model.device):
        return "the engine: static cache, torch operations"
    obstacle = kernel_obstacle(model, n_rows=1)
    if obstacle is not None:
        return f"the engine: static cache, torch operations, because {obstacle}"
    return f"the engine: static cache, kernels{' in a CUDA graph' if model.device.type == 'cuda' else ''}"


def explain(model: GPT2LMHeadModel) -> str:
    """Where `generate()` runs on this model and why, then a line for each module that is not plain and so is called.

    No fused operation reads such a module directly. A line reads, for example, "transformers' loop:
    transformer.h.0.mlp.c_fc is not a plain module: it has hooks". Raises TypeError when the model has no `generate`.
    """
    check_module(model, "explain", "generate")
    first = describe(model)
    others = [] if first.startswith("the engine") else [line for line in twin.differences(model) if line not in first]
    return "\n".join([first, *others])


def _obstacles_in_model(model: Any) -> Iterator[str]:
    difference = twin.difference(model)
    if difference is not None:
        yield difference
    if torch.is_autocast_enabled(model.lm_head.weight.device.type):  # `model.device` would look at all modules
        yield "autocast is on"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        yield "the call is being compiled"
    if torch.is_grad_enabled():
        yield "gradients are asked for"


def _obstacles_in_call(
    model: Any,
    ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    inputs: dict[str, Any],
) -> Iterator[str]:
    for name, value in inputs.items():
        if name not in _INPUTS and value is not None and (value is not False or name == "is_causal"):
            yield f"{name} was given"
    for kind in {type(processor) for processor in processors} - _PROCESSORS:
        yield f"the logits processor {kind.__name__}"
    for kind in {type(criterion) for criterion in criteria} - {MaxLengthCriteria, EosTokenCriteria}:
        yield f"the stopping criterion {kind.__name__}"
    for name in ("output_scores", "output_logits", "prefill_chunk_size", "is_assistant", *_OTHER_ASSISTANTS):
        if getattr(config, name, None):
            yield f"{name} was asked for"
    if config.prompt_lookup_num_tokens is not None and len(ids) > 1:
        yield "prompt lookup takes one row"

    cache = inputs.get(CACHE)
    if type(cache) is not DynamicCache or not inputs.get("use_cache"):
        yield f"the cache is {'off' if cache is None else type(cache).__name__}"
    elif getattr(cache, "_is_user_defined", False):
        yield "a cache was given"
    elif cache.offloading:
        yield "the cache is offloaded"
    if ids.dtype != torch.int64 or ids.device != model.device:
        yield f"the prompt is {ids.dtype} on {ids.device}"
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not _is_left_padded(mask, ids):
        yield "the attention mask hides more than padding on the left"
    if positions is None or positions.shape not in (ids.shape, (1, ids.shape[1]), ids.shape[1:]):
        yield "position_ids are not those of the prompt"
    if criteria.max_length is None:
        yield "no length was given at which to stop"
    pad_id, vocabulary = _pad_id(config), range(model.transformer.wte.num_embeddings)
    # It only follows an end token. Both are 50256 by default, also in models that have fewer tokens.
    if pad_id not in vocabulary and any(eos_id in vocabulary for eos_id in _eos_ids(criteria)):
        yield f"pad_token_id {pad_id} is outside the vocabulary"


def _is_left_padded(mask: Tensor, ids: Tensor) -> bool:
    shown = mask != 0
    return mask.shape == ids.shape and bool((shown[:, 1:] >= shown[:, :-1]).all() & shown[:, -1].all())


def _pad_id(config: GenerationConfig) -> int:
    pad: Tensor | None = config._pad_token_tensor  # type: ignore[attr-defined]
    return 0 if pad is None else int(pad)


def _eos_ids(criteria: StoppingCriteriaList) -> list[int]:
    of_each = [it.eos_token_id.flatten().tolist() for it in criteria if isinstance(it, EosTokenCriteria)]
    return list(chain.from_iterable(of_each))


def log_mode(mode: GenerationMode) -> None:
    """Log a call whose mode never reaches `try_engine`, such as beam search."""
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION):
        logger.debug("generate: transformers' loop, because %s was asked for", mode.value.replace("_", " "))


def try_engine(
    model: Any,
    ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **inputs: Any,
) -> "Tensor | GenerateDecoderOnlyOutput | Iterator[Tensor] | None":
    """The engine's result, in the form that transformers' loops return; None when it cannot run the call.

    The arguments are those that transformers passes to `_sample` and `_assisted_decoding`.
    """
    obstacle = why_not_model(model) or next(
        _obstacles_in_call(model, ids, logits_processor, stopping_criteria, generation_config, inputs), None
    )
    if obstacle is not None:
        return _decline(obstacle, streamer)

    lengths = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
    eos_ids = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    past: DynamicCache | None = inputs[CACHE] if generation_config.return_dict_in_generate else None
    request = Request(
        ids=ids,
        mask=inputs.get("attention_mask"),
        positions=torch.atleast_2d(inputs["position_ids"]),
        processors=logits_processor,
        do_sample=bool(generation_config.do_sample),
        max_length=max(min(lengths), ids.shape[1] + 1),  # transformers checks the length only after a new token
        eos_ids=torch.cat([e.flatten() for e in eos_ids]).to(ids.device) if eos_ids else None,
        pad_id=_pad_id(generation_config),
        past=past,
    )
    generation = _start(model, request, generation_config)
    if isinstance(generation, str):
        return _decline(generation, streamer)
    if isinstance(streamer, Handover):
        return _watched(generation, model)
    for tokens in generation if streamer is None else _watched(generation, model):
        if streamer is not None:
            streamer.put(tokens.cpu())
    if streamer is not None:
        streamer.end()
    sequences = generation.sequences.contiguous()
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: past})  # type: ignore[arg-type]


def _decline(obstacle: str, streamer: BaseStreamer | None) -> None:
    if isinstance(streamer, Handover):
        raise ValueError(f"the engine cannot stream this call, because {obstacle}: give generate() a streamer")
    logger.debug("generate: transformers' loop, because %s", obstacle)


def _start(model: Any, request: Request, config: GenerationConfig) -> Generation | DeviceGeneration | str:
    """The generation of a request on kernels or, if they cannot run it, in torch; a string that says why in neither."""
    obstacle, n_proposed = None, config.prompt_lookup_num_tokens
    n_longest = config.max_matching_ngram_size or LONGEST_LOOKUP
    if ops.runs_kernels(model.device):
        options = device_options(request.processors, request.do_sample, len(request.ids), model.device)
        obstacle = kernel_obstacle(model, len(request.ids))
        if options is None:
            obstacle = obstacle or "its logits processors have no kernel"
        elif n_proposed is not None and options.repetition_penalty != 1:
            obstacle = obstacle or "prompt lookup with a repetition penalty has no kernel"
        if options is not None and obstacle is None:
            logger.debug("generate: the engine, on kernels")
            if n_proposed is not None:
                return DeviceLookupGeneration(model, request, options, n_proposed, n_longest)
            return DeviceGeneration(model, request, options)
        if ops.selected_backend() == "triton":
            return f"on the triton backend, asked for by name, {obstacle}"
    logger.debug("generate: the engine%s", f", on torch's operations, because {obstacle}" if obstacle else "")
    if n_proposed is not None:
        return LookupGeneration(model, request, n_proposed, n_longest)
    return Generation(model, request)


def _watched(generation: Iterable[Tensor], model: GPT2LMHeadModel) -> Iterator[Tensor]:
    """The tokens of a generation, during which the caller may do anything but move or replace the model's weights.

    Raises RuntimeError when it did, because steps read the weights where they lay, and the cache is on their device.
    """
    # Read from the modules' own tables, because `parameters()` takes the host longer than a step takes a GPU.
    children = [module._modules for module in model.modules()]
    parameters = [module._parameters for module in model.modules()]

    def addresses() -> list[int | None]:
        modules = [id(module) for table in children for module in table.values()]
        return modules + [None if x is None else x.data_ptr() for table in parameters for x in table.values()]

    before = addresses()
    for tokens in generation:
        yield tokens
        if addresses() != before:
            raise RuntimeError(
                "the model's weights were moved or replaced between two tokens of one call: start a new one"
            )
