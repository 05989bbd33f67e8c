"""patch() of a model inside a wrapper: an adapter, DDP, an encoder-decoder, a pipeline."""

from typing import Any

import peft
import pytest
import torch
import transformers
from models import assert_same_within_rounding, lively, pair, tiny_config, token_ids
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastgpt
from fastgpt.model import patching


def adapted(model: Any) -> nn.Module:
    torch.manual_seed(1)
    lora = peft.LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(model, lora)


def describing(model: Any) -> nn.Module:
    """An encoder of pictures, with a decoder that has the weights of the model."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    vision = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
    config = tiny_config(add_cross_attention=True, is_decoder=True)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, config)
    both.pad_token_id = both.decoder_start_token_id = 0
    torch.manual_seed(2)
    whole = transformers.VisionEncoderDecoderModel(both)
    lively(whole.decoder)
    return whole


WRAPPERS = {
    "itself": lambda model: model,
    "PEFT": adapted,
    "DDP": DistributedDataParallel,
    "encoder-decoder": describing,
}


def trained(whole: Any) -> list[Tensor]:
    """The loss of a step, and all its gradients in one vector."""
    ids = token_ids(2, 9, 131)
    pictures = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
    whole.zero_grad()
    loss = whole(**(pictures if hasattr(whole, "encoder") else {"input_ids": ids}), labels=ids).loss
    loss.backward()
    return [loss.detach(), torch.cat([x.grad.flatten() for x in whole.parameters() if x.grad is not None])]


def state(whole: nn.Module) -> list[Any]:
    """All that patch() may change."""
    configs = {id(module.config): module.config for module in whole.modules() if hasattr(module, "config")}
    attention = [getattr(config, "_attn_implementation", None) for config in configs.values()]
    return [*map(type, whole.modules()), *attention, [*map(id, whole.parameters())]]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_patch_inside_a_wrapper(wrapper: str, one_process: None) -> None:
    """The same loss and gradients, patched once or twice, and all as before after unpatch()."""
    whole = WRAPPERS[wrapper](pair(tiny_config())[0]).train()
    before, expected = state(whole), trained(whole)
    for _ in range(2):
        assert fastgpt.patch(whole) is whole
        assert sum(isinstance(module, fastgpt.GPT2LMHeadModel) for module in whole.modules()) == 1
        for found, value in zip(trained(whole), expected, strict=True):
            assert_same_within_rounding(found, value)
    fastgpt.unpatch(whole)
    assert state(whole) == before
    assert all(map(torch.equal, trained(whole), expected))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_failure_at_any_change_inside_a_wrapper(
    wrapper: str, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WRAPPERS[wrapper](pair(tiny_config(n_layer=1))[0])
    before, change, n_changes = state(whole), patching._set, 0
    for n_allowed in range(1000):
        n_changes = 0

        def fail_later(target, name, value, undo, n_allowed=n_allowed) -> None:
            nonlocal n_changes
            n_changes += 1
            change(target, name, value, undo)
            if n_changes > n_allowed:
                raise MemoryError

        monkeypatch.setattr(patching, "_set", fail_later)
        try:
            fastgpt.patch(whole)
        except MemoryError:
            assert state(whole) == before
        else:
            break
    assert n_changes > 8  # modules and the attention
    assert state(whole) != before


def test_patch_inside_a_pipeline() -> None:
    _, tokenizer = fastgpt.load_demo()
    theirs, _ = pair(tiny_config(vocab_size=len(tokenizer), n_positions=96))
    pipeline: Any = transformers.pipeline("text-generation", model=theirs, tokenizer=tokenizer, batch_size=2)
    texts = ["ROMEO:", "O, speak again, bright angel", "JULIET:"]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = pipeline(texts, **options)
    fastgpt.patch(pipeline.model)
    assert fastgpt.explain(pipeline.model).startswith("the engine")
    assert pipeline(texts, **options) == expected
