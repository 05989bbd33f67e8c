"""Adapters, hooks, checkpointing, Trainer, compile and export work as with transformers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compilers import needs_inductor
from models import assert_same_within_rounding, pair, tiny_config, token_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import fastgpt
from fastgpt import ops
from fastgpt.model import blocks

# --- what must not be bypassed --------------------------------------------------------------------------------------


def add_lora(model: Any):
    """LoRA on every product of every block, with adapters that change the result."""
    config = LoraConfig(r=3, lora_alpha=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def lora_results(model: Any) -> list[Tensor]:
    """Logits of the base model, with the adapter, with it disabled, merged and unmerged; then its gradients."""
    ids = token_ids(2, 9, 131)
    results = [model(ids).logits.detach()]
    adapted = add_lora(model)
    results.append(adapted(ids).logits.detach())
    with adapted.disable_adapter():
        results.append(adapted(ids).logits.detach())
    adapted.train()(ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora" in name]
    adapted.eval().merge_adapter()
    results.append(adapted(ids).logits.detach())
    adapted.unmerge_adapter()
    results.append(adapted(ids).logits.detach())
    return results + [gradient for gradient in gradients if gradient is not None]


def test_lora_on_every_product() -> None:
    theirs, ours = pair(tiny_config())
    expected, results = lora_results(theirs), lora_results(ours)
    assert (expected[1] - expected[0]).abs().max() > 0.1, "the adapter changes nothing"
    assert len(results) == len(expected) > 5
    for result, value in zip(results, expected, strict=True):
        assert_same_within_rounding(result, value, n_ulps=512)


def recorded_modules(model: Any, ids: Tensor) -> tuple[list[str], Tensor]:
    """Which modules called their forward hooks, and the logits when every hook adds to its module's output."""
    seen: list[str] = []

    def hook_for(name: str):
        def hook(module: Any, args: tuple, output):
            seen.append(name)
            return output + 0.01 if isinstance(output, Tensor) else None

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return sorted(seen), logits


# nn.Dropout that acts inside attention is read, not called, by transformers' fused attention as well.
NOT_CALLED = ("attn_dropout",)


def test_forward_hooks_on_every_submodule() -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(2, 9, 131)
    expected_names, expected = recorded_modules(theirs, ids)
    names, logits = recorded_modules(ours, ids)
    assert names == expected_names
    every = [name for name, _ in ours.named_modules() if name and not name.endswith(NOT_CALLED)]
    assert set(every) - set(names) == {"transformer.h"}, "a ModuleList is not called"
    assert_same_within_rounding(logits, expected, n_ulps=512)


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_other_hooks_on_every_submodule(kind: str) -> None:
    names = []
    for model in pair(tiny_config()):
        seen: list[str] = []
        for name, module in model.named_modules():
            if name:
                getattr(module, f"register_{kind}_hook")(lambda *_, name=name, seen=seen: seen.append(name) and None)
        ids = token_ids(1, 5, 131)
        model.train()(ids, labels=ids).loss.backward()
        names.append(sorted(seen))
    assert names[0] == names[1]
    assert len(names[0]) > 20


@pytest.mark.parametrize("is_patched", [False, True])
def test_bug_a_hook_of_a_block_saw_an_empty_mask(is_patched: bool) -> None:
    """Calibrating quantisers keep the arguments of blocks; where nothing is hidden, transformers' mask is None."""

    def arguments(model: Any) -> list[Any]:
        seen: list[Any] = []

        def look(_: Any, args: tuple, kwargs: dict) -> None:
            seen.append([type(value).__name__ for value in args] + [(k, type(kwargs[k]).__name__) for k in kwargs])

        for block in model.transformer.h:
            block.register_forward_pre_hook(look, with_kwargs=True)
        ids = token_ids(2, 9, 131)
        model(ids)
        model.train()(ids, labels=ids, use_cache=False)
        model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        return seen

    theirs, ours = pair(tiny_config())
    expected = arguments(copy.deepcopy(theirs))
    assert arguments(fastgpt.patch(theirs) if is_patched else ours) == expected
    assert len(expected) == 2 * 4
    assert all(seen[2] == "NoneType" for seen in expected), "transformers has a mask"


