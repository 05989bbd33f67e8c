"""The decode step as one kernel, against transformers in the same dtype and in float64, and its grid barriers.

Every program is a thread of `cooperative_grid`. Scratch memory starts as NaN, and so do all slots of the cache that
hold no key: behind the last one, and before the first.
"""

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from accuracy import assert_as_accurate, max_error
from fastgpt_kernels.common import chip
from fastgpt_kernels.common.decode_weights import DecodeLayer, DecodeWeights
from fastgpt_kernels.common.launch import launch
from fastgpt_kernels.operations.persistent_decode import kernels
from fastgpt_kernels.operations.persistent_decode import tiles as persistent_decode_tiles
from fastgpt_kernels.operations.persistent_decode.op import PersistentDecoder
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, INTERPRETING, check_overflow, dry_run
from interpreter.cooperative import cooperative_grid
from models import look_trained, pair, tiny_config, token_ids
from paths import ROOT
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from triton import knobs
from triton.runtime.errors import InterpreterError

from fastgpt.model.compat import CACHE

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF] if INTERPRETING else HALF
SHIPPED = persistent_decode_tiles.PersistentRing(4, 8, 6)
# In the interpreter time goes with the number of tiles.
LARGE_TILES = SHIPPED._replace(groups=16)
HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 20, 1600: 25}
PROFILE = settings.get_current_profile_name()
# A case takes a second or more: 3 of them, and 78 with the thorough profile.
FEW_CASES = settings(max_examples=max(1, settings.get_profile(PROFILE).max_examples // 8))

# Prints the code of one configuration for sm_90.
COMPILE = """
from fastgpt_kernels import audit
launch, *_ = audit.launches("sm_90", "persistent_decode bf16 small")
print(audit.compile_launch(launch, "sm_90").asm["ptx"])
"""

only_interpreted = pytest.mark.skipif(not INTERPRETING, reason="a GPU is here: kernels run on it")
only_on_gpu = pytest.mark.skipif(INTERPRETING, reason="CUDA graphs need a GPU")


@contextmanager
def tuned(n_programs: int, ring: persistent_decode_tiles.PersistentRing = LARGE_TILES) -> Iterator[None]:
    """Another number of programs and other tiles; on a GPU, those of the GPU."""
    if not INTERPRETING:
        yield
        return
    with mock.patch.multiple(persistent_decode_tiles, _PERSISTENT_PROGRAMS_OF_CPU=n_programs, _PERSISTENT_RING=ring):
        yield


def small_config(n_channels: int = 128, **changes: Any) -> GPT2Config:
    return tiny_config(n_embd=n_channels, n_head=n_channels // 64, **({"n_positions": 256} | changes))


def make_model(config: GPT2Config, dtype: torch.dtype) -> GPT2LMHeadModel:
    """transformers' own."""
    return pair(config)[0].to(DEVICE, dtype)


def weights_of(model: Any) -> DecodeWeights:
    config, body = model.config, model.transformer
    layers = []
    for i, block in enumerate(body.h):
        ln_1, attn, ln_2, mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        scale = 0.125 / (i + 1 if config.scale_attn_by_inverse_layer_idx else 1)
        before = ln_1.weight, ln_1.bias, attn.c_attn.weight, attn.c_attn.bias, scale
        behind = attn.c_proj.weight, attn.c_proj.bias, ln_2.weight, ln_2.bias
        layers.append(DecodeLayer(*before, *behind, mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias))
    return DecodeWeights(
        wte=body.wte.weight,
        wpe=body.wpe.weight,
        layers=tuple(layers),
        ln_f_weight=body.ln_f.weight,
        ln_f_bias=body.ln_f.bias,
        head=model.lm_head.weight,
        eps=config.layer_norm_epsilon,
        n_heads=config.n_head,
        activation=config.activation_function,
    )


def make_decoder(model: Any) -> PersistentDecoder:
    decoder = PersistentDecoder(weights_of(model))
    for scratch in decoder._scratch:
        scratch.fill_(torch.nan)
    return decoder


def integer(value: int) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def decode(
    decoder: PersistentDecoder,
    cache: Tensor,
    token: int,
    position: int,
    slot: int,
    start: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Logits (1, V)."""
    logits = torch.full((1, decoder._sizes["n_vocab"]), torch.nan, device=DEVICE)
    starts = None if start is None else integer(start)
    with cooperative_grid(seed):
        decoder.decode(cache, integer(token), integer(position), integer(slot), starts, logits)
    return logits


class Prompt(NamedTuple):
    """A prompt that a model has read, in a cache as the decoder takes it and in one of transformers'."""

    cache: Tensor
    past: DynamicCache


def read_prompt(model: Any, ids: Tensor, n_slots: int, start: int = 0) -> Prompt:
    """ids: (1, T), into slots start .. start + T - 1; the others are NaN."""
    config, past = model.config, DynamicCache(config=model.config)
    shape = config.n_layer, 2, 1, config.n_head, n_slots, config.n_embd // config.n_head
    cache = torch.full(shape, torch.nan, dtype=model.dtype, device=DEVICE)
    if ids.shape[1]:
        model(ids, **{CACHE: past})
        cache[..., start : start + ids.shape[1], :] = keys_and_values(past)
    return Prompt(cache, past)


def keys_and_values(past: DynamicCache) -> Tensor:
    """(L, 2, 1, H, T, D)."""
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in past.layers])  # type: ignore[attr-defined]


def doubled(past: DynamicCache, config: GPT2Config) -> DynamicCache:
    twin = DynamicCache(config=config)
    for i, layer in enumerate(past.layers):
        if layer.is_initialized:  # type: ignore[union-attr]
            twin.update(layer.keys.double(), layer.values.double(), i)  # type: ignore[union-attr]
    return twin


@torch.inference_mode()
def check(
    model: Any, n_past: int, *, n_steps: int = 1, start: int = 0, n_spare: int = 2, seed: int = 0, slack: float = 1.0
) -> None:
    """n_steps tokens behind a prompt of n_past, whose first slot is `start`, in a cache with n_spare slots behind."""
    ids = token_ids(1, n_past + n_steps, model.config.vocab_size, seed)
    n_slots = start + n_past + n_steps + n_spare
    cache, past = read_prompt(model, ids[:, :n_past], n_slots, start)
    exact, exact_past = copy.deepcopy(model).double(), doubled(past, model.config)
    before, decoder = cache.clone(), make_decoder(model)

    for position in range(n_past, n_past + n_steps):
        token = ids[:, position : position + 1]
        logits = decode(decoder, cache, int(token), position, start + position, start or None, seed + position)
        eager, truth = (m(token, **{CACHE: p}).logits[:, -1] for m, p in ((model, past), (exact, exact_past)))
        assert_as_accurate(logits.to(model.dtype), eager, truth, 1.25 * slack, slack)

    appended = slice(start + n_past, start + n_past + n_steps)
    theirs, truth = keys_and_values(past)[..., n_past:, :], keys_and_values(exact_past)[..., n_past:, :]
    for ours, eager, true in zip(cache[..., appended, :], theirs, truth, strict=True):
        assert_as_accurate(ours, eager, true, 1.25 * slack, slack)
    cache[..., appended, :] = torch.nan
    assert torch.equal(cache.isnan(), before.isnan())
    assert torch.equal(cache.nan_to_num(), before.nan_to_num())


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_programs", "dtype"), [*((n, dtype) for n in (1, 5) for dtype in DTYPES), (13, torch.bfloat16)]
)
def test_logits_and_cache_are_as_accurate_as_eager(n_programs: int, dtype: torch.dtype) -> None:
    with tuned(n_programs):
        check(make_model(small_config(), dtype), 21, n_steps=2)


@pytest.mark.parametrize("n_past", [0, 1, 62, 63, 64, 127, 128, 200])
def test_contexts_around_splits(n_past: int) -> None:
    with tuned(9):
        check(make_model(small_config(n_layer=1), torch.bfloat16), n_past)


@pytest.mark.parametrize("n_past", [126, 127, 128])
def test_contexts_around_a_block_of_keys(n_past: int) -> None:
    with tuned(1):
        check(make_model(small_config(n_layer=1), torch.float16), n_past)


@pytest.mark.parametrize(("n_past", "start"), [(0, 3), (70, 41)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_not_read(n_past: int, start: int, dtype: torch.dtype) -> None:
    with tuned(7):
        check(make_model(small_config(n_layer=1), dtype), n_past, start=start)


def test_last_slot_of_the_cache() -> None:
    with tuned(5):
        check(make_model(small_config(n_layer=1), torch.bfloat16), 9, n_spare=0)


def test_many_steps_without_a_reset() -> None:
    with tuned(3), check_overflow():
        check(make_model(small_config(64), torch.bfloat16), 3, n_steps=6)


@only_interpreted
@pytest.mark.parametrize("dtype", DTYPES if PROFILE == "thorough" else [torch.bfloat16])
def test_as_many_programs_as_an_h200_has(dtype: torch.dtype) -> None:
    with tuned(132, SHIPPED):
        check(make_model(small_config(n_layer=1), dtype), 70)


@pytest.mark.parametrize("n_channels", HEADS_OF_WIDTH)
def test_widths_of_gpt2(n_channels: int) -> None:
    with tuned(3, SHIPPED if PROFILE == "thorough" else SHIPPED._replace(groups=64)):
        check(make_model(small_config(n_channels, n_layer=1), torch.bfloat16), 5)


def test_tiles_that_ship() -> None:
    with tuned(13, SHIPPED):
        check(make_model(small_config(320, n_layer=1), torch.float16), 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_look_trained(dtype: torch.dtype) -> None:
    config = small_config(192, n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with tuned(5):
        check(look_trained(pair(config)[0]).to(DEVICE, dtype), 12)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_fast", "silu"])
def test_activations(activation: str) -> None:
    with tuned(2):
        check(make_model(small_config(64, activation_function=activation), torch.bfloat16), 4)


@torch.no_grad()
def test_a_head_of_its_own_at_an_odd_address() -> None:
    model = make_model(small_config(tie_word_embeddings=False), torch.bfloat16)
    memory = torch.randn(131 * 128 + 1, dtype=torch.bfloat16, device=DEVICE)
    model.lm_head.weight = torch.nn.Parameter(memory[1:].view(131, 128))
    with tuned(5):
        assert all(table.data_ptr() % 16 == 0 for table in make_decoder(model)._tables)
        check(model, 4)


@FEW_CASES
@given(
    n_heads=st.integers(1, 4),
    n_layers=st.integers(1, 2),
    n_vocab=st.integers(1, 300),
    n_programs=st.integers(1, 20),
    groups=st.sampled_from([4, 8, 16, 32]),
    n_past=st.integers(0, 100),
    start=st.integers(0, 40),
    n_spare=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_random_arguments(
    n_heads: int,
    n_layers: int,
    n_vocab: int,
    n_programs: int,
    groups: int,
    n_past: int,
    start: int,
    n_spare: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    config = small_config(64 * n_heads, n_layer=n_layers, vocab_size=n_vocab + 1)
    with tuned(n_programs, SHIPPED._replace(groups=groups)):
        check(make_model(config, dtype), n_past, start=start, n_spare=n_spare, seed=seed, slack=8)


# --- what an engine may hand in -------------------------------------------------------------------------------------


@torch.inference_mode()
def test_tokens_and_positions_outside_are_moved_to_the_edge() -> None:
    with tuned(3):
        model = make_model(small_config(64), torch.bfloat16)
        cache = read_prompt(model, token_ids(1, 4, 131), 8).cache
        decoder = make_decoder(model)
        for (token, position), (near_token, near_position) in (
            ((-1, 4), (0, 4)),
            ((131, 4), (130, 4)),
            ((2**40, 2**40), (130, 255)),
            ((7, -3), (7, 0)),
        ):
            logits = decode(decoder, cache, token, position, 4)
            assert logits.isfinite().all()
            assert torch.equal(logits, decode(decoder, cache, near_token, near_position, 4))


@pytest.mark.parametrize("slot", [-1, 8, 9, 2**40])
@torch.inference_mode()
def test_a_slot_outside_the_cache_is_not_written(slot: int) -> None:
    with tuned(3):
        model = make_model(small_config(64), torch.bfloat16)
        cache = read_prompt(model, token_ids(1, 8, 131), 8).cache
        before = cache.clone()
        decode(make_decoder(model), cache, 5, 8, slot)
        assert torch.equal(cache, before)


@torch.inference_mode()
def test_a_row_that_attends_nothing_gives_numbers() -> None:
    with tuned(3):
        model = make_model(small_config(64), torch.bfloat16)
        cache = read_prompt(model, token_ids(1, 4, 131), 8).cache
        assert decode(make_decoder(model), cache, 5, 4, 4, start=6).isfinite().all()


@torch.inference_mode()
def test_the_same_bits_in_any_order_of_programs() -> None:
    with tuned(6):
        model = make_model(small_config(), torch.bfloat16)
        prompt, decoder = read_prompt(model, token_ids(1, 30, 131), 32), make_decoder(model)
        first, *others = (decode(decoder, prompt.cache.clone(), 9, 30, 30, seed=seed) for seed in range(3))
    assert all(torch.equal(other, first) for other in others)


@torch.inference_mode()
def test_steps_of_two_decoders_alternate() -> None:
    with tuned(3):
        models = [make_model(small_config(64, n_layer=n), torch.bfloat16) for n in (1, 2)]
        decoders, prompts = (
            [make_decoder(m) for m in models],
            [read_prompt(m, token_ids(1, 4, 131), 6) for m in models],
        )
        alone = [decode(make_decoder(m), p.cache.clone(), 3, 4, 4) for m, p in zip(models, prompts, strict=True)]
        for _ in range(2):
            for decoder, prompt, expected in zip(decoders, prompts, alone, strict=True):
                assert torch.equal(decode(decoder, prompt.cache, 3, 4, 4), expected)


@only_on_gpu
@torch.inference_mode()
def test_a_graph_holds_the_step() -> None:
    model = make_model(small_config(), torch.bfloat16)
    cache, decoder = read_prompt(model, token_ids(1, 30, 131), 34).cache, make_decoder(model)
    tokens, positions, logits = integer(5), integer(30), torch.empty(1, 131, device=DEVICE)
    decoder.decode(cache, tokens, positions, positions, None, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.decode(cache, tokens, positions, positions, None, logits)
    for step in range(3):
        tokens.fill_(7 + step)
        positions.fill_(30 + step)
        graph.replay()
        replayed = logits.clone()
        assert torch.equal(replayed, decode(decoder, cache, 7 + step, 30 + step, 30 + step))


# --- limits ---------------------------------------------------------------------------------------------------------


def obstacle(**changes: Any) -> str | None:
    arguments = {"n_rows": 1, "n_channels": 768, "n_heads": 12, "n_hidden": 3072, "activation": "gelu_new"}
    arguments |= {"dtype": torch.bfloat16, "device": torch.device(DEVICE)}
    return PersistentDecoder.obstacle(**(arguments | changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_channels", HEADS_OF_WIDTH)
def test_takes_gpt2(n_channels: int, dtype: torch.dtype) -> None:
    n_heads = HEADS_OF_WIDTH[n_channels]
    assert obstacle(n_channels=n_channels, n_heads=n_heads, n_hidden=4 * n_channels, dtype=dtype) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_rows": 2}, "one row, not 2"),
        ({"n_heads": 16}, "heads of size 64"),
        ({"n_channels": 2112, "n_heads": 33, "n_hidden": 8448}, "up to 2048 channels"),
        ({"n_hidden": 3000}, "hidden width of 3072"),
        ({"activation": "tanh"}, "activation 'tanh'"),
        ({"dtype": torch.float64}, "torch.float64"),
    ],
)
def test_obstacles(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(obstacle(**changes))


@pytest.mark.parametrize(
    ("architecture", "dtype", "is_taken"),
    [
        ("sm_90", torch.bfloat16, True),
        ("sm_100", torch.float16, True),
        ("sm_90", torch.float32, False),
        ("sm_80", torch.bfloat16, False),
        ("sm_120", torch.bfloat16, False),
        ("gfx942", torch.bfloat16, False),
    ],
)
def test_gpus(architecture: str, dtype: torch.dtype, is_taken: bool) -> None:
    with chip.assume(chip.Chip(architecture, 132)):
        reason = obstacle(dtype=dtype, device=torch.device("cuda"))
    assert (reason is None) == is_taken
    assert is_taken or architecture in str(reason)


@only_interpreted
def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert "interpreter" in str(obstacle())


def test_a_model_it_does_not_take() -> None:
    with pytest.raises(ValueError, match="persistent decode: it needs heads of size 64"):
        PersistentDecoder(weights_of(make_model(tiny_config(), torch.bfloat16)))


@torch.inference_mode()
def test_caches_and_logits_that_do_not_fit() -> None:
    decoder = make_decoder(make_model(small_config(), torch.bfloat16))
    cache, logits = (
        torch.zeros(2, 2, 1, 2, 8, 64, dtype=torch.bfloat16, device=DEVICE),
        torch.zeros(1, 131, device=DEVICE),
    )
    one = integer(1)
    for wrong in (cache.float(), cache[:1], cache[:, :1], cache.transpose(3, 4), cache[..., ::2], cache[..., :4, :]):
        with pytest.raises(ValueError, match="cache must be"):
            decoder.decode(wrong, one, one, one, None, logits)
    for wrong in (logits[:, :-1], logits[0], logits.bfloat16()):
        with pytest.raises(ValueError, match="logits must be"):
            decoder.decode(cache, one, one, one, None, wrong)


def test_bytes_of_the_packed_copy() -> None:
    with tuned(4, SHIPPED):
        decoder = make_decoder(make_model(small_config(n_layer=3), torch.bfloat16))
    matrices, biases, norms = 3 * 12 * 128 * 128 * 2, 3 * 12 * 128 * 4, 7 * 2 * 128 * 2
    # Nothing is wasted where slices divide evenly.
    assert not INTERPRETING or decoder.n_bytes == matrices + biases + norms + 3 * 4


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_activations_keep_twice_the_bits(dtype: torch.dtype) -> None:
    """Where nothing is rounded into the cache and read from there, products err far less than eager's."""
    model: Any = make_model(small_config(n_layer=1), dtype)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
    token = token_ids(1, 1, model.config.vocab_size).to(DEVICE)
    with tuned(5), torch.inference_mode():
        cache, _ = read_prompt(model, token[:, :0], 1)
        logits = decode(make_decoder(model), cache, int(token), 0, 0)
        eager, truth = (m(token).logits[:, -1] for m in (model, copy.deepcopy(model).double()))
    assert max_error(logits, truth) < 0.03 * max_error(eager, truth)


@only_interpreted
@pytest.mark.parametrize("n_programs", [25, 2**19])
def test_offsets_past_int32(n_programs: int) -> None:
    """Of the cache, where the last of few programs attends with the last head, and of the stream of many programs."""
    with tuned(25), torch.inference_mode():
        decoder = make_decoder(make_model(small_config(1600, n_layer=1), torch.bfloat16))
        nothing = torch.empty(1, 131)
        integers = [integer(0)] * 4
        sizes = decoder._sizes | {"n_layers": 3, "n_slots": 2**24}
        tensors = *integers, nothing, nothing, *[nothing] * 7, *decoder._scratch, integer(0)
        constants = kernels.constants(1600, torch.bfloat16, chip.architecture(nothing.device), n_programs, "gelu_new")
        with dry_run(), mock.patch.object(kernels, "_grid_barrier"):
            launch(kernels._persistent_decode_kernel, n_programs, *tensors, **sizes, **constants)


def test_what_is_not_inlined_uses_no_shared_memory() -> None:
    """In triton 3.6 it would overwrite the ring of its caller, which no interpreter shows."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    finished = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    _, kernel, function = finished.stdout.split("\n.func ")  # the first follows a declaration of the second
    assert "cp.async" in kernel
    function = function.partition("\n}")[0]
    assert "release" in function
    assert "shared" not in function
    assert "global_smem" not in function


# --- barriers -------------------------------------------------------------------------------------------------------


def without_waiting(nth: int, n_programs: int) -> Callable[..., None]:
    """A grid barrier at which nobody waits if it is the nth of the second layer."""
    barrier = kernels._grid_barrier

    def arrive(counter_ptr: Any, target: Any) -> None:
        if int(target.handle.data.item()) // n_programs == 5 + nth + 1:
            tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        else:
            barrier(counter_ptr, target)

    return arrive


@only_interpreted
@pytest.mark.parametrize("nth", range(5))
@torch.inference_mode()
def test_a_barrier_at_which_nobody_waits_is_noticed(nth: int) -> None:
    with tuned(6):
        model = make_model(small_config(), torch.float32)
        prompt, decoder = read_prompt(model, token_ids(1, 30, 131), 32), make_decoder(model)
        right = decode(decoder, prompt.cache.clone(), 9, 30, 30)
        decoder = make_decoder(model)
        with mock.patch.object(kernels, "_grid_barrier", without_waiting(nth, 6)):
            wrong = decode(decoder, prompt.cache.clone(), 9, 30, 30)
    assert wrong.isnan().any() or max_error(wrong, right) > 1e-3 * right.abs().max().item()


@triton.jit
def _meeting_kernel(x_ptr, y_ptr, counter_ptr, n_expected, fails_at):
    """y[i] = x[i + 1], which the next program has written before they met."""
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    tl.device_assert(program != fails_at, "as it should")
    tl.store(x_ptr + program, program)
    kernels._grid_barrier(counter_ptr, n_expected)
    tl.store(y_ptr + program, tl.load(x_ptr + (program + 1) % n_programs))


def meet(n_programs: int, n_expected: int, fails_at: int = -1, seed: int = 0) -> Tensor:
    x, y = torch.full((2, n_programs), -1)
    with cooperative_grid(seed), check_overflow():
        _meeting_kernel[(n_programs,)](x, y, torch.zeros(1, dtype=torch.int64), n_expected, fails_at)
    return y


@only_interpreted
@pytest.mark.parametrize("n_programs", [1, 2, 132])
def test_programs_meet(n_programs: int) -> None:
    for seed in range(3):
        assert meet(n_programs, n_programs, seed=seed).tolist() == [(i + 1) % n_programs for i in range(n_programs)]


@only_interpreted
def test_programs_that_do_not_meet_read_too_early() -> None:
    assert -1 in meet(7, 1).tolist()


@only_interpreted
def test_waiting_forever_is_an_error() -> None:
    n_threads = threading.active_count()
    with pytest.raises(InterpreterError, match="7 of 7 programs wait forever"):
        meet(7, 8)
    assert threading.active_count() == n_threads


@only_interpreted
def test_a_failing_program_ends_the_others() -> None:
    n_threads = threading.active_count()
    with pytest.raises(InterpreterError, match="as it should"):
        meet(7, 7, fails_at=3)
    assert threading.active_count() == n_threads
    assert -1 not in meet(7, 7).tolist()
