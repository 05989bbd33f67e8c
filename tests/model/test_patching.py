"""patch and unpatch change the classes of a model's modules and nothing else."""

import copy
import pickle
from types import MethodType
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from models import assert_same_within_rounding, lively, pair, tiny_config, token_ids
from torch import nn

import fastgpt
from fastgpt import modeling
from fastgpt.model import patching


def classes(model: Any) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_patch_and_unpatch_change_classes_and_nothing_else() -> None:
    model, _ = pair(tiny_config())
    before, parameters = classes(model), dict(model.named_parameters())
    hook = model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    patched: Any = fastgpt.patch(model)
    assert patched is model
    assert type(model) is fastgpt.GPT2LMHeadModel
    assert type(patched.transformer.h[1].ln_2) is modeling.LayerNorm
    assert model.config._attn_implementation == "fastgpt"
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert len(patched.transformer.h[0].mlp.c_fc._forward_hooks) == 1
    fastgpt.unpatch(model)
    assert classes(model) == before
    assert model.config._attn_implementation == "sdpa"
    hook.remove()


def test_patch_of_a_model_that_contains_gpt2() -> None:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=16,
        ),
        tiny_config(add_cross_attention=True, is_decoder=True),
    )
    torch.manual_seed(0)
    model: Any = transformers.VisionEncoderDecoderModel(config).eval()
    lively(model.decoder)
    pixels, ids = torch.randn(2, 3, 32, 32), token_ids(2, 6, 131)
    expected = model(pixel_values=pixels, decoder_input_ids=ids).logits
    encoder_classes = classes(model.encoder)
    fastgpt.patch(model)
    assert type(model.decoder.transformer.h[0]) is modeling.GPT2Block
    assert classes(model.encoder) == encoder_classes
    assert_same_within_rounding(model(pixel_values=pixels, decoder_input_ids=ids).logits, expected)


def dispatched(model: Any, folder: Any) -> Any:
    """accelerate's hooks for models on several devices, which keep each module's forward on the module."""
    body, last = ("wte", "wpe", "drop", "h.0"), ("h.1", "ln_f")
    places: Any = {f"transformer.{part}": "cpu" for part in body} | {f"transformer.{part}": "disk" for part in last}
    return accelerate.dispatch_model(model, places | {"lm_head": "cpu"}, main_device="cpu", offload_dir=folder)  # type: ignore[arg-type]


def unhooked(model: Any, folder: Any) -> Any:
    """What accelerate leaves when it removes its hooks: the forward of each module, set on the module."""
    accelerate.cpu_offload(model, torch.device("cpu"))
    return remove_hook_from_submodules(model) or model


def wrapped(model: Any, _: Any) -> Any:
    """Closures around the forwards of blocks and attention, which nothing can exchange."""
    for block in model.transformer.h:
        for module in (block, block.attn):
            forward = module.forward
            module.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)
    return model


@pytest.mark.parametrize("change", [dispatched, unhooked, wrapped])
def test_patch_of_a_model_whose_forwards_lie_on_its_modules(change: Any, tmp_path: Any) -> None:
    theirs, _ = pair(tiny_config())
    ids, options = token_ids(2, 9, 131), {"max_new_tokens": 5, "do_sample": False}
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def results() -> list[Any]:
        forwards = [theirs(ids).logits, theirs(ids, attention_mask=mask).logits]
        return [*forwards, theirs.generate(ids, **options), theirs.generate(ids, attention_mask=mask, **options)]

    expected, model = results(), change(theirs, tmp_path)
    for changed, is_ours in ((fastgpt.patch, True), (fastgpt.unpatch, False), (fastgpt.patch, True)):
        changed(model)
        held = [vars(module).get("_old_forward", vars(module).get("forward")) for module in model.modules()]
        makers = {method.__func__.__module__.partition(".")[0] for method in held if isinstance(method, MethodType)}
        assert ("fastgpt" in makers) == (is_ours and change is not wrapped)
        for found, wanted in zip(results(), expected, strict=True):
            assert_same_within_rounding(found.float(), wanted.float())


def test_unpatch_of_a_model_that_was_dispatched_as_ours(tmp_path: Any) -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(2, 9, 131)
    model = fastgpt.unpatch(dispatched(ours, tmp_path))
    assert_same_within_rounding(model(ids).logits, theirs(ids).logits)


def test_patch_refuses_what_it_cannot_patch() -> None:
    theirs, _ = pair(tiny_config())
    with pytest.raises(ValueError, match=r"Linear.*nothing to patch"):
        fastgpt.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to unpatch"):
        fastgpt.unpatch(theirs)


def test_patching_twice_is_patching_once() -> None:
    theirs, ours = pair(tiny_config())
    for model in (fastgpt.patch(theirs), ours):
        before = classes(model)
        assert fastgpt.patch(model) is model
        assert classes(model) == before
        model.set_attn_implementation("sdpa")
        assert fastgpt.patch(model).config._attn_implementation == "sdpa"
        model.set_attn_implementation("fastgpt")
    theirs.transformer.h.append(transformers.models.gpt2.modeling_gpt2.GPT2Block(theirs.config, layer_idx=2))
    assert type(fastgpt.patch(theirs).transformer.h[2]) is modeling.GPT2Block


def test_a_failure_at_any_module_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(tiny_config(n_layer=1))
    change = patching._set
    for model, function in ((theirs, fastgpt.patch), (ours, fastgpt.unpatch)):
        before, attention, n_calls = classes(model), model.config._attn_implementation, 0
        for n_allowed in range(1000):
            n_calls = 0

            def fail_later(target, name, value, undo, n_allowed=n_allowed) -> None:
                nonlocal n_calls
                n_calls += 1
                change(target, name, value, undo)
                if n_calls > n_allowed:
                    raise KeyboardInterrupt

            monkeypatch.setattr(patching, "_set", fail_later)
            try:
                function(model)
            except KeyboardInterrupt:
                assert (classes(model), model.config._attn_implementation) == (before, attention)
            else:
                break
        assert n_calls > 8  # every module and the attention
        assert classes(model) != before


def test_bug_exception_inside_patch_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(tiny_config())
    before = classes(model)
    # A class of another memory layout cannot be assigned: the swap fails half way through.
    monkeypatch.setitem(patching._PARTS, "ln_f", (nn.LayerNorm, int))
    with pytest.raises(TypeError):
        fastgpt.patch(model)
    assert classes(model) == before
    assert model.config._attn_implementation == "sdpa"


def test_chosen_attention_is_kept() -> None:
    eager, _ = pair(tiny_config(), attn_implementation="eager")
    assert fastgpt.patch(eager).config._attn_implementation == "eager"
    explicit = fastgpt.GPT2LMHeadModel._from_config(tiny_config(), attn_implementation="sdpa")
    assert explicit.config._attn_implementation == "sdpa"
    assert fastgpt.GPT2LMHeadModel(tiny_config()).config._attn_implementation == "fastgpt"


@torch.no_grad()
def test_copies_and_saved_models(tmp_path) -> None:
    theirs, _ = pair(tiny_config())
    model = fastgpt.patch(theirs)
    ids = token_ids(2, 9, 131)
    expected = model(ids).logits
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        fastgpt.GPT2LMHeadModel.from_pretrained(tmp_path),
    ]
    for other in others:
        assert type(other.transformer.h[0].mlp) is modeling.GPT2MLP
        assert torch.equal(other(ids).logits, expected)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert_same_within_rounding(again(ids).logits, expected)
