"""Everything that is wrong with a checkpoint directory, and what identifies it."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import GPT2Config, PreTrainedConfig

from ..loading import read_config
from .fit import (
    OLD_BUFFER,
    body_shapes,
    by_model_name,
    config_problems,
    head_shapes,
    name_problems,
    not_finite,
    shape_problems,
)
from .headers import (
    Checkpoint,
    CheckpointError,
    CheckpointFileError,
    find_weights,
    inspect_weights,
    one_line,
    read_json,
    shown,
)

MAX_PROBLEMS = 200

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CheckpointReport:
    """What `verify_checkpoint` found.

    files: SHA-256 of every file in the directory, by name. n_parameters: stored ones, tied weights counted once.
    dtypes: their names in safetensors ("F32"). problems: one line each; none means that the checkpoint is sound.
    """

    directory: str
    files: dict[str, str]
    n_parameters: int
    dtypes: list[str]
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)


def verify_checkpoint(directory: str | os.PathLike[str], *, progress: Progress | None = None) -> CheckpointReport:
    """Check configuration, names, shapes, dtypes and values of a GPT-2 in safetensors format, and hash its files.

    progress: is told what takes long while it begins. Raises CheckpointFileError when there is no such directory.
    """
    directory, tell = Path(directory), progress or (lambda message: None)
    if not directory.is_dir():
        raise CheckpointFileError(f"{directory}: no such directory")

    problems: list[CheckpointError] = []
    config, architecture = _configuration(directory / "config.json", problems)
    checkpoint = Checkpoint(directory)
    try:
        checkpoint = inspect_weights(find_weights(directory, named=getattr(config, "transformers_weights", None)))
    except CheckpointError as error:
        problems.append(error)
    problems.extend(checkpoint.problems)
    if config is not None and checkpoint.tensors:
        problems.extend(_tensor_problems(checkpoint, config, architecture))
    for file in checkpoint.files:
        tell(f"reading the values of {_size(file)}")
        problems.extend(_value_problems(file, is_known_broken=bool(checkpoint.problems)))

    hashes: dict[str, str] = {}
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        tell(f"hashing {_size(file)}")
        with file.open("rb") as content:
            hashes[file.name] = hashlib.file_digest(content, "sha256").hexdigest()

    is_copy = "lm_head.weight" if config is None or config.tie_word_embeddings else None
    weights = [
        tensor
        for name, tensor in by_model_name(checkpoint).items()
        if name != is_copy and not re.search(OLD_BUFFER, name)
    ]
    lines = [str(problem) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return CheckpointReport(
        directory=str(directory),
        files=hashes,
        n_parameters=sum(math.prod(tensor.shape) for tensor in weights),
        dtypes=sorted({tensor.dtype for tensor in weights}),
        problems=lines,
    )


def _size(file: Path) -> str:
    return f"{file.name} ({file.stat().st_size / 1e9:.2f} GB)"


def _configuration(file: Path, problems: list[CheckpointError]) -> tuple[PreTrainedConfig | None, str]:
    """The configuration, if it is usable, and the name of the model's class."""
    try:
        config = read_config(GPT2Config, file, {})
    except CheckpointError as error:
        problems.append(error)
        return None, ""
    written = read_json(file)
    if written.get("model_type", "gpt2") != "gpt2":
        problems.append(CheckpointError(f"{file}: model_type is {shown(written['model_type'])}, not 'gpt2'"))
    faults = [CheckpointError(f"{file}: {problem}") for problem in config_problems(config)]
    problems.extend(faults)
    architecture = config.architectures[0] if config.architectures else ""
    return None if faults else config, architecture


def _tensor_problems(checkpoint: Checkpoint, config: PreTrainedConfig, architecture: str) -> Iterator[CheckpointError]:
    stored = by_model_name(checkpoint)
    yield from shape_problems(checkpoint, config, architecture)
    if checkpoint.problems:
        return  # tensors in a file that could not be read are not missing
    yield from name_problems(checkpoint, config)
    head = head_shapes(architecture, config)
    for name in head.keys() - stored.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        yield CheckpointError(f"{checkpoint.source}: has no tensor {name!r}, the head of {architecture}")
    known = {name for name, _ in islice(body_shapes(config), len(stored) + 100)} | head.keys()
    for name in stored:
        if name not in known and not re.search(OLD_BUFFER, name):
            yield CheckpointError(
                f"{checkpoint.source}: tensor {shown(name)} is no part of {architecture or 'a GPT-2'}"
            )


def _value_problems(file: Path, *, is_known_broken: bool) -> Iterator[CheckpointError]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if bad := not_finite(tensors.get_tensor(name)):
                    yield CheckpointError(f"{file}: tensor {shown(name)} holds {bad}")
    except SafetensorError as error:
        if is_known_broken:
            return
        yield CheckpointError(f"{file}: {one_line(error)}")
