"""The recipe of the demo model: train a small GPT-2 and its byte-level BPE on one text file.

    python -m fastgpt.demo.train TEXT_FILE --out DIR

The text is cut in order into three parts: for training, for validation (it selects the checkpoint and the bigram's
smoothing), and a held-out part that is only measured. The measurements go into the model card.
"""

import shlex
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    GPT2Config,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastgpt

from ..corpus import encode, examples, read_text
from ..evaluation import bits_per_byte, mean_loss
from ..trainer import Report
from .card import model_card
from .measure import Bigram, Outcome, Parts

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
SMALLEST_VOCABULARY = 2 + 256  # these two and every byte

# --- the text and its tokens ----------------------------------------------------------------------------------------


def split(text: str) -> Parts:
    """The first 85% of the characters, the next 5% and the last 10%."""
    first, second = len(text) * 85 // 100, len(text) * 90 // 100
    return Parts(text[:first], text[first:second], text[second:])


def train_tokenizer(text: str, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with at most `vocab_size` tokens that encodes and decodes any string.

    Raises ValueError when vocab_size has no room for every byte.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} has no room for every byte: {SMALLEST_VOCABULARY} is the least")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def windows(ids: Tensor, context: int, stride: int) -> list[Tensor]:
    """Every `stride`-th window of `context` tokens."""
    return list(ids.unfold(0, context, stride)) if len(ids) >= context else []


def openings(ids: Tensor, context: int, newline: int) -> list[Tensor]:
    """A window from the start of each paragraph, after an end-of-text token: how generation without a prompt starts.

    ids: as `encode` returns them. newline: the token that ends a line; two in a row end a paragraph.
    """
    starts = 2 + torch.nonzero((ids[:-2] == newline) & (ids[1:-1] == newline)).flatten()
    return [torch.cat([ids[:1], ids[i : i + context - 1]]) for i in starts.tolist() if i + context - 1 <= len(ids)]


# --- training -------------------------------------------------------------------------------------------------------


def train(
    text: str, tokenizer: PreTrainedTokenizerFast, model: fastgpt.GPT2LMHeadModel, args: TrainingArguments
) -> Outcome:
    """Train on the text's first part, keep the checkpoint that is best on the second, measure it on the last.

    args: must evaluate and save, and load the best model at the end.
    Raises ValueError when a part of the text is shorter than the model's context.
    """
    parts, context = split(text), model.config.n_positions
    ids = [encode(tokenizer, part) for part in parts]
    for name, part_ids in zip(Parts._fields, ids, strict=True):
        if len(part_ids) <= context:
            raise ValueError(
                f"the text is too short: its {name} part has {len(part_ids) - 1} tokens, fewer than the context of "
                f"{context}: give a longer text or a smaller --context"
            )
    training_ids, validation_ids, held_out_ids = ids
    newline = tokenizer.convert_tokens_to_ids("Ċ")  # a line feed in byte-level BPE
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=examples(windows(training_ids, context, stride=16) + openings(training_ids, context, newline)),  # type: ignore[arg-type]
        eval_dataset=examples(windows(validation_ids, context, stride=context)),  # type: ignore[arg-type]
        callbacks=[Report(lambda line: print(line, file=sys.stderr, flush=True))],
    )
    trainer.remove_callback(PrinterCallback)

    started = time.perf_counter()
    trainer.train()
    training_s = time.perf_counter() - started

    model.eval()
    loss = mean_loss(model, held_out_ids)
    bigram = Bigram(training_ids, model.config.vocab_size)
    strength = bigram.best_strength(validation_ids)
    bigram_loss = bigram.loss(held_out_ids, strength)
    return Outcome(
        parts=parts,
        n_tokens=tuple(len(part_ids) - 1 for part_ids in ids),
        best_step=trainer.state.best_global_step or trainer.state.global_step,
        training_s=training_s,
        model_loss=loss,
        model_bits_per_byte=bits_per_byte(loss, held_out_ids, parts.held_out),
        bigram_loss=bigram_loss,
        bigram_bits_per_byte=bits_per_byte(bigram_loss, held_out_ids, parts.held_out),
        bigram_strength=strength,
    )


# --- command line ---------------------------------------------------------------------------------------------------

TEMPERATURE = 0.8


def sample(model: fastgpt.GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """The prompt and the model's continuation up to the end of the context."""
    ids = tokenizer(prompt or END_OF_TEXT, return_tensors="pt").to(model.device)
    n_left = model.config.n_positions - ids["input_ids"].shape[1]
    if n_left < 1:
        raise ValueError(f"the prompt has {ids['input_ids'].shape[1]} tokens, which fill the context")
    options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": n_left}
    generated = model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], seed=seed, **options)
    return str(tokenizer.decode(generated[0], skip_special_tokens=True)).strip()


def run(
    invocation: typer.Context,
    text_file: Annotated[Path, typer.Argument(help="The text to train on, in UTF-8.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, its tokenizer and its card.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens of the byte-level BPE, at most.")] = 1024,
    n_layer: Annotated[int, typer.Option(min=1)] = 6,
    n_embd: Annotated[int, typer.Option(min=1)] = 128,
    n_head: Annotated[int, typer.Option(min=1)] = 4,
    context: Annotated[int, typer.Option(min=8, help="Context of the model, in tokens.")] = 256,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9)] = 0.2,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of the text per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="The peak learning rate; a cosine follows.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    prompt: Annotated[str, typer.Option(help="What the card's sample starts with.")] = "",
    about: Annotated[str, typer.Option(help="A sentence on the text, for the card.")] = "",
) -> None:
    """Train a small GPT-2 and its tokenizer on a text file, and compare it with a bigram model."""
    if find_spec("accelerate") is None:
        raise ValueError("training needs accelerate: pip install accelerate")
    text = read_text(text_file)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder")
    tokenizer = train_tokenizer(split(text).training, vocab_size, context)
    special_tokens: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    set_seed(seed)
    model = fastgpt.GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=context,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            attn_pdrop=0.0,  # dropout inside attention would take half of a step on a CPU
            **special_tokens,
        )
    )
    interval = max(1, steps // 20)
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=interval,
            weight_decay=weight_decay,
            adam_beta2=0.99,
            eval_strategy="steps",
            eval_steps=interval,
            save_strategy="steps",
            save_steps=interval,
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            logging_steps=interval,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
            seed=seed,
        )
        outcome = train(text, tokenizer, model, args)

    model.config.use_cache = True  # the Trainer turned it off
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    given = {**invocation.params, "text_file": text_file.name, "out": "DIR"}
    card = model_card(
        outcome,
        model,
        args,
        source=text_file.name,
        about=about,
        command=command_line(given),
        prompt=prompt,
        sample=sample(model, tokenizer, prompt, seed),
        temperature=TEMPERATURE,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    print(
        f"held-out loss {outcome.model_loss:.4f} nats per token, bigram {outcome.bigram_loss:.4f}: written to {out}",
        file=sys.stderr,
    )


def command_line(given: dict[str, object]) -> str:
    """The command with every option, so that it means the same after a default changes."""
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in given.items() if name != "text_file"}
    words = [word for option, value in options.items() if value for word in (option, value)]
    return shlex.join(["python", "-m", "fastgpt.demo.train", str(given["text_file"]), *words])


app = typer.Typer(add_completion=False)
app.command()(run)


def main(args: list[str] | None = None) -> None:
    """Run the recipe on `args` (sys.argv by default); a user's mistake prints one line and exits with code 2."""
    try:
        app(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
