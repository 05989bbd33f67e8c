"""The rows of the second table: what `generate()` and what surrounds it may be asked for."""

from collections.abc import Callable
from functools import cache
from typing import Any

import peft
import torch
import transformers
from models import lively, tiny_config, token_ids
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    TextStreamer,
)

import fastgpt
from fastgpt.model.compat import CACHE

from .forward import CROSS, Row, padding

N_PROMPT = 7
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
SAMPLE = {"do_sample": True}


@cache
def tokenizer() -> Any:
    return fastgpt.load_demo()[1]


def prompt(n_rows: int = 2) -> Tensor:
    return token_ids(n_rows, N_PROMPT, 131)


def asked(n_rows: int = 2, **options: Any) -> Callable[[Any, Tensor], Any]:
    """generate() with these options, as greedy as they leave it; a function makes an option when it is needed."""

    def call(model: Any, _: Tensor) -> Any:
        torch.manual_seed(3)
        chosen = {name: value() if callable(value) else value for name, value in options.items()}
        return model.generate(prompt(n_rows), **GREEDY | chosen)

    return call


def option(n_rows: int = 2, **options: Any) -> Row:
    """A row of options that are named as they are written."""
    return Row(", ".join(f"`{name}={value!r}`" for name, value in options.items()), asked(n_rows, **options))


def continued(make_cache: Callable[[Any], Any]) -> Callable[[Any, Tensor], Any]:
    return lambda model, _: model.generate(prompt(), **GREEDY, **{CACHE: make_cache(model.config)})


def draft() -> Any:
    """Another, smaller model, which proposes tokens."""
    torch.manual_seed(1)
    return lively(transformers.GPT2LMHeadModel(tiny_config(n_layer=1))).eval()


def negated(input_ids: Tensor, scores: Tensor) -> Tensor:
    return -scores


def larger(row: int, ids: Tensor) -> list[int]:
    """No token below the newest one."""
    return [*range(int(ids[-1]), 131)]


