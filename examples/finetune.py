"""Fine-tune a GPT-2 on a text file with transformers' Trainer, which needs to know nothing of fastgpt.

python examples/finetune.py TEXT_FILE --steps 200 --out finetuned
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import Trainer, TrainingArguments

import fastgpt


def main(
    text_file: Annotated[Path, typer.Argument(help="Plain text to learn from.")],
    out: Annotated[Path, typer.Option(help="Folder of the trained model.")] = Path("finetuned"),
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    model, tokenizer = fastgpt.load_demo()
    # One long row of tokens, cut into windows of the model's context: no token is padding.
    ids = tokenizer(text_file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    context = model.config.n_positions
    if len(ids) < context:
        raise typer.BadParameter(f"{text_file} has {len(ids)} tokens; one window takes {context}")
    windows = [{"input_ids": window, "labels": window} for window in ids.unfold(0, context, context)]

    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        bf16=torch.cuda.is_available(),
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model=model, args=settings, train_dataset=windows)
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; try: fastgpt generate 'ROMEO:' --model {out}")


if __name__ == "__main__":
    typer.run(main)
