"""Label smoothing, z-loss and losses of single tokens: equal to transformers' and torch's, and without logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fastgpt_kernels.operations.linear_cross_entropy import reference
from models import pair, tiny_config, token_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import fastgpt

N_BATCH, N_TOKENS, N_VOCABULARY = 3, 9, 131
TERMS: dict[str, dict[str, float]] = {
    "smoothing": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.02},
    "both": {"label_smoothing": 0.3, "z_loss": 0.02},
}


class Logits(TorchDispatchMode):
    """Counts the products that give the logits of all tokens."""

    n_computed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        is_product = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)
        self.n_computed += is_product and output.numel() == N_BATCH * N_TOKENS * N_VOCABULARY
        return output


@pytest.fixture(autouse=True)
def _chunks_of_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK_LOGITS", 4 * N_VOCABULARY)


def batch() -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which some are ignored."""
    ids = token_ids(N_BATCH, N_TOKENS, N_VOCABULARY)
    return ids, ids.where(ids % 4 != 1, -100)


def results(model: Any, **options: Any) -> list[Tensor]:
    """The loss and the gradients of its mixture."""
    ids, labels = batch()
    loss = model.train()(ids, labels=labels, **options).loss
    weights = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape)
    return [loss, *torch.autograd.grad((loss * weights).sum(), list(model.parameters()))]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}])
def test_equal_to_the_same_loss_of_transformers_logits(terms: str, reduction: str, options: dict[str, Any]) -> None:
    theirs, ours = pair(tiny_config())
    for model in (theirs, ours):
        model.loss_function = fastgpt.CausalLMLoss(**TERMS[terms], reduction=reduction)
    with Logits() as logits:
        fused = results(ours, **options)
    assert logits.n_computed == 0
    assert fused[0].shape == ((N_BATCH, N_TOKENS) if reduction == "none" else ())
    for one, other in zip(fused, results(theirs, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    ours.eval()
    ids, labels = batch()
    torch.testing.assert_close(ours(ids, labels=labels, **options).loss, fused[0], rtol=1e-4, atol=1e-5)


def test_without_terms_it_is_transformers_loss() -> None:
    theirs, ours = pair(tiny_config())
    expected = results(theirs)
    ours.loss_function = fastgpt.CausalLMLoss()
    theirs.loss_function = fastgpt.CausalLMLoss()
    for one, other, same in zip(expected, results(ours), results(theirs), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same, one, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_token_is_at_the_position_that_predicts_it() -> None:
    ours = pair(tiny_config())[1].train()
    ids, labels = batch()
    ours.loss_function = fastgpt.CausalLMLoss(reduction="none")
    losses = ours(ids, labels=labels).loss.detach()
    log_p = ours.eval()(ids).logits.detach().log_softmax(-1)
    for row, position in [(0, 0), (2, 7)]:
        expected = -log_p[row, position, labels[row, position + 1]] if labels[row, position + 1] >= 0 else 0.0
        assert losses[row, position].item() == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(losses == 0, torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) == -100)


def trained(model: Any, out: Path, **options: Any) -> tuple[list[float], int]:
    """The losses of two steps of Trainer, and how often the logits were computed."""
    ids, labels = batch()
    rows = [{"input_ids": row, "labels": targets} for row, targets in zip(ids, labels, strict=True)] * 2
    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": N_BATCH, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = Trainer(model.train(), TrainingArguments(str(out), **settings, **options), train_dataset=rows)
    with Logits() as logits:
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], logits.n_computed


def test_trainers_own_label_smoothing_and_the_fused_one(tmp_path: Path) -> None:
    """Trainer smooths from logits, which a step computes once; the loss function needs none."""
    theirs, ours = pair(tiny_config())
    fused = pair(tiny_config())[1]
    fused.loss_function = fastgpt.CausalLMLoss(label_smoothing=0.2)
    expected, n_theirs = trained(theirs, tmp_path, label_smoothing_factor=0.2)
    smoothed, n_ours = trained(ours, tmp_path, label_smoothing_factor=0.2)
    without_logits, n_fused = trained(fused, tmp_path)
    assert len(expected) == n_theirs == n_ours == 2
    assert n_fused == 0
    assert smoothed == pytest.approx(expected, rel=1e-5)
    assert without_logits == pytest.approx(expected, rel=1e-5)


def test_compiles_without_a_graph_break() -> None:
    ours = pair(tiny_config(n_layer=1))[1].train()
    ours.loss_function = fastgpt.CausalLMLoss(label_smoothing=0.1, z_loss=0.01)
    ids, labels = batch()
    expected = ours(ids, labels=labels).loss
    torch.compiler.reset()
    compiled = torch.compile(lambda ids, labels: ours(ids, labels=labels).loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels), expected)


def test_labels_out_of_range_are_named() -> None:
    ours = pair(tiny_config(n_layer=1))[1]
    ours.loss_function = fastgpt.CausalLMLoss(z_loss=0.01)
    ids = token_ids(1, 5, N_VOCABULARY)
    for model in (ours.train(), ours.eval()):
        with pytest.raises(ValueError, match="label 131 is outside"):
            model(ids, labels=ids.where(ids != ids[0, 2], N_VOCABULARY))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], not 1.5"),
        ({"z_loss": -1.0}, "z_loss must be finite and 0 or more, not -1.0"),
        ({"reduction": "sum"}, "unknown reduction 'sum': choose one of mean, none"),
    ],
)
def test_values_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastgpt.CausalLMLoss(**options)
