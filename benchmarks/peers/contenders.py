"""Contenders other than torch and transformers. One that is not installed, or that differs, is left out with a reason.

On a CPU these are whole models, ctranslate2, onnxruntime, OpenVINO and llama.cpp with the same weights, for prefill and
decode.
On a GPU they are operations of liger-kernel, cut-cross-entropy, flash-attn and quack-kernels.
Shapes: B batch, T tokens, H heads, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GPT2LMHeadModel

import fastgpt
from fastgpt.accounting import Shape
from fastgpt.bench import MakeWork, operations
from fastgpt.bench.parity import ParityError
from fastgpt.bench.workloads import OURS, Work, contender, decode, prefill
from fastgpt.messages import first_line

from .cpu_engines import CTranslate2, Engine, OnnxRuntime, Remote
from .llama_engines import LlamaCpp, LlamaCppBFloat16, LlamaCppQ4, LlamaCppQ8
from .openvino_engines import OpenVino, OpenVinoBFloat16, OpenVinoInt8
from .quantized_engines import CTranslate2Int8, OnnxRuntime8Bit, OnnxRuntimeInt8

# --- whole models ---------------------------------------------------------------------------------------------------

Build = Callable[[GPT2LMHeadModel, int], Remote]


def _contender(build: Build, *, bfloat16: Build | None = None, allowed: float | None = None) -> MakeWork:
    """build: starts the engine of a model in float32 on the CPU, for B sequences. bfloat16: one that computes in that.

    allowed: the error of an engine that rounds, as `accuracy_of` has it. Any other must pass `check_engine`.
    """
    # Converting takes longer than timing: prefill and decode share an engine.
    builds = {torch.float32: (lru_cache(maxsize=1)(build), allowed)}
    if bfloat16 is not None:
        builds[torch.bfloat16] = lru_cache(maxsize=1)(bfloat16), MAX_BFLOAT16_ERROR

    def make(workload: str, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, dtype: torch.dtype) -> Work:
        _check_place(workload, ids, dtype, builds)
        build, allowed = builds[dtype]
        engine, accuracy = build(base, ids.shape[0]), {}
        if allowed is None:
            check_engine(engine, base, ids, n_new_tokens)
        else:
            accuracy = accuracy_of(engine.logits(ids), base, ids, allowed)
        seconds = partial(engine.seconds, workload, ids, n_new_tokens)
        return Work(
            run=seconds,
            seconds=seconds,
            n_tokens=ids.numel() if workload == "prefill" else ids.shape[0] * (n_new_tokens - 1),
            held_bytes=lambda: engine.n_bytes,
            peak_growth=partial(engine.peak_growth, workload, ids, n_new_tokens),
            accuracy=accuracy,
        )

    return make


def _check_place(workload: str, ids: Tensor, dtype: torch.dtype, dtypes: Collection[torch.dtype]) -> None:
    if ids.device.type != "cpu" or dtype not in dtypes or workload == "train":
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"runs here only on a CPU, in {known}, for prefill and decode")


def _quantized(**options: Any) -> MakeWork:
    """fastgpt with rounded weights. options: of `fastgpt.quantize`."""
    allowed = MAX_INT4_ERROR if options.get("bits") == 4 else MAX_INT8_ERROR

    def make(workload: str, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int, dtype: torch.dtype) -> Work:
        _check_place(workload, ids, dtype, [torch.float32])
        model = fastgpt.quantize(contender(OURS, base, ids.device, dtype), **options)
        with torch.no_grad():
            accuracy = accuracy_of(model(ids, use_cache=False).logits, base, ids, allowed)
        is_decode = workload == "decode"
        work = decode(OURS, model, ids, n_new_tokens) if is_decode else prefill(OURS, model, ids)
        return replace(work, accuracy=accuracy)

    return make


def check_engine(engine: Engine, base: GPT2LMHeadModel, ids: Tensor, n_new_tokens: int) -> None:
    """Raise ParityError unless logits agree within 64 ulps of transformers' largest and greedy tokens are equal."""
    with torch.no_grad():
        theirs = base(ids, use_cache=False).logits
    difference = (engine.logits(ids) - theirs).abs().max().item()
    allowed = 64 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
    if not difference <= allowed:
        raise ParityError(f"its logits differ from transformers' by {difference:.3g}, allowed {allowed:.3g}")
    settings = GenerationConfig(max_new_tokens=n_new_tokens, pad_token_id=0, do_sample=False)
    sequences = base.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
    if not torch.equal(engine.generate(ids, n_new_tokens)[0], sequences[:, ids.shape[1] :]):
        raise ParityError("its greedy tokens are not transformers'")


# What int8 may cost: the largest seen is 0.054 (onnxruntime, one scale for all rows), and a wrong model is beyond 1.
MAX_INT8_ERROR = 0.1
# The same of int4, which is 0.24 on new weights of gpt2 in groups of 64.
MAX_INT4_ERROR = 0.5
# The same of llama.cpp in float32, whose GELU is a table in float16: 0.0005 on new weights of gpt2.
MAX_TABLE_ERROR = 0.005
# The same of products in bfloat16: transformers' own is 0.012 on new weights of gpt2.
MAX_BFLOAT16_ERROR = 0.03


