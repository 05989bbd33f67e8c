"""The public methods for generation: `generate()` and `stream()` of the language models.

transformers' own `generate` prepares every call. When it starts its loop over tokens, the engine takes over if it can
run the call; if not, transformers' loop runs.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from ..messages import shown
from ..model.checks import check_module
from ..model.patching import ATTENTION
from .kept import release
from .options import Seed, check_generation_options, refusing_nan, settle_seed
from .routing import Handover, log_mode, try_engine

# The parameters of transformers' loops over tokens, in order; a function that replaced a loop may not show them.
LOOP = (
    *("input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"),
    *("inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer"),
)


def _shows_parameters_of(theirs: Callable) -> Callable[[Callable], Callable]:
    """Give a method the signature of transformers' method that it overrides, plus its own keyword-only parameters."""

    def change(ours: Callable) -> Callable:
        signature = inspect.signature(theirs)
        own = [p for p in inspect.signature(ours).parameters.values() if p.kind is p.KEYWORD_ONLY]
        *parameters, options = signature.parameters.values()
        ours.__signature__ = signature.replace(parameters=[*parameters, *own, options])  # type: ignore[attr-defined]
        return ours

    return change


def warmup(model: Any, batch: int | Iterable[int] = 1, prompt_tokens: int = 512, **options: Any) -> None:
    """Generate a few tokens at every batch size, so that the first calls that count compile, record and allocate less.

    On a GPU, kernels are compiled and CUDA graphs recorded for these batch sizes and this way of choosing tokens. A
    prompt of another length can still compile a kernel or two.
    model: a GPT-2 with `generate`. batch: the number of sequences, or several. prompt_tokens: of each, as many as the
    context allows. options: of the calls to come, as `generate` takes them. Raises as `generate` does, and TypeError
    when the model has no `generate`.
    """
    check_module(model, "warmup", "generate")
    n_tokens = max(1, min(prompt_tokens, model.config.n_positions - 2))
    for n_rows in [batch] if isinstance(batch, int) else batch:
        ids = torch.zeros(n_rows, n_tokens, dtype=torch.int64, device=model.device)
        chosen = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0} | options
        for _ in range(2):  # The first step compiles and the second is recorded, even where each call ends at once.
            model.generate(ids, **chosen, max_new_tokens=2)


