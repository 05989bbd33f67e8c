"""Every adapter and soft prompt of PEFT over fastgpt's model gives what it gives over transformers'."""

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

PRODUCTS = ["c_attn", "c_fc", "c_proj"]
SOFT: dict[str, Any] = {"num_virtual_tokens": 4}
# What a kind needs besides the names of the products.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"target_modules": PRODUCTS, "total_step": 10, "init_r": 4, "target_r": 2},
    "CARTRIDGE": SOFT,
    "CPT": {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "IA3": {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    "LN_TUNING": {"target_modules": ["ln_1", "ln_2", "ln_f"]},
    "MULTITASK_PROMPT_TUNING": SOFT | {"num_tasks": 2},
    "PREFIX_TUNING": SOFT,
    "PROMPT_TUNING": SOFT,
    "P_TUNING": SOFT,
    "TRAINABLE_TOKENS": {"target_modules": ["wte"], "token_indices": [1, 2, 3]},
}
# Of the oldest PEFT that is supported; newer ones bring more, which are tried too.
TAKE_GPT2 = {
    "ADALORA", "CPT", "FOURIERFT", "IA3", "LN_TUNING", "LORA", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "RANDLORA", "TRAINABLE_TOKENS", "VERA",
}  # fmt: skip


def adapted(model: Any, kind: str) -> Any:
    config = next(config for name, config in CONFIGS.items() if name.value == kind)
    options: dict[str, Any] = dict(OPTIONS.get(kind, {"target_modules": PRODUCTS}))
    if "fan_in_fan_out" in inspect.signature(config).parameters:
        options["fan_in_fan_out"] = True
    torch.manual_seed(0)
    whole = peft.get_peft_model(model, config(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return whole


def answers(model: Any, kind: str) -> list[torch.Tensor]:
    """The loss, its gradients in one vector, the logits of evaluation, and greedy tokens."""
    whole, ids = adapted(model, kind), token_ids(2, 9, 131)
    more = {"task_ids": torch.tensor([0, 1])} if kind == "MULTITASK_PROMPT_TUNING" else {}
    loss = whole.train()(input_ids=ids, labels=ids, **more).loss
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in whole.parameters() if parameter.grad is not None]
    with torch.no_grad():
        logits = whole.eval()(input_ids=ids, **more).logits
    tokens = whole.generate(input_ids=ids, max_new_tokens=12, do_sample=False, **more)
    return [loss.detach(), torch.cat(gradients), logits, tokens]


@pytest.mark.parametrize("kind", sorted(name.value for name in CONFIGS))
def test_peft(kind: str) -> None:
    """Where PEFT refuses GPT-2, as it does for adapters of nn.Linear alone, it refuses fastgpt's in the same words."""
    found: list[list[torch.Tensor] | str] = []
    plain, _ = pair(tiny_config(n_positions=128))
    for model in pair(tiny_config(n_positions=128)):
        try:
            found.append(answers(model, kind))
        except (ImportError, TypeError, ValueError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    theirs, ours = found
    if isinstance(theirs, str) or isinstance(ours, str):
        assert kind not in TAKE_GPT2, theirs
        assert ours == theirs
        return
    for our_value, their_value in zip(ours[:3], theirs[:3], strict=True):
        assert_same_within_rounding(our_value, their_value, n_ulps=1024)
    assert ours[3].tolist() == theirs[3].tolist()
    with torch.no_grad():
        without = plain(token_ids(2, 9, 131)).logits
    assert (theirs[2][:, -9:] - without).abs().max() > 1e-4, "the adapter changes nothing"


def test_adapters_that_take_turns(tmp_path: Path) -> None:
    """Swapped in place, loaded beside each other, chosen for each row, switched off, merged and taken out."""
    ids = token_ids(2, 9, 131)

    def logits_and_tokens(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            logits = model.eval()(ids).logits
        return [logits, model.generate(ids, max_new_tokens=8, do_sample=False)]

    def turns(make: Any) -> list[list[torch.Tensor]]:
        for rank in (4, 8):
            torch.manual_seed(rank)
            options: dict[str, Any] = {"target_modules": PRODUCTS, "fan_in_fan_out": True, "init_lora_weights": False}
            trained = peft.get_peft_model(make(), peft.LoraConfig(r=rank, task_type="CAUSAL_LM", **options))
            trained.save_pretrained(str(tmp_path / str(rank)))
        model: Any = peft.PeftModel.from_pretrained(make(), str(tmp_path / "4"))
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        found = [logits_and_tokens(model)]
        hotswap_adapter(model, str(tmp_path / "8"), adapter_name="default")
        found.append(logits_and_tokens(model))
        model.load_adapter(str(tmp_path / "4"), "second")
        model.set_adapter("second")
        found.append(logits_and_tokens(model))
        with torch.no_grad():
            logits = model(ids, adapter_names=["default", "second"]).logits
        names = {"adapter_names": ["default", "second"]}
        found.append([logits, model.generate(ids, max_new_tokens=8, do_sample=False, **names)])
        with model.disable_adapter():
            found.append(logits_and_tokens(model))
        model.set_adapter("default")
        model.merge_adapter()
        found.append(logits_and_tokens(model))
        model.unmerge_adapter()
        found.append(logits_and_tokens(model.unload()))
        return found

    theirs, ours = (turns(lambda place=place: pair(tiny_config(n_positions=128))[place]) for place in (0, 1))
    for (our_logits, our_tokens), (their_logits, their_tokens) in zip(ours, theirs, strict=True):
        assert_same_within_rounding(our_logits, their_logits, n_ulps=1024)
        assert our_tokens.tolist() == their_tokens.tolist()
    first, swapped, second, of_each_row, without, merged, unloaded = (logits for logits, _ in theirs)
    assert (first - swapped).abs().max() > 1e-3, "nothing was swapped"
    assert_same_within_rounding(second, first, n_ulps=1024)
    assert_same_within_rounding(of_each_row, torch.stack([swapped[0], second[1]]), n_ulps=1024)
    assert_same_within_rounding(merged, swapped, n_ulps=1024)
    assert_same_within_rounding(unloaded, without, n_ulps=1024)
