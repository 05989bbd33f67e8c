"""Fine-tune a GPT-2 on text, in a folder from which an interrupted run continues bit for bit.

The folder of a run: options.json (what it was asked for), log.jsonl (measurements), loss.png (their curve),
checkpoint-N for the last steps N, and at the end the model with its tokenizer.
"""

import json
import math
import os
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_bf16_available
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerState, TrainingArguments

from .checkpoint.fit import rounding_of
from .checkpoint.headers import read_json
from .corpus import Corpus
from .curve import draw_curve
from .messages import one_line
from .modeling import GPT2LMHeadModel
from .progress import Progress
from .trainer import Interrupt, LogFile, Report, RunTrainer, TrainingError, last_checkpoint

fcntl: types.ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

LOG, CURVE, OPTIONS = "log.jsonl", "loss.png", "options.json"
RECOMPUTE = "nothing", "norms", "blocks"
# Trainer's argument for the last one, and its name before transformers 5.24.
_NEW, _OLD = "activation_checkpointing", "gradient_checkpointing"
_CHECKPOINTING = _NEW if _NEW in TrainingArguments.__dataclass_fields__ else _OLD


@dataclass(frozen=True)
class Settings:
    """How to train. Raises ValueError, with the value, on what cannot be.

    context: tokens of a sequence; None takes the model's. epochs: passes over the text; steps counts instead where it
    is given. batch: sequences at a time. accumulate: batches that make one step. learning_rate: its peak, reached after
    5% of the steps; a cosine leads from there to 0. every: steps between two evaluations, with a checkpoint at each;
    None takes a tenth of all. keep: checkpoints that stay. seed: of the order of sequences and of dropout. recompute:
    one of RECOMPUTE, what backward computes again and the forward pass does not keep; it changes memory and time, and
    no bit of the result.
    """

    context: int | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    every: int | None = None
    keep: int = 2
    seed: int = 0
    recompute: str = "nothing"

    def __post_init__(self) -> None:
        for name, least in {"context": 2, "steps": 1, "batch": 1, "accumulate": 1, "every": 1, "keep": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, not {value}")
        for name, limit in {"epochs": 1e9, "learning_rate": math.inf}.items():
            if not 0 < getattr(self, name) < limit:
                raise ValueError(f"{name} must be above 0 and below {limit:g}, not {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), not {self.seed}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, not {self.recompute!r}")

    def of_the_result(self) -> dict[str, Any]:
        """The settings on which the result depends."""
        return {name: value for name, value in asdict(self).items() if name not in ("keep", "recompute")}

    def n_steps(self, n_sequences: int) -> int:
        per_epoch = math.ceil(math.ceil(n_sequences / self.batch) / self.accumulate)
        return self.steps or math.ceil(self.epochs * per_epoch)


# --- the folder of a run --------------------------------------------------------------------------------------------


def check_folder(out: Path, resume: bool) -> None:
    """Raise ValueError when the folder of a run cannot be written, or is not empty and not to be resumed.

    The folder is not made yet, so that a text which cannot be trained on leaves none.
    """
    try:
        nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: give another folder, or --resume to go on with the run in it")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the folder of a run for this process while the block runs, where the system has locks.

    Raises ValueError when another process holds it.
    """
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes into {out}: wait for its end, or give another folder") from None
        except OSError:  # A file system without locks.
            pass
        yield
    finally:
        os.close(folder)


def _check_options(out: Path, options: dict[str, Any]) -> None:
    """Raise ValueError when a run would go on with other options than it began with; a new run writes them down."""
    file = out / OPTIONS
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=out) as folder:
            whole = Path(folder, OPTIONS)
            whole.write_text(json.dumps(options, indent=2) + "\n")
            whole.replace(file)
    before = read_json(file)
    for name, value in options.items():
        if before.get(name) != value:
            raise ValueError(f"the run in {out} began with {name} {before.get(name)}, not {value}: resume it with that")


# --- training -------------------------------------------------------------------------------------------------------


@contextmanager
def _norms_computed_again(model: GPT2LMHeadModel, is_asked: bool) -> Iterator[None]:
    """Inside the block only, because the configuration is saved with the result."""
    if is_asked:
        model.config.recompute_norms = True
    try:
        yield
    finally:
        vars(model.config).pop("recompute_norms", None)


class Outcome(NamedTuple):
    """How a run ended. loss: on the validation text, in nats per token. signal: what ended it before its last step."""

    step: int
    n_steps: int
    loss: float
    signal: int | None


def fine_tune(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    out: Path,
    settings: Settings,
    *,
    name: str,
    device: torch.device,
    resume: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Outcome:
    """Train a float32 model, in bfloat16 where a GPU has it, and save it with its tokenizer in `out`.

    out: a folder that `check_folder` has passed. name: the model's, as the run was asked for. resume: go on from the
    last checkpoint, if there is one. say: takes a line for each evaluation.
    After Ctrl-C the result has step < n_steps, and what is saved is a checkpoint.
    Raises TrainingError when the loss is not finite or the disk is full, ValueError when the options of a resumed run
    differ, another run writes into the folder, or the model's weights are rounded.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this training runs in one process: for several, see examples/ddp.py")
    if device.index:
        raise ValueError(f"training takes the first GPU that it sees, not {device}: set CUDA_VISIBLE_DEVICES")
    if (rounding := rounding_of(model.config)) is not None:
        raise ValueError(
            f"{name} has int{rounding.bits} weights, which get no gradient: train it in floats, then round it"
        )
    n_steps = settings.n_steps(len(corpus.training))
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        _check_options(out, settings.of_the_result() | {"model": name, "text": corpus.digest()})
        checkpoint = last_checkpoint(out) if resume else None
        args = _trainers_arguments(out, settings, n_steps, device, is_new=checkpoint is None)
        interrupt = Interrupt()
        callbacks = [Report(say, progress), LogFile(out / LOG), interrupt]
        trainer = RunTrainer(model, corpus, settings.keep, args=args, processing_class=tokenizer, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)

        if checkpoint is not None and checkpoint == out / f"checkpoint-{n_steps}":  # Trainer would make one more step.
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            model.load_state_dict(GPT2LMHeadModel.from_pretrained(checkpoint, dtype=torch.float32).state_dict())
        else:
            with interrupt.listening(), _norms_computed_again(model, settings.recompute == "norms"):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        history = trainer.state.log_history
        if trainer.state.global_step == n_steps:
            trainer.save_whole(out)
        try:
            draw_curve(history, out / CURVE)
        except OSError as error:
            raise TrainingError(f"{out / CURVE} could not be drawn: {one_line(error)}; all else is saved") from error
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return Outcome(trainer.state.global_step, n_steps, losses[-1], interrupt.signal)


def _trainers_arguments(
    out: Path, settings: Settings, n_steps: int, device: torch.device, *, is_new: bool
) -> TrainingArguments:
    every = settings.every or math.ceil(n_steps / 10)
    blocks_again: dict[str, Any] = {_CHECKPOINTING: settings.recompute == "blocks"}
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=n_steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=n_steps // 20,  # Given a share, Trainer rounds up, and the first step of a warm-up learns nothing.
        weight_decay=settings.weight_decay,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and is_bf16_available(),
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=is_new,
        save_strategy="steps",
        save_steps=every,
        logging_steps=math.ceil(every / 10),
        logging_nan_inf_filter=False,
        **blocks_again,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
        seed=settings.seed,
    )
    args._n_gpu = min(args.n_gpu, 1)  # Trainer would spread the batch over all GPUs with torch's old DataParallel.
    return args
