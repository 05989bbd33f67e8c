"""Models exported to ONNX by torch's exporter, and run by onnxruntime at other sizes than the exported ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import pair, tiny_config, token_ids
from torch import Tensor, nn

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")


class FirstField(nn.Module):
    """(B, T) ids and mask -> the first field of a model's output, without a cache."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]


def padded(n_batch: int, n_tokens: int, n_padding: int) -> tuple[Tensor, Tensor]:
    """ids and a mask, with padding on the left of the first row."""
    ids = token_ids(n_batch, n_tokens, 131)
    mask = torch.ones_like(ids)
    mask[0, :n_padding] = 0
    return ids, mask


@pytest.mark.parametrize("head", ["GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification"])
def test_exported_model(head: str, tmp_path: Path) -> None:
    theirs, ours = pair(tiny_config(), head)
    file, free = tmp_path / "model.onnx", torch.export.Dim.DYNAMIC
    torch.onnx.export(
        FirstField(ours).eval(), padded(2, 9, 3), file, dynamo=True, dynamic_shapes=({0: free, 1: free},) * 2,
        verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(file))
    inputs = padded(3, 12, 5)
    names = [value.name for value in session.get_inputs()]
    result = torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])
    with torch.no_grad():
        expected = FirstField(theirs)(*inputs)
    if expected.ndim == 3:
        result, expected = result[inputs[1].bool()], expected[inputs[1].bool()]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
