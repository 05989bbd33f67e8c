"""The whole model on the Triton kernels: tests of the model and of the drop-in, again under `backend("triton")`."""

from collections.abc import Iterator

import pytest
import torch
from interpreter import DEVICE
from test_drop_in import (  # noqa: F401
    test_autocast_equals_transformers,
    test_compile_fullgraph_forward_and_backward,
    test_export,
    test_forward_hooks_on_every_submodule,
    test_gradient_checkpointing_recomputes_every_block,
    test_lora_on_every_product,
    test_replaced_and_wrapped_submodules,
)
from test_model_inputs import (  # noqa: F401
    test_attention_dropout_is_seeded_and_drops,
    test_continuing_from_a_cache,
    test_empty_inputs,
    test_generate_equals_transformers,
    test_left_padded_batch_equals_single_sequences,
    test_masks_with_default_positions,
    test_other_inputs,
)
from test_modeling import (  # noqa: F401
    test_configuration_equals_transformers,
    test_every_head,
    test_scaling_flags_change_the_result,
    test_training_loss_takes_every_option_of_transformers,
)
from test_training_logits import (  # noqa: F401
    computed,
    test_every_container_holds_the_tensor,
    test_gradient_of_the_loss_with_respect_to_the_logits,
    test_read_first_without_gradients,
)

import fastgpt
from fastgpt import ops


@pytest.fixture(autouse=True)
def _on_the_kernels() -> Iterator[None]:
    with fastgpt.backend("triton"), torch.device(DEVICE):
        yield


@pytest.mark.parametrize("operation", ops.fastgpt_kernels.OPERATIONS)
def test_these_tests_run_on_kernels(operation: str) -> None:
    assert ops.explain(operation, DEVICE) == ("triton", "asked for by name")
