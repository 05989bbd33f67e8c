"""DeepSpeed's ZeRO over the bundled model, in one process on gloo: losses and results of transformers' model."""

import os
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="pip install --no-build-isolation deepspeed")


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory) -> Any:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        deepspeed.init_distributed("gloo")
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_zero(stage: int, recomputes: bool, demo_pair) -> None:
    *models, tokenizer = demo_pair()
    ids = tokenizer("ROMEO: I will go to the king and say that he is no man of mine", return_tensors="pt").input_ids
    results = []
    for model in models:
        model.train()
        if recomputes:
            model.gradient_checkpointing_enable()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.5,
            # Every parameter is empty until its module is called.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        losses = []
        for _ in range(4):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            results.append((losses, model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)))
    (their_losses, their_logits, their_tokens), (losses, logits, tokens) = results
    assert their_losses[-1] < their_losses[0], "nothing was learnt"
    assert losses == pytest.approx(their_losses, rel=1e-5)
    torch.testing.assert_close(logits, their_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, their_tokens)