def ends_on_even(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
    return input_ids[:, -1] % 2 == 0


class Silent(TextStreamer):
    """A streamer that shows nothing."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value)

    def end(self) -> None: ...


def streamed(model: Any, _: Tensor) -> Any:
    streamer = Silent()
    return model.generate(prompt(1), **GREEDY, streamer=streamer), streamer.tokens


def batched(model: Any, _: Tensor) -> Any:
    """Continuous batching, of prompts of different lengths."""
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [row.tolist()[: 4 + 3 * i] for i, row in enumerate(prompt())]
    memory = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    return [result.generated_tokens for result in model.generate_batch(prompts, options, memory).values()]


def stopped_by_text(model: Any, _: Tensor) -> Any:
    options = GREEDY | {"max_new_tokens": 30, "stop_strings": ["e", "t "], "tokenizer": tokenizer()}
    return model.generate(prompt(), **options)


def in_pipeline(model: Any, _: Tensor) -> Any:
    """Texts of different lengths in batches of two."""
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), batch_size=2)
    texts = ["ROMEO:", "O, speak again, bright angel", "JULIET:"]
    return pipeline(texts, max_new_tokens=8, do_sample=False)


def describing(model: Any, _: Tensor) -> Any:
    """The decoder of an encoder-decoder model, which describes a picture."""
    encoder = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    torch.manual_seed(0)
    vision = transformers.ViTModel(encoder).eval()
    whole: Any = transformers.VisionEncoderDecoderModel(encoder=vision, decoder=model).eval()
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    return whole.generate(pixels, **GREEDY, decoder_start_token_id=5, num_beams=2)


def adapted(model: Any, _: Tensor) -> Any:
    torch.manual_seed(2)
    lora = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(model, lora).eval().generate(input_ids=prompt(), **GREEDY)


def resized(model: Any, _: Tensor) -> Any:
    torch.manual_seed(0)
    model.resize_token_embeddings(1040, mean_resizing=False)
    return model.generate(prompt(), **GREEDY)


def sampled(name: str, **options: Any) -> Row:
    """The kernels draw from a generator of their own: with one candidate all draw the same."""
    return Row(name, asked(**SAMPLE | options), kernels=asked(**SAMPLE | options | {"top_k": 1}))


MANY_ENDS: dict[str, Any] = {"eos_token_id": [*range(0, 131, 2)]}
LEFT: dict[str, Any] = {"attention_mask": lambda: padding("left")(prompt())}
GENERATION = [
    Row("greedy", asked()),
    Row("`attention_mask`, padding on the left", asked(**LEFT)),
    Row("`attention_mask` with holes", asked(attention_mask=lambda: padding("holes")(prompt()))),
    Row("`position_ids`", asked(position_ids=lambda: torch.arange(3, 3 + N_PROMPT).expand(2, -1))),
    Row("`token_type_ids`", asked(token_type_ids=lambda: prompt().flip(1))),
    Row("`is_causal=False`", asked(is_causal=False)),
    Row("`inputs_embeds`", lambda model, _: model.generate(inputs_embeds=model.transformer.wte(prompt()), **GREEDY)),
    sampled("sampled"),
    sampled("sampled, `attention_mask`", **LEFT),
    sampled("sampled, `temperature=0.7`, `top_k=9`, `top_p=0.9`", temperature=0.7, top_k=9, top_p=0.9),
    sampled("sampled, `min_p=0.1`", min_p=0.1),
    sampled("sampled, `num_return_sequences=3`", num_return_sequences=3),
    Row("many `eos_token_id`", asked(**MANY_ENDS)),
    Row("many `eos_token_id`, `min_new_tokens=3`", asked(**MANY_ENDS, min_new_tokens=3)),
    Row("many `eos_token_id`, `min_length=9`", asked(**MANY_ENDS, min_length=9)),
    option(repetition_penalty=1.3),
    option(no_repeat_ngram_size=2),
    option(bad_words_ids=[[7], [8, 9]]),
    option(sequence_bias=[[[7], 4.0], [[8, 9], -2.0]]),
    option(suppress_tokens=[5, 6, 7]),
    option(begin_suppress_tokens=[5, 6, 7]),
    option(forced_bos_token_id=9),
    option(forced_eos_token_id=9),
    option(encoder_no_repeat_ngram_size=2),
    option(encoder_repetition_penalty=1.3),
    option(remove_invalid_values=True),
    option(exponential_decay_length_penalty=(2, 1.5), eos_token_id=11),
    option(guidance_scale=1.5),
    option(**SAMPLE, typical_p=0.8),
    option(**SAMPLE, epsilon_cutoff=0.01),
    option(**SAMPLE, eta_cutoff=0.01),
    option(**SAMPLE, top_h=0.5),
    option(**SAMPLE, renormalize_logits=True),
    Row("`watermarking_config`", asked(watermarking_config=lambda: transformers.WatermarkingConfig(bias=3.0))),
    Row("`prefix_allowed_tokens_fn`", asked(prefix_allowed_tokens_fn=lambda: larger)),
    Row("`logits_processor` of one's own", asked(logits_processor=lambda: LogitsProcessorList([negated]))),
    Row("`stopping_criteria` of one's own", asked(stopping_criteria=lambda: StoppingCriteriaList([ends_on_even]))),
    Row("`stop_strings`", stopped_by_text, config={"vocab_size": 1024}),
    option(max_time=60.0),
    option(num_beams=3, num_return_sequences=2),
    Row(
        "`num_beams=3`, many `eos_token_id`, `length_penalty`, `early_stopping`",
        asked(**MANY_ENDS, num_beams=3, length_penalty=0.3, early_stopping=True),
    ),
    option(num_beams=3, **SAMPLE),
    Row("`assistant_model`", asked(1, assistant_model=draft)),
    Row("`assistant_model`, sampled", asked(1, assistant_model=draft, **SAMPLE)),
    Row("`prompt_lookup_num_tokens=3`", asked(1, prompt_lookup_num_tokens=3)),
    option(return_dict_in_generate=True),
    option(return_dict_in_generate=True, output_scores=True, output_logits=True),
    option(return_dict_in_generate=True, output_hidden_states=True),
    Row("`streamer`", streamed),
    option(use_cache=False),
    Row("DynamicCache", continued(lambda config: DynamicCache(config=config))),
    Row("StaticCache", continued(lambda config: StaticCache(config=config, max_cache_len=20))),
    Row('`cache_implementation="static"`', asked(cache_implementation="static", disable_compile=True)),
    Row(
        '`cache_implementation="quantized"`',
        asked(cache_implementation="quantized", cache_config=lambda: {"backend": "quanto"}),
        needs="optimum.quanto",
    ),
    Row('`cache_implementation="offloaded"`', asked(cache_implementation="offloaded"), needs="cuda"),
    option(prefill_chunk_size=3),
    Row("a head of its own (`tie_word_embeddings=False`)", asked(), config={"tie_word_embeddings": False}),
    Row("`resize_token_embeddings`", resized),
    Row("an adapter of PEFT", adapted),
    Row('`attn_implementation="eager"`', asked(), attention="eager"),
    Row("continuous batching (`generate_batch`)", batched),
    Row("`pipeline` with `batch_size=2`", in_pipeline, config={"vocab_size": 1024, "n_positions": 96}),
    Row("the decoder of a VisionEncoderDecoderModel", describing, config=CROSS | {"is_decoder": True}),
]
