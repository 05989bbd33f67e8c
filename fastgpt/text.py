"""A model continues a prompt: the text is streamed, and prefill and decoding are timed."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from . import ops
from .checkpoint.fit import rounding_of
from .generate import options as sampling
from .load import load_model_and_tokenizer


@dataclass(frozen=True)
class Continuation:
    """The continuation of a prompt and its timing. Times are in seconds."""

    prompt: str
    text: str
    seed: int
    device: str
    dtype: str
    backend: str
    n_prompt_tokens: int
    n_new_tokens: int
    prefill_s: float
    decode_s: float
    int8: bool
    int4: bool

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.n_prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens/s after the first token, which prefill gives; None when there is no other."""
        return (self.n_new_tokens - 1) / self.decode_s if self.n_new_tokens > 1 else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }

    def summary(self) -> str:
        weights = " with int8 weights" * self.int8 + " with int4 weights" * self.int4
        decode = f"{self.decode_tokens_per_s:,.0f} tokens/s" if self.decode_tokens_per_s else "-"
        return (
            f"prefill {_tokens(self.n_prompt_tokens)} at {self.prefill_tokens_per_s:,.0f} tokens/s, "
            f"decode {_tokens(self.n_new_tokens)} at {decode} "
            f"({self.backend} path on {self.device}, {self.dtype}{weights}, seed {self.seed})"
        )


def _tokens(n: int) -> str:
    return f"{n} token{'s' * (n != 1)}"


class _TimedStreamer(TextStreamer):
    """Writes the prompt with its first new token, then each whole word; records the time of every token.

    New tokens are decoded after the prompt's last one, because some tokenizers drop the space before a text's first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, write: Callable[[str], None] | None):
        super().__init__(tokenizer)  # type: ignore[arg-type]
        self.prompt, self.write = prompt, write
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.token_cache = value[0, -1:].tolist()
            self.print_len = len(self.tokenizer.decode(self.token_cache))
            return
        if len(self.times) == 2 and self.write is not None:  # the first token shows that the call is valid
            self.write(self.prompt)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.write is not None:
            self.write(text + ("\n" if stream_end else ""))


# Whatever a checkpoint's own settings ask for.
_ONE_TEXT = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """The prompt's tokens (1, T), after those that the tokenizer puts before a text, without those that end one."""
    ids: list[int] = tokenizer(prompt)["input_ids"]  # type: ignore[assignment]
    bare: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    ends = (end for end in range(len(bare), len(ids) + 1) if ids[end - len(bare) : end] == bare)
    return torch.tensor([ids[: next(ends, None)]], device="cpu")


def stream_text(
    prompt: str,
    name: str = "demo",
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    prompt_lookup: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    write: Callable[[str], None] | None = None,
) -> Continuation:
    """Continue `prompt` with the model `name`; `write` receives the prompt and then the text, piece by piece.

    temperature 0 is greedy. seed: None draws one; the result reports it. prompt_lookup: how many tokens to propose at
    once where the text repeats itself. bits: 8 or 4, to which the weights of the blocks are rounded.
    Raises ValueError when the prompt leaves no room in the context or an option describes no distribution.
    """
    greedy = temperature == 0
    sampling.check_sampling_options(temperature=None if greedy else temperature, top_k=top_k, top_p=top_p)
    model, tokenizer = load_model_and_tokenizer(name, device, dtype, bits=bits)
    ids = encode_prompt(tokenizer, prompt).to(model.device)
    n_prompt, n_context = ids.shape[1], model.config.n_positions
    if n_prompt == 0:
        raise ValueError("the prompt is empty: give at least one word to continue")
    if n_prompt >= n_context:
        raise ValueError(f"the prompt has {n_prompt} tokens and the model's context is {n_context}: shorten it")
    seed = torch.seed() % 2**32 if seed is None else seed

    streamer = _TimedStreamer(tokenizer, prompt, write)
    start = time.perf_counter()
    sequence = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(max_new_tokens, n_context - n_prompt),
        streamer=streamer,
        pad_token_id=tokenizer.eos_token_id,
        seed=seed,
        prompt_lookup_num_tokens=None if prompt_lookup is None else min(prompt_lookup, n_context),
        tokenizer=tokenizer,  # which the stop strings of a checkpoint's own settings need
        **_ONE_TEXT,
        **({"do_sample": False} if greedy else {"do_sample": True, "temperature": float(temperature)}),
        **({} if greedy else {"top_k": top_k, "top_p": top_p}),
    )[0]
    rounding = rounding_of(model.config)
    first, last = streamer.times[1], streamer.times[-1]  # times[0] is the prompt itself
    return Continuation(
        prompt=prompt,
        text=str(tokenizer.decode(sequence))[len(str(tokenizer.decode(ids[0]))) :],
        seed=seed,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        backend="triton" if ops.runs_kernels(model.device) else "torch",
        n_prompt_tokens=n_prompt,
        n_new_tokens=len(sequence) - n_prompt,
        prefill_s=first - start,
        decode_s=last - first,
        int8=rounding is not None and rounding.bits == 8,
        int4=rounding is not None and rounding.bits == 4,
    )
