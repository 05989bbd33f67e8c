"""What the decode step as one kernel takes: tokens and slots outside, two decoders, graphs, limits and sizes."""

from typing import Any
from unittest import mock

import pytest
import torch
from fastgpt_kernels.common import chip
from fastgpt_kernels.common.launch import launch
from fastgpt_kernels.operations.persistent_decode import kernels
from fastgpt_kernels.operations.persistent_decode.op import PersistentDecoder
from interpreter import DEVICE, INTERPRETING, dry_run, only_interpreted
from models import tiny_config, token_ids
from triton import knobs

from .decoders import (
    DTYPES,
    HEADS_OF_WIDTH,
    SHIPPED,
    decode,
    integer,
    make_decoder,
    make_model,
    read_prompt,
    small_config,
    tuned,
    weights_of,
)

only_on_gpu = pytest.mark.skipif(INTERPRETING, reason="CUDA graphs need a GPU")

# --- what an engine may pass ----------------------------------------------------------------------------------------


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


@only_interpreted
@pytest.mark.parametrize("n_programs", [25, 2**19])
def test_offsets_past_int32(n_programs: int) -> None:
    """In the cache, where the last of few programs attends with the last head, and in the stream of many programs."""
    with tuned(25), torch.inference_mode():
        decoder = make_decoder(make_model(small_config(1600, n_layer=1), torch.bfloat16))
        nothing = torch.empty(1, 131)
        integers = [integer(0)] * 4
        sizes = decoder._sizes | {"n_layers": 3, "n_slots": 2**24}
        tensors = *integers, nothing, nothing, *[nothing] * 7, *decoder._scratch, integer(0)
        constants = kernels.constants(1600, torch.bfloat16, chip.architecture(nothing.device), n_programs, "gelu_new")
        with dry_run(), mock.patch.object(kernels, "_grid_barrier"):
            launch(kernels._persistent_decode_kernel, n_programs, *tensors, **sizes, **constants)
