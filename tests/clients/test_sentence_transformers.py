"""sentence-transformers over a patched GPT-2 body: embeddings, training, and a saved model that loads again."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fastgpt

sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
datasets = pytest.importorskip("datasets", reason="pip install datasets")

SENTENCES = ["ROMEO: I will go.", "JULIET: Where art thou now, my love?", "KING"]


def embedder(folder: Path, is_patched: bool) -> Any:
    from sentence_transformers import models  # type: ignore[import-not-found]

    body = models.Transformer(str(folder), max_seq_length=64)
    pooling = models.Pooling(body.get_embedding_dimension(), pooling_mode="mean")
    whole = sentence_transformers.SentenceTransformer(modules=[body, pooling], device="cpu")
    return fastgpt.patch(whole) if is_patched else whole


def trained(model: Any, folder: Path) -> list[float]:
    from sentence_transformers.losses import CosineSimilarityLoss  # type: ignore[import-not-found]

    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=3, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=1, learning_rate=1e-3,
    )  # fmt: skip
    pairs = {"first": SENTENCES * 4, "second": SENTENCES[::-1] * 4, "score": [0.1, 0.9, 0.4] * 4}
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(pairs),
        loss=CosineSimilarityLoss(model),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_embeddings_and_training(demo_pair, tmp_path: Path) -> None:
    theirs, _, tokenizer = demo_pair()
    theirs.transformer.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    stock, patched = (embedder(tmp_path / "body", is_patched) for is_patched in (False, True))
    bodies = [module for module in patched.modules() if isinstance(module, fastgpt.GPT2Model)]
    assert len(bodies) == 1
    expected = stock.encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(patched.encode(SENTENCES, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-5)
    losses = trained(stock, tmp_path / "stock")
    assert trained(patched, tmp_path / "patched") == pytest.approx(losses, rel=1e-4)
    assert len(losses) == 4
    patched.save(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    embeddings = patched.encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(loaded.encode(SENTENCES, convert_to_tensor=True), embeddings, rtol=1e-5, atol=1e-5)
    assert (embeddings - expected).abs().max() > 1e-3
