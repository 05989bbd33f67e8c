"""TRL's trainers over the bundled model: of texts, preferences and rewards; the losses of transformers' model."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

trl = pytest.importorskip("trl", reason="pip install trl")
datasets = pytest.importorskip("datasets", reason="pip install datasets")

TEXTS = ["ROMEO: I will go.", "JULIET: Where art thou now?", "KING: My lord, what news from France?", "FIRST: no"] * 3
PLAIN = {"text": TEXTS}
ANSWERED = {"prompt": TEXTS, "completion": [" and so I say"] * len(TEXTS)}
PREFERRED = {"prompt": TEXTS, "chosen": [" and so I say"] * len(TEXTS), "rejected": [" or not"] * len(TEXTS)}
JUDGED = ANSWERED | {"label": [True, False] * (len(TEXTS) // 2)}


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)


def rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def supervised(data: dict[str, list], adapter: Any = None, **options: Any) -> Callable[..., Any]:
    return lambda model, common, rest: trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**common, **options), train_dataset=datasets.Dataset.from_dict(data),
        peft_config=adapter, **rest,
    )  # fmt: skip


def preferring(adapter: Any = None, **options: Any) -> Callable[..., Any]:
    return lambda model, common, rest: trl.DPOTrainer(
        model=model, ref_model=None if adapter else copy.deepcopy(model), args=trl.DPOConfig(**common, **options),
        train_dataset=datasets.Dataset.from_dict(PREFERRED), peft_config=adapter, **rest,
    )  # fmt: skip


def judging(model: Any, common: dict[str, Any], rest: dict[str, Any]) -> Any:
    data = datasets.Dataset.from_dict(JUDGED)
    reference = copy.deepcopy(model)
    return trl.KTOTrainer(model=model, ref_model=reference, args=trl.KTOConfig(**common), train_dataset=data, **rest)


def rewarded(model: Any, common: dict[str, Any], rest: dict[str, Any]) -> Any:
    """Its model also generates."""
    arguments = trl.GRPOConfig(**common, num_generations=2, max_completion_length=8)
    data = datasets.Dataset.from_dict({"prompt": TEXTS})
    return trl.GRPOTrainer(model=model, reward_funcs=rewards, args=arguments, train_dataset=data, **rest)


TRAINERS: dict[str, Callable[..., Any]] = {
    "texts": supervised(PLAIN),
    "packed": supervised(PLAIN, packing=True, max_length=24),
    "without padding": supervised(PLAIN, padding_free=True, max_length=None),
    "recomputed": supervised(PLAIN, gradient_checkpointing=True),
    "answers": supervised(ANSWERED),
    "LoRA": supervised(PLAIN, lora()),
    "preferences": preferring(),
    "preferences, LoRA": preferring(lora()),
    "judgements": judging,
    "rewards": rewarded,
}
# What a trainer logs that is not of the model.
CLOCKS = ("time", "runtime", "per_second")


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer(name: str, demo_pair, tmp_path: Path) -> None:
    *models, tokenizer = demo_pair()
    histories = []
    for model in models:
        common: dict[str, Any] = {
            "output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
            "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 1, "learning_rate": 1e-3,
        }  # fmt: skip
        trainer = TRAINERS[name](model, common, {"processing_class": tokenizer})
        trainer.train()
        histories.append(
            [
                {key: value for key, value in entry.items() if not any(clock in key for clock in CLOCKS)}
                for entry in trainer.state.log_history
            ]
        )
    theirs, ours = histories
    assert len({entry.get("grad_norm", 0.0) for entry in theirs}) >= 4, "nothing was learnt"
    for our_entry, their_entry in zip(ours, theirs, strict=True):
        assert our_entry == pytest.approx(their_entry, rel=1e-3, abs=1e-3)
