"""Verify a checkpoint directory: list everything that is wrong with it, and hash its files."""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GPT2Config, PreTrainedConfig

from . import modeling
from .checkpoint.fit import (
    OLD_BUFFER,
    PREFIX,
    body_shapes,
    by_model_name,
    config_problems,
    head_shapes,
    name_problems,
    not_finite,
    shape_problems,
)
from .checkpoint.headers import (
    Checkpoint,
    CheckpointError,
    CheckpointFileError,
    find_weights,
    inspect_weights,
    is_hollow,
    read_json,
)
from .checkpoint.loading import OTHER_CONFIGURATIONS, LoadingMixin, read_config
from .messages import one_line, shown

MAX_PROBLEMS = 200


@dataclass(frozen=True)
class CheckpointReport:
    """What `verify_checkpoint` found.

    files: SHA-256 of every file in the directory, by name. n_parameters: stored ones, tied weights counted once.
    dtypes: their names in safetensors ("F32"). problems: one line each; if there is none, the checkpoint is sound, that
    is, from_pretrained and a forward pass work. warnings: oddities with which the model still works.
    """

    directory: str
    files: dict[str, str]
    n_parameters: int
    dtypes: list[str]
    problems: list[str]
    warnings: list[str]


def verify_checkpoint(
    directory: str | os.PathLike[str], *, tell: Callable[[str], None] = lambda message: None
) -> CheckpointReport:
    """Check configuration, names, shapes, dtypes and values of a GPT-2 in safetensors format, and hash its files.

    All problems that the files show are listed. If they show none, the model is loaded and runs once.
    tell: called with a message before each long step. Raises CheckpointFileError when there is no such directory.
    """
    directory = Path(directory)
    if directory.is_file():
        raise CheckpointFileError(f"{directory}: is a file: give the directory that holds it and config.json")
    if not directory.is_dir():
        raise CheckpointFileError(f"{directory}: no such directory")

    problems: list[CheckpointError] = []
    warnings: list[CheckpointError] = []
    config, architecture = _configuration(directory, problems, warnings)
    checkpoint = Checkpoint(directory)
    try:
        checkpoint = inspect_weights(find_weights(directory, named=getattr(config, "transformers_weights", None)))
    except CheckpointError as error:
        problems.append(error)
    problems.extend(checkpoint.problems)
    if config is not None and checkpoint.tensors:
        problems.extend(_tensor_problems(checkpoint, config, architecture))
        if not checkpoint.problems:
            warnings.extend(_oddities(checkpoint, config, architecture))
    if problems:
        known = _known_names(config, architecture, checkpoint)
        for file in checkpoint.files:
            tell(f"reading the values of {_size(file)}")
            problems.extend(_value_problems(file, known))
    else:
        tell("loading the model")
        problems.extend(_use(directory, architecture))

    hashes: dict[str, str] = {}
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        tell(f"hashing {_size(file)}")
        try:
            hashes[file.name] = _sha256(file)
        except CheckpointError as error:
            warnings.append(error)

    stored = by_model_name(checkpoint)
    is_tied = config is None or config.tie_word_embeddings
    copies = {"lm_head.weight"} if is_tied and "wte.weight" in stored else set()
    weights = [tensor for name, tensor in stored.items() if name not in copies and not re.search(OLD_BUFFER, name)]
    return CheckpointReport(
        directory=str(directory),
        files=hashes,
        n_parameters=sum(math.prod(tensor.shape) for tensor in weights),
        dtypes=sorted({tensor.dtype for tensor in weights}),
        problems=_lines(problems),
        warnings=_lines(warnings),
    )


def _lines(errors: list[CheckpointError]) -> list[str]:
    lines = [str(error) for error in errors[:MAX_PROBLEMS]]
    return [*lines, f"and {len(errors) - MAX_PROBLEMS} more"] if len(errors) > MAX_PROBLEMS else lines


