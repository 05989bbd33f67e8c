"""transformers' Trainer as `fastgpt train` uses it: what it measures, says, writes down and refuses to save."""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, default_data_collator

from . import accounting
from .corpus import Corpus, examples
from .evaluation import mean_loss, perplexity
from .messages import one_line
from .modeling import GPT2LMHeadModel
from .progress import Progress

# A full disk is an error of the system, of torch's writer or of safetensors.
SAVING_ERRORS = OSError, RuntimeError, SafetensorError


class TrainingError(RuntimeError):
    """A run that cannot go on; its checkpoints are kept."""


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that is whole. A run that was killed while it saved leaves one that is not."""
    return next(iter(_newest_first(out)), None)


def _newest_first(out: Path) -> list[Path]:
    """The checkpoints that are whole."""
    steps = {folder: step for folder in out.glob("checkpoint-*") if (step := _step_of(folder)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _step_of(checkpoint: Path) -> int | None:
    """The step at which a checkpoint was saved; None if it is not whole."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return int(json.loads((checkpoint / "trainer_state.json").read_bytes())["global_step"])  # written last
    return None


def _remove_checkpoints(out: Path, n_kept: int) -> None:
    """Remove all but the newest that are whole.

    Trainer goes by their times, and where a clock was put back would remove the one that it has just saved.
    """
    kept = _newest_first(out)[:n_kept]
    for folder in out.glob("checkpoint-*"):
        if folder not in kept and folder.name.removeprefix("checkpoint-").isdecimal():
            shutil.rmtree(folder, ignore_errors=True)


# --- callbacks --------------------------------------------------------------------------------------------------------


class Report(TrainerCallback):
    """Moves a progress bar with each step, and says one line for each evaluation."""

    def __init__(self, say: Callable[[str], None], progress: Progress | None = None) -> None:
        self.say, self.progress, self.speed = say, progress, ""
        self.training_loss = math.nan

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.progress is not None:
            loss = "" if math.isnan(self.training_loss) else f", loss {self.training_loss:.4f}"
            self.progress(f"step {state.global_step}{loss}{self.speed}", state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        self.training_loss = logs.get("loss", self.training_loss)
        if "tokens_per_s" in logs:
            mfu = f", MFU {logs['mfu']:.0%}" if "mfu" in logs else ""
            self.speed = f", {logs['tokens_per_s']:,.0f} tokens/s{mfu}"

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs) -> None:
        loss = metrics["eval_loss"]
        training = "" if math.isnan(self.training_loss) else f"training loss {self.training_loss:.4f}, "
        validation = f"validation loss {loss:.4f} (perplexity {perplexity(loss):.2f})"
        self.say(f"step {state.global_step} of {state.max_steps}: {training}{validation}{self.speed}")


class LogFile(TrainerCallback):
    """Writes each measurement as a line of JSON. A run that goes on begins with the lines of its checkpoint."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.file.write_text("".join(map(self._line, state.log_history)))

    def on_log(self, args, state, control, **kwargs) -> None:
        with self.file.open("a") as file:
            file.write(self._line(state.log_history[-1]))

    def _line(self, entry: dict[str, float]) -> str:
        return json.dumps(entry) + "\n" if "loss" in entry or "eval_loss" in entry else ""


class Interrupt(TrainerCallback):
    """Lets Ctrl-C, or the SIGTERM of a scheduler, end a run after the step that it is in, with a checkpoint.

    A second one ends it at once. signal: which of them came.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._ask) for number in _AT_ONCE}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        self.signal = number
        for each, handler in _AT_ONCE.items():
            signal.signal(each, handler)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True


_AT_ONCE = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


# --- the trainer ------------------------------------------------------------------------------------------------------


class RunTrainer(Trainer):
    """Evaluates by `mean_loss`, measures speed, and never saves what is not finite.

    n_kept: how many checkpoints stay.
    """

    model: GPT2LMHeadModel

    def __init__(self, model: GPT2LMHeadModel, corpus: Corpus, n_kept: int, **options: Any) -> None:
        data: dict[str, Any] = {"train_dataset": examples(corpus.training), "eval_dataset": corpus.validation}
        # All rows are of one length. Trainer's own collator asks for a padding token, which GPT-2's tokenizer lacks.
        super().__init__(model, **data, data_collator=default_data_collator, **options)
        self.context, self.n_kept = corpus.training.shape[1], n_kept
        self.flops_per_token = accounting.training_flops(accounting.shape_of(model), self.context) / self.context
        self.peak = accounting.peak_rate(torch.cuda.get_device_name() if self.args.bf16 else "")
        self.losses: list[tuple[int, Tensor]] = []  # since they were looked at last, which waits for a GPU
        self.n_tokens, self.started = 0, 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Tensor:
        if not self.losses:
            self.n_tokens, self.started = 0, time.perf_counter()
        loss = super().training_step(model, inputs, *more, **named)
        self.losses.append((self.state.global_step + 1, loss))
        self.n_tokens += inputs["input_ids"].numel()
        return loss

    def _check_finite(self) -> None:
        for step, loss in self.losses:
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss of step {step} is {loss.item()}: training stopped, and a smaller --learning-rate may "
                    f"help; {self._kept()}"
                )
        self.losses.clear()

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        if "loss" in logs:
            self._check_finite()
            logs["tokens_per_s"] = self.n_tokens / (time.perf_counter() - self.started)
            if self.peak is not None:
                logs["mfu"] = logs["tokens_per_s"] * self.flops_per_token / self.peak
        try:
            super().log(logs, *more, **named)
        except OSError as error:  # of LogFile
            raise TrainingError(f"the log could not be written: {one_line(error)}; {self._kept()}") from error

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.model.eval()
        with self.compute_loss_context_manager():
            loss = mean_loss(
                self.model,
                self.eval_dataset,  # type: ignore[arg-type]
                context=self.context,
                stride=self.context,
                batch=self.args.per_device_train_batch_size,
            )
        metrics = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *call: Any, **named: Any) -> None:
        self._check_finite()
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise TrainingError(f"the weights are not finite after step {self.state.global_step}; {self._kept()}")
        folder = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(*call, **named)
        except SAVING_ERRORS as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(f"{folder} could not be saved: {one_line(error)}; {self._kept()}") from error
        _remove_checkpoints(folder.parent, self.n_kept)

    def save_whole(self, out: Path) -> None:
        """Save the model and its tokenizer for use. Raises TrainingError when that fails."""
        self.model.config.use_cache = True  # Trainer turned it off.
        try:
            self.model.save_pretrained(out)
            self.processing_class.save_pretrained(out)  # type: ignore[union-attr]
        except SAVING_ERRORS as error:
            raise TrainingError(f"the model could not be saved in {out}: {one_line(error)}; {self._kept()}") from error

    def _kept(self) -> str:
        folder = last_checkpoint(Path(str(self.args.output_dir)))
        return "there is no checkpoint before it" if folder is None else f"the last good checkpoint is {folder}"
