"""Lightning's Trainer and Fabric over the bundled model: losses of transformers' model at every precision."""

from pathlib import Path
from typing import Any

import pytest
import torch

lightning = pytest.importorskip("lightning", reason="pip install lightning")

PROMPT = "ROMEO: I will go to the king and say that he is no man of mine"
# Of the losses: what transformers' model and ours may differ by at a precision.
TOLERANCES = {"32-true": 1e-5, "bf16-mixed": 1e-2, "bf16-true": 1e-2}


class Task(lightning.LightningModule):
    def __init__(self, model: Any):
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        (ids,) = batch
        loss = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def with_trainer(model: Any, ids: torch.Tensor, folder: Path, **options: Any) -> list[float]:
    task = Task(model.train())
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=4, logger=False, enable_checkpointing=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids.expand(8, -1)), batch_size=2))
    return task.losses


def with_fabric(model: Any, ids: torch.Tensor, folder: Path, **options: Any) -> list[float]:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, **options)
    fabric.launch()
    model, optimizer = fabric.setup(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("train", [with_trainer, with_fabric])
def test_training(train: Any, precision: Any, demo_pair, tmp_path: Path) -> None:
    *models, tokenizer = demo_pair()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    theirs, ours = (train(model, ids, tmp_path, precision=precision) for model in models)
    assert theirs[-1] < theirs[0], "nothing was learnt"
    assert ours == pytest.approx(theirs, rel=TOLERANCES[precision])