def accuracy_of(logits: Tensor, base: GPT2LMHeadModel, ids: Tensor, allowed: float) -> dict[str, float]:
    """How far logits (B, T, V) of ids are from transformers' in float32.

    logit_error: the root mean square of the differences, as a share of that of transformers' logits around their mean.
    kl_divergence: of the predicted distributions, in nats for each token. Raises ParityError when the error is beyond
    `allowed`, what rounded weights explain.
    """
    with torch.no_grad():
        theirs = base(ids, use_cache=False).logits
    spread = (theirs - theirs.mean(-1, keepdim=True)).square().mean().sqrt()
    error = ((logits - theirs).square().mean().sqrt() / spread).item()
    if not error <= allowed:
        raise ParityError(f"its logits differ from transformers' by {error:.3g} of their spread, allowed {allowed}")
    mine, true = (x.flatten(0, 1).double().log_softmax(-1) for x in (logits, theirs))
    kl_divergence = F.kl_div(mine, true, log_target=True, reduction="batchmean").item()
    return {"logit_error": error, "kl_divergence": kl_divergence}


# By name, for `benchmark.run_benchmark`.
CPU_PEERS: dict[str, MakeWork] = {
    "ctranslate2": _contender(partial(Remote, CTranslate2)),
    "onnxruntime": _contender(partial(Remote, OnnxRuntime)),
    "openvino": _contender(partial(Remote, OpenVino), bfloat16=partial(Remote, OpenVinoBFloat16)),
    "llama.cpp": _contender(
        partial(Remote, LlamaCpp), bfloat16=partial(Remote, LlamaCppBFloat16), allowed=MAX_TABLE_ERROR
    ),
}
# With int8 weights, or int4; the other engines have them in the head too, and round rows to int8.
OUR_QUANTIZED: dict[str, MakeWork] = {
    "fastgpt-int8": _quantized(),
    "fastgpt-int8-head": _quantized(head=True),
    "fastgpt-int8-rows": _quantized(head=True, activations=True),
    "fastgpt-int4": _quantized(bits=4, head=True),
}
QUANTIZED_PEERS: dict[str, MakeWork] = {
    "ctranslate2-int8": _contender(partial(Remote, CTranslate2Int8), allowed=MAX_INT8_ERROR),
    "onnxruntime-int8": _contender(partial(Remote, OnnxRuntimeInt8), allowed=MAX_INT8_ERROR),
    "onnxruntime-8bit": _contender(partial(Remote, OnnxRuntime8Bit), allowed=MAX_INT8_ERROR),
    "openvino-int8": _contender(partial(Remote, OpenVinoInt8), allowed=MAX_INT8_ERROR),
    "llama.cpp-q8": _contender(partial(Remote, LlamaCppQ8), allowed=MAX_INT8_ERROR),
    "llama.cpp-q4": _contender(partial(Remote, LlamaCppQ4), allowed=MAX_INT4_ERROR),
}

# --- operations -----------------------------------------------------------------------------------------------------

# A function of a case's inputs, made only where its package can be imported.
MakeOperation = Callable[[Shape], Callable[..., Any]]


def _liger_layer_norm(shape: Shape) -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_layer_norm  # type: ignore[import-not-found]

    return lambda x, weight, bias: liger_layer_norm(x, weight, bias, 1e-5)


def _liger_linear_cross_entropy(shape: Shape) -> Callable[..., Any]:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_linear_cross_entropy,
    )

    return liger_fused_linear_cross_entropy


def _cut_cross_entropy(shape: Shape) -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    return linear_cross_entropy


def _quack_linear_cross_entropy(shape: Shape) -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found]

    return chunked_linear_cross_entropy


def _flash_attn_2(shape: Shape) -> Callable[..., Any]:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return lambda packed: _on_packed(flash_attn_func, packed, shape.n_head)


def _flash_attn_4(shape: Shape) -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    return lambda packed: _on_packed(flash_attn_func, packed, shape.n_head)


def _on_packed(attend: Callable[..., Any], packed: Tensor, n_heads: int) -> Tensor:
    """Attention over (B, T, H, D) views of the projection's output (B, T, 3*C)."""
    B, T, width = packed.shape
    out = attend(*packed.view(B, T, 3, n_heads, -1).unbind(2), causal=True)
    out = out[0] if isinstance(out, tuple) else out  # the log-sum-exp comes along in some versions
    return out.reshape(B, T, width // 3)


# By the operation's name. Attention with dropout has none: other random numbers than ours leave nothing to check.
OPERATION_PEERS: dict[str, dict[str, MakeOperation]] = {
    "layer_norm": {"liger": _liger_layer_norm},
    "causal_attention": {"flash-attn 2": _flash_attn_2, "flash-attn 4": _flash_attn_4},
    "linear_cross_entropy": {
        "liger": _liger_linear_cross_entropy,
        "cut-cross-entropy": _cut_cross_entropy,
        "quack": _quack_linear_cross_entropy,
    },
}


def with_peers(case: operations.Case, shape: Shape) -> tuple[operations.Case, list[dict[str, Any]]]:
    """A case with the peers that are installed and agree with the reference, and a row for each other that says why."""
    contenders, left_out = dict(case.contenders), []
    for name, reason, function in _judged(case, shape):
        if reason is None:
            contenders[name] = function
        else:
            left_out.append({"operation": case.operation, "contender": name, "skipped": reason})
    return replace(case, contenders=contenders), left_out


def _judged(case: operations.Case, shape: Shape) -> Iterator[tuple[str, str | None, Callable[..., Any]]]:
    for name, make in OPERATION_PEERS.get(case.operation, {}).items():
        function: Callable[..., Any] = make
        try:
            function = make(shape)
            reason = operations.check(replace(case, contenders={name: function, "torch": case.contenders["torch"]}))
        except Exception as error:  # A package may be missing, or fail on this GPU, in more ways than can be named.
            reason = first_line(error)
        yield name, reason, function
