"""The helper that judges the accuracy of an operation accepts eager torch and refuses wrong results."""

import pytest
import torch
from accuracy import assert_as_accurate, assert_parity
from fastgpt_kernels import reference
from layer_norm.formula import layer_norm_formula, make_inputs
from torch import Tensor


def test_helper_accepts_eager_and_refuses_wrong_results() -> None:
    x, weight, bias = make_inputs(33, 64, dtype=torch.bfloat16)
    eager = layer_norm_formula(x, weight, bias)
    truth = layer_norm_formula(x.double(), weight.double(), bias.double())
    assert_as_accurate(eager, eager, truth)
    assert_as_accurate(truth.bfloat16(), eager, truth)

    one_wrong, one_nan = eager.clone(), eager.clone()
    one_wrong[17, 5] += 1.0
    one_nan[17, 5] = float("nan")
    for wrong in (one_wrong, one_nan, eager.flip(0), torch.zeros_like(eager), eager * 1.05):
        with pytest.raises(AssertionError, match="error"):
            assert_as_accurate(wrong, eager, truth)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(eager[:1], eager, truth)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate(eager.float(), eager, truth)
    with pytest.raises(AssertionError, match="nothing can be said"):
        assert_as_accurate(eager, one_nan, truth)


@pytest.mark.parametrize("lost", ["weight", "bias", "eps", "gradient"])
def test_helper_refuses_a_layer_norm_with_one_mistake(lost: str) -> None:
    def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = torch.ones_like(weight) + 0 * weight if lost == "weight" else weight
        bias = 0 * bias if lost == "bias" else bias
        x = (x + x.detach()) / 2 if lost == "gradient" else x
        return reference.layer_norm(x, weight, bias, eps=1e-3 if lost == "eps" else 1e-5)

    with pytest.raises(AssertionError, match="error"):
        assert_parity(wrong, layer_norm_formula, make_inputs(33, 64))