def _size(file: Path) -> str:
    with suppress(OSError):  # Another process may have removed it since it was found.
        return f"{file.name} ({file.stat().st_size / 1e9:.2f} GB)"
    return file.name


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            status = os.fstat(content.fileno())
            if is_hollow(status):
                raise CheckpointError(f"{file}: not hashed: most of its {status.st_size} bytes are not on the disk")
            digest, n_left = hashlib.sha256(), status.st_size  # special files may never end
            while n_left > 0 and (block := content.read(min(n_left, 2**20))):
                digest.update(block)
                n_left -= len(block)
            return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: not hashed: {error.strerror}") from error


def _configuration(
    directory: Path, problems: list[CheckpointError], warnings: list[CheckpointError]
) -> tuple[PreTrainedConfig | None, str]:
    """The configuration, if it is usable, and the name of the model's class."""
    for name in OTHER_CONFIGURATIONS:
        if (directory / name).is_file():
            try:
                read_json(directory / name)
            except CheckpointError as error:
                problems.append(error)
    file = directory / "config.json"
    try:
        config = read_config(GPT2Config, file, {})
    except CheckpointError as error:
        problems.append(error)
        return None, ""
    written = read_json(file)
    if written.get("model_type", "gpt2") != "gpt2":
        warnings.append(CheckpointError(f"{file}: model_type is {shown(written['model_type'])}, not 'gpt2'"))
    faults = [CheckpointError(f"{file}: {problem}") for problem in config_problems(config)]
    problems.extend(faults)
    named = config.architectures if isinstance(config.architectures, list) else []
    architecture = next((name for name in named if isinstance(name, str)), "")
    return None if faults else config, architecture


def _tensor_problems(checkpoint: Checkpoint, config: PreTrainedConfig, architecture: str) -> Iterator[CheckpointError]:
    yield from shape_problems(checkpoint, config, architecture)
    if checkpoint.problems:
        return  # tensors in a file that could not be read are not missing
    yield from name_problems(checkpoint, config, architecture)


def _known_names(config: PreTrainedConfig | None, architecture: str, checkpoint: Checkpoint) -> set[str]:
    """The names of the model's tensors, or without a configuration the stored names."""
    stored = by_model_name(checkpoint)
    if config is None:
        return set(stored)
    return {name for name, _ in islice(body_shapes(config), len(stored) + 100)} | head_shapes(
        architecture, config
    ).keys()


def _oddities(checkpoint: Checkpoint, config: PreTrainedConfig, architecture: str) -> Iterator[CheckpointError]:
    """What transformers accepts silently: a missing head, which it initialises, and tensors that it ignores."""
    stored, head = by_model_name(checkpoint), head_shapes(architecture, config)
    for name in head.keys() - stored.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        yield CheckpointError(
            f"{checkpoint.source}: has no tensor {name!r}, the head of {architecture}: a new one is made"
        )
    known = _known_names(config, architecture, checkpoint)
    for name in stored:
        if name not in known and not re.search(OLD_BUFFER, name):
            yield CheckpointError(
                f"{checkpoint.source}: tensor {shown(name)} is no part of {architecture or 'a GPT-2'}"
            )


def _value_problems(file: Path, known: set[str]) -> Iterator[CheckpointError]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.removeprefix(PREFIX) not in known:
                    continue
                if bad := not_finite(tensors.get_tensor(name)):
                    yield CheckpointError(f"{file}: tensor {shown(name)} holds {bad}")
    except (SafetensorError, OSError):
        return  # what is wrong with the file is already reported, if it is still there


@torch.no_grad()
def _use(directory: Path, architecture: str) -> Iterator[CheckpointError]:
    """Problems that show when the model is loaded and runs on one token."""
    is_ours = architecture in modeling.__all__ and issubclass(getattr(modeling, architecture), LoadingMixin)
    model_class: Any = getattr(modeling, architecture) if is_ours else modeling.GPT2LMHeadModel
    try:
        model, _, problems = model_class.load_with_problems(directory)
        found = list(problems)
        if not found:
            model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
        yield from found
    except CheckpointError as error:
        yield error
    except Exception as error:  # a user would meet the same error from torch or transformers
        yield CheckpointError(f"{directory}: cannot be used: {type(error).__name__}: {one_line(error)}")