@torch.no_grad()
def test_replaced_and_wrapped_submodules() -> None:
    """A product of another class, one whose forward was replaced, and one that is parametrised all take part."""

    class Doubled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    def change(model: Any) -> None:
        blocks = model.transformer.h
        blocks[0].mlp.c_fc.__class__ = Doubled
        original = blocks[1].mlp.c_proj.forward
        blocks[1].mlp.c_proj.forward = lambda x: original(x) * 1.5
        nn.utils.parametrize.register_parametrization(blocks[1].ln_2, "weight", Negated(), unsafe=True)
        blocks[2].mlp.act = nn.Tanh()

    theirs, ours = pair(tiny_config(n_layer=3))
    ids = token_ids(2, 9, 131)
    plain = ours(ids).logits
    change(theirs)
    change(ours)
    logits = ours(ids).logits
    assert (logits - plain).abs().max() > 0.1
    assert_same_within_rounding(logits, theirs(ids).logits, n_ulps=512)


@pytest.mark.parametrize(
    "test",
    [test_lora_on_every_product, test_forward_hooks_on_every_submodule, test_replaced_and_wrapped_submodules],
)
def test_the_guard_is_what_keeps_them_in(test, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `is_plain` always true, as in a fused module that does not look, each of these tests fails."""
    monkeypatch.setattr(blocks, "is_plain", lambda module, kind: True)
    with pytest.raises((AssertionError, AttributeError, KeyError, TypeError)):
        test()


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_every_block(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(tiny_config(n_layer=3))
    n_calls = []
    gelu_mlp = ops.gelu_mlp
    monkeypatch.setattr(ops, "gelu_mlp", lambda *args, **kw: n_calls.append(1) or gelu_mlp(*args, **kw))
    ids = token_ids(2, 9, 131)
    gradients = []
    for model in (theirs, ours):
        model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(n_calls) == 6, "3 blocks forward, the same 3 again in backward"
    for ours_gradient, theirs_gradient in zip(gradients[1], gradients[0], strict=True):
        assert_same_within_rounding(ours_gradient, theirs_gradient, n_ulps=512)
    ours.gradient_checkpointing_disable()
    n_calls.clear()
    ours(ids, labels=ids).loss.backward()
    assert len(n_calls) == 3


def test_gradient_checkpointing_set_before_patch_stays_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(tiny_config())
    model.train().gradient_checkpointing_enable()
    fastgpt.patch(model)
    n_calls = []
    gelu_mlp = ops.gelu_mlp
    monkeypatch.setattr(ops, "gelu_mlp", lambda *args, **kw: n_calls.append(1) or gelu_mlp(*args, **kw))
    ids = token_ids(1, 5, 131)
    model(ids, labels=ids).loss.backward()
    assert len(n_calls) == 4


def training_losses(model: Any, n_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for step in range(n_steps):
        ids = token_ids(4, 24, 131, seed=step % 5)
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_120_steps_gives_the_same_losses() -> None:
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(tiny_config())
    ours = fastgpt.GPT2LMHeadModel(tiny_config())
    ours.load_state_dict(theirs.state_dict())
    expected, losses = training_losses(theirs, 120), training_losses(ours, 120)
    assert expected[-1] < 0.6 * expected[0], "nothing was learnt"
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5


def test_trainer(tmp_path) -> None:
    """Trainer with gradient accumulation, evaluation and a saved checkpoint: the losses of transformers' model."""
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(24, 16, 131)]
    histories = []
    for model in pair(tiny_config()):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / type(model).__module__), max_steps=6, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=3, save_steps=6,
            report_to=[], use_cpu=True, seed=1, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4],
            compute_metrics=lambda prediction: {"n_classes": np.shape(prediction.predictions)[-1]},
        )  # fmt: skip
        trainer.train()
        log = trainer.state.log_history
        histories.append(
            [entry.get("loss", entry.get("eval_loss")) for entry in log if "loss" in entry or "eval_loss" in entry]
        )
        assert [entry["eval_n_classes"] for entry in log if "eval_n_classes" in entry] == [131, 131]
    assert histories[1] == pytest.approx(histories[0], abs=2e-4)  # the log is rounded to four digits
    assert len(histories[0]) == 8