class GenerationMethods:
    """`generate` and `stream` of a language model; must precede transformers' classes among the bases."""

    def _apply(self, fn, recurse=True):
        """`to()`, `half()` and others call this: it also frees the memory that the engine keeps for the model."""
        release(self)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    @_shows_parameters_of(GenerationMixin.generate)  # type: ignore[attr-defined]
    def generate(
        self,
        inputs: "Tensor | Sequence[Tensor | Sequence[int]] | None" = None,
        generation_config=None,
        logits_processor=None,
        *args,
        seed: int | None = None,
        **kwargs,
    ):
        """transformers' `generate`, through the engine where it can run the call (see `routing`).

        inputs: (B, T) ids, or a list of prompts of different lengths, which are padded on the left.
        seed: determines every draw, whatever batch a prompt is in. None draws from torch's generator.
        Raises ValueError on wrong sampling options and on NaN logits, TypeError on inputs that hold no token ids.
        """
        check_generation_options(generation_config or self.generation_config, kwargs)  # type: ignore[attr-defined]
        prompt = kwargs.get("input_ids", inputs)
        if isinstance(prompt, list | tuple):
            if kwargs.get("attention_mask") is not None:
                raise ValueError("a list of prompts needs no attention_mask: each is taken whole")
            asked = kwargs.get("pad_token_id"), (generation_config or self.generation_config).pad_token_id  # type: ignore[attr-defined]
            pad_id = next((pad for pad in asked if pad is not None), 0)
            inputs, (prompt, mask) = None, _pad_left(prompt, pad_id, self.device)  # type: ignore[attr-defined]
            kwargs |= {"input_ids": prompt, "attention_mask": mask}
        elif prompt is not None and not isinstance(prompt, Tensor):
            cure = ": unpack it, generate(**inputs)" if isinstance(prompt, Mapping) else ""
            raise TypeError(
                f"generate() takes token ids, (B, T) or a list of prompts, not {type(prompt).__name__}{cure}"
            )
        if isinstance(prompt, Tensor) and prompt.numel() == 0:
            raise ValueError(f"nothing to continue: the prompt has shape {tuple(prompt.shape)}")
        if seed is not None:
            logits_processor = LogitsProcessorList([*(logits_processor or []), Seed(seed)])
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)  # type: ignore[misc]

    def stream(self, inputs: "Tensor | Sequence[Tensor | Sequence[int]] | None" = None, **options) -> Iterator[Tensor]:
        """The tokens that `generate` would append, (B,) per step. When the caller stops iterating, generation stops.

        inputs, options: as for `generate`. Weights changed in place meanwhile may count only from the next call on.
        Raises ValueError at once on a call that the engine cannot run, and RuntimeError when the weights were moved or
        replaced before the next token.
        """
        return self.generate(inputs, streamer=Handover(), **options)

    @wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args, **kwargs):
        attention = self.config._attn_implementation  # type: ignore[attr-defined]
        if attention != ATTENTION:
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        # Continuous batching keeps keys in pages, which only transformers' attention reads, until the manager stops.
        self.set_attn_implementation("sdpa")  # type: ignore[attr-defined]
        try:
            manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.set_attn_implementation(attention)  # type: ignore[attr-defined]
            raise
        manager._original_attn_impl = attention
        return manager

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args, **kwargs) -> None:
        log_mode(generation_mode)
        super()._validate_generation_mode(generation_mode, *args, **kwargs)  # type: ignore[misc]

    # transformers' `generate` calls one of these loops once it has prepared everything.

    @wraps(GenerationMixin._sample)  # type: ignore[attr-defined]
    def _sample(self, *args, **call):
        return self._through_engine(super()._sample, args, call)  # type: ignore[misc]

    @wraps(GenerationMixin._assisted_decoding)  # type: ignore[attr-defined]
    def _assisted_decoding(self, *args, **call):
        return self._through_engine(super()._assisted_decoding, args, call)  # type: ignore[misc]

    @wraps(GenerationMixin._beam_search)  # type: ignore[attr-defined]
    def _beam_search(self, *args, **call):
        call = dict(zip(LOOP, args, strict=False)) | call
        call["logits_processor"] = refusing_nan(call["logits_processor"])
        return super()._beam_search(call.pop("input_ids"), **call)  # type: ignore[misc]

    def _through_engine(self, loop: Callable, args: tuple, call: dict[str, Any]) -> Any:
        call = dict(zip(LOOP, args, strict=False)) | call
        processors = settle_seed(call["logits_processor"], call["generation_config"], call.get("attention_mask"))
        call["logits_processor"] = refusing_nan(processors)
        input_ids = call.pop("input_ids")
        generated = try_engine(self, input_ids, **call)
        return loop(input_ids, **call) if generated is None else generated


def _pad_left(prompts: Sequence[Tensor | Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad B prompts on the left. Returns ids and attention mask, both (B, T) int64.

    prompts: each a list of token ids or a tensor of them, (T,) or (1, T). pad_id: the padding token.
    Raises ValueError on an empty list, and on a prompt that is empty or has another shape; TypeError on one that holds
    no integers.
    """
    if not prompts:
        raise ValueError("nothing to continue: the list of prompts is empty")
    rows = [_token_ids(number, prompt).to(device) for number, prompt in enumerate(prompts)]
    for number, row in enumerate(rows):
        if row.numel() == 0:
            raise ValueError(f"nothing to continue: prompt {number} is empty")
        if row.shape not in ((row.numel(),), (1, row.numel())):
            raise ValueError(f"prompt {number} has shape {tuple(row.shape)}: give (T,) or (1, T)")
    n_tokens = max(row.numel() for row in rows)
    ids = torch.full((len(rows), n_tokens), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        row_ids[n_tokens - row.numel() :] = row.flatten()
        row_mask[n_tokens - row.numel() :] = 1
    return ids, mask


def _token_ids(number: int, prompt: Tensor | Sequence[int]) -> Tensor:
    try:
        ids = prompt if isinstance(prompt, Tensor) else torch.as_tensor(prompt, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"prompt {number} holds no token ids but {shown(prompt)}") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex()):
        raise TypeError(f"prompt {number} holds {ids.dtype}, not token ids")
    return ids.to(torch.int64)