def test_custom_loss_in_trainer_with_mixed_precision(tmp_path) -> None:
    """The usual way to write one reads the logits of a model that was also given the labels."""

    class CustomLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            logits = model(**inputs).get("logits")
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten())

    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(8, 16, 131)]
    losses = []
    for model in pair(tiny_config()):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=True,
            disable_tqdm=True,
        )
        trainer = CustomLoss(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_autocast_equals_transformers() -> None:
    theirs, ours = pair(tiny_config())
    ids = token_ids(2, 9, 131)
    results = []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            output = model.train()(ids, labels=ids)
        output.loss.backward()
        results.append((output.loss, output.logits, model.transformer.h[0].mlp.c_fc.weight.grad))
    for ours_value, theirs_value in zip(results[1], results[0], strict=True):
        assert ours_value.dtype == theirs_value.dtype
        ours_value, theirs_value = ours_value.float(), theirs_value.float()
        assert (ours_value - theirs_value).abs().max() <= 0.05 * theirs_value.abs().max()


def test_float16_with_a_grad_scaler() -> None:
    """Two steps under a scale that float16 holds, and one that overflows and is skipped."""
    ids = token_ids(2, 9, 131)
    results = []
    for model in pair(tiny_config()):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**12), []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            losses.append(loss.item())
            scaler.update(2.0**60 if len(losses) == 2 else None)
        assert scaler.get_scale() == 2.0**59
        results.append([*losses, model(ids, labels=ids).loss.item()])
    theirs, ours = results
    assert theirs[3] < theirs[0] - 0.01
    assert ours == pytest.approx(theirs, rel=2e-3)


# --- compile and export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_compile_fullgraph_forward_and_backward(padded: bool) -> None:
    _, ours = pair(tiny_config())
    ids, mask = token_ids(2, 11, 131), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0 if padded else 1
    inputs = {"attention_mask": mask} if padded else {}
    compiled = torch.compile(ours.train(), fullgraph=True, backend="aot_eager")
    output = compiled(ids, labels=ids, **inputs)  # Before an eager call, which would import the kernels.
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in ours.parameters()]
    ours.zero_grad()
    expected = ours(ids, labels=ids, **inputs)
    expected.loss.backward()
    assert_same_within_rounding(output.loss.detach(), expected.loss.detach())
    assert_same_within_rounding(output.logits[mask.bool()].detach(), expected.logits[mask.bool()].detach())
    for parameter, gradient in zip(ours.parameters(), gradients, strict=True):
        assert_same_within_rounding(gradient, parameter.grad, n_ulps=512)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_compiled_attention_is_ours(use_cache: bool, padded: bool) -> None:
    """Without a cache transformers looks for packed sequences, and under tracing makes a mask that only sdpa takes."""
    _, ours = pair(tiny_config(n_layer=3))
    ids, mask = token_ids(2, 11, 131), torch.ones(2, 11, dtype=torch.long)
    inputs = {"attention_mask": mask} if padded else {}
    graphs: list[list[str]] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    with fastgpt.backend("triton"):
        output = torch.compile(ours, fullgraph=True, backend=backend)(ids, use_cache=use_cache, **inputs)
        output.logits.sum().backward()
    for names, operation in zip(graphs, ("causal_attention", "causal_attention_backward"), strict=True):
        assert names.count(f"fastgpt_kernels.{operation}.default") == 3
        assert not any("scaled_dot_product" in name for name in names)


@needs_inductor
@torch.no_grad()
def test_compile_with_inductor() -> None:
    _, ours = pair(tiny_config(n_layer=1))
    ids = token_ids(2, 11, 131)
    compiled = torch.compile(ours, fullgraph=True)
    assert_same_within_rounding(compiled(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_export(strict: bool) -> None:
    _, ours = pair(tiny_config(n_layer=1, use_cache=False))
    ids = token_ids(2, 11, 131)
    program = torch.export.export(ours, (ids,), strict=strict)
    assert_same_within_rounding(program.module()(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("strict", [True, False])
def test_bug_an_exported_training_step_had_logits_without_values(strict: bool) -> None:
    theirs, ours = pair(tiny_config(n_layer=1, use_cache=False))
    ids, others = token_ids(2, 11, 131), token_ids(2, 11, 131, seed=1)
    program = torch.export.export(ours.train(), (), {"input_ids": ids, "labels": ids}, strict=strict)
    output, expected = program.module()(input_ids=others, labels=others), theirs(others, labels=others)
    for value, reference in ((output.loss, expected.loss), (output.logits, expected.logits)):
        assert type(value) is torch.Tensor
        assert_same_within_rounding(value.detach(), reference.detach())
