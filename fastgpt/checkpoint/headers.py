"""The tensors of a checkpoint directory and the faults of its files, read from the file headers alone.

Nothing here builds a model or reads a weight, so checking takes milliseconds for a checkpoint of any size. Problems are
collected as exceptions: loading raises the first, `verify_checkpoint` lists them all.
"""

import io
import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..messages import one_line, shown

# GPT-2 xl needs 60 kB. Parsing the largest allowed header takes a quarter of a second; a larger one is not read.
MAX_HEADER_BYTES = 1_000_000
# Room for tens of thousands of labels in a config.json.
MAX_JSON_BYTES = 5_000_000
# GPT-2's tokenizer.json has 1.4 MB, and those of the largest vocabularies in use twenty times as much.
MAX_TOKENIZER_BYTES = 50_000_000

SAFETENSORS_NAMES = ("model.safetensors", "model.safetensors.index.json")
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class CheckpointError(ValueError):
    """A checkpoint that must not be loaded."""


class CheckpointFileError(CheckpointError, OSError):
    """A file or model id that cannot be found or read; also an OSError, as in transformers."""


class CheckpointShapeError(CheckpointError, RuntimeError):
    """A tensor whose shape differs from the model's; also a RuntimeError, as in transformers."""


Problems = list[CheckpointError]


def raise_first(problems: Problems, path: object) -> None:
    """Raise the first problem of the checkpoint in `path`, if there is one, and say how to see the others."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        first, n_more = problems[0], len(problems) - 1
        raise type(first)(f"{first} (and {n_more} more: see them with fastgpt verify {path})") from first


# --- JSON -----------------------------------------------------------------------------------------------------------


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises CheckpointFileError when it cannot be read, CheckpointError when it is not a JSON object, repeats a key or
    has more than `limit` bytes.
    """
    return _parse_object(read_limited(path, limit), str(path))


def read_limited(path: Path, limit: int) -> bytes:
    """The content of a file. Raises CheckpointFileError when it cannot be read, CheckpointError when it is larger."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointFileError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path}: larger than {limit} bytes")
    return data


def is_hollow(status: os.stat_result) -> bool:
    """Whether most of a large file is not on the disk: a sparse file, as an interrupted download leaves it."""
    n_stored = 512 * getattr(status, "st_blocks", status.st_size)
    return status.st_size > 2**30 and 2 * n_stored < status.st_size


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    repeated: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))
        return result

    try:
        value = json.loads(data.decode(), object_pairs_hook=to_dict)
        json.dumps(value, ensure_ascii=False).encode()  # escapes may spell half a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        raise CheckpointFileError(f"{where}: not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must hold a JSON object, not {type(value).__name__}")
    if repeated:
        raise CheckpointError(f"{where}: JSON key appears more than once: {', '.join(map(shown, repeated[:5]))}")
    return value


# --- safetensors ----------------------------------------------------------------------------------------------------

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_MAX_AXES = 64  # torch's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; dtype is its name in safetensors."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_safetensors(path: Path, problems: Problems) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; faults of the file are added to `problems`."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            n_bytes = status.st_size
            n_header_bytes = int.from_bytes(file.read(8), "little")
            if n_bytes < 8:
                raise CheckpointError(f"{path}: truncated: {n_bytes} bytes cannot hold a safetensors header")
            if is_hollow(status):
                raise CheckpointFileError(f"{path}: most of its {n_bytes} bytes are not on the disk: load it again")
            if n_header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its header claims {n_header_bytes} bytes, more than the {MAX_HEADER_BYTES} allowed: "
                    "not a safetensors file, or a corrupt one"
                )
            if 8 + n_header_bytes > n_bytes:
                raise CheckpointError(f"{path}: truncated: {n_bytes} bytes cannot hold a header of {n_header_bytes}")
            header = _parse_object(file.read(n_header_bytes), f"{path}: header")
    except CheckpointError as error:
        problems.append(error)
        return {}
    except OSError as error:
        problems.append(CheckpointFileError(f"{path}: cannot be read: {error.strerror}"))
        return {}

    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(CheckpointError(f"{path}: header: '__metadata__' must map names to strings"))
    for name, entry in header.items():
        wrong = _wrong_with(entry)
        if wrong:
            problems.append(CheckpointError(f"{path}: header: tensor {shown(name)} {wrong}"))
        else:
            tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]))
            spans.append((*entry["data_offsets"], name))
    if len(tensors) == len(header):
        problems.extend(_layout_problems(path, sorted(spans), n_bytes - 8 - n_header_bytes))
    return tensors


def _wrong_with(entry: object) -> str | None:
    """What is wrong with one tensor's entry in the header; None if nothing."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"has the unknown dtype {shown(dtype)}"
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        return f"has no valid shape: {shown(shape)}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has no valid data_offsets: {shown(offsets)}"
    n_stored, n_bits = offsets[1] - offsets[0], math.prod(shape) * _BITS[dtype]
    if n_stored * 8 != n_bits:
        return f"of shape {tuple(shape)} and dtype {dtype} takes {n_bits // 8} bytes, but its offsets span {n_stored}"
    return None


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _layout_problems(path: Path, spans: list[tuple[int, int, str]], n_data_bytes: int) -> Iterator[CheckpointError]:
    """Truncation, overlaps and holes: the sorted (start, stop, name) of all tensors must cover the data once."""
    for _, stop, name in spans:
        if stop > n_data_bytes:
            yield CheckpointError(
                f"{path}: truncated: tensor {shown(name)} ends at byte {stop} of the data, which has {n_data_bytes}"
            )
            return
    end, previous = 0, ""
    for start, stop, name in spans:
        if start < end:
            yield CheckpointError(f"{path}: header: tensor {shown(name)} overlaps {previous} by {end - start} bytes")
        elif start > end:
            yield CheckpointError(f"{path}: header: hole of {start - end} bytes before tensor {shown(name)}")
        end, previous = max(end, stop), f"tensor {shown(name)}"
    if end < n_data_bytes:
        yield CheckpointError(f"{path}: {n_data_bytes - end} bytes after the last tensor belong to none")


# --- pickle ---------------------------------------------------------------------------------------------------------

# The names and shapes of a GPT-2 xl take 100 kB.
_MAX_PICKLE_BYTES = 10_000_000
# The types in a dict of tensors. Others that torch allows can allocate more memory than the file has bytes.
_PICKLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch(\.storage)? \w+Storage"
)
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_pickle(path: Path, problems: Problems) -> dict[str, StoredTensor]:
    """The tensors of a torch.save file by name; unpickling runs no code and reads no values."""
    try:
        _check_pickle(path)
        content = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        problems.append(CheckpointError(f"{path}: holds more than plain weights, or is corrupt: {one_line(error)}"))
        return {}
    if not isinstance(content, dict):
        problems.append(CheckpointError(f"{path}: must hold a dict of tensors, not {type(content).__name__}"))
        return {}
    tensors: dict[str, StoredTensor] = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = StoredTensor(path, _DTYPE_NAMES.get(value.dtype, str(value.dtype)), tuple(value.shape))
        else:
            problems.append(CheckpointError(f"{path}: entry {shown(name)} is not a tensor"))
    return tensors


def _check_pickle(path: Path) -> None:
    """Raise CheckpointError on contents that would take more memory than the file has bytes."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # as torch decides it
        file.seek(0)
        if not is_zip:
            return _check_opcodes(path, file, n_pickles=4)  # magic number, protocol, system, content
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise CheckpointError(f"{path}: entry {shown(entry.filename)} is compressed, unlike torch's own")
                if entry.filename.endswith("/data.pkl"):
                    with archive.open(entry) as content:
                        _check_opcodes(path, content, n_pickles=1)


def _check_opcodes(path: Path, file: Any, n_pickles: int) -> None:
    text = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    for _ in range(n_pickles):
        for opcode, argument, _ in pickletools.genops(text):
            if opcode.name == "GLOBAL" and not _PICKLED.fullmatch(str(argument)):
                raise CheckpointError(f"{path}: holds {shown(argument)}, which is no part of a dict of tensors")


# --- directory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """source: the weight file, or the index that names them. files: the weight files. tensors: by name, as stored."""

    source: Path
    files: list[Path] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    problems: Problems = field(default_factory=list)


def find_weights(
    directory: Path, *, use_safetensors: bool | None = None, variant: str | None = None, named: str | None = None
) -> Path:
    """The file or index that transformers would load from this directory.

    use_safetensors: pickle files are found only with False. variant: "fp16" for model.fp16.safetensors. named: the
    file's name, when the configuration fixes it.
    Raises CheckpointFileError, with the names that were tried, when there is no such file or only pickle files.
    """
    pickles = [_with_variant(name, variant) for name in PICKLE_NAMES]
    names = [_with_variant(name, variant) for name in SAFETENSORS_NAMES] if use_safetensors is not False else pickles
    if named:
        names = [named]
        if Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointFileError(f"{directory}: transformers_weights {shown(named)} is no safetensors file there")
    for name in names:
        if (directory / name).is_file():
            return directory / name
    for name in pickles:
        if (directory / name).is_file():
            raise CheckpointFileError(
                f"{directory / name}: a pickle file can run code, so it is loaded only with use_safetensors=False "
                "(save_pretrained then makes a safetensors file of it)"
            )
    raise CheckpointFileError(f"{directory}: holds no weights: looked for {' and '.join(names)}")


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def inspect_weights(source: Path) -> Checkpoint:
    """Read the headers of a weight file, or of every shard that an index names, and collect their faults."""
    checkpoint = Checkpoint(source)
    problems = checkpoint.problems
    if source.suffix != ".json":
        read = read_safetensors if source.suffix == ".safetensors" else read_pickle
        checkpoint.files.append(source)
        checkpoint.tensors.update(read(source, problems))
        return checkpoint

    suffix, read = (".safetensors", read_safetensors) if ".safetensors." in source.name else (".bin", read_pickle)
    for shard, names in _read_index(source, problems).items():
        path = source.parent / shard
        if Path(shard).name != shard or path.suffix != suffix:
            problems.append(CheckpointError(f"{source}: shard {shown(shard)} must be a {suffix} file beside the index"))
        elif not path.is_file():
            problems.append(CheckpointFileError(f"{source}: names the shard {shown(shard)}, which does not exist"))
        else:
            n_problems = len(problems)
            tensors = read(path, problems)
            absent = [name for name in names if name not in tensors] if len(problems) == n_problems else []
            problems.extend(
                CheckpointError(f"{path}: has no tensor {shown(n)}, but {source.name} says so") for n in absent
            )
            for name in tensors.keys() & checkpoint.tensors.keys():
                other = checkpoint.tensors[name].file.name
                problems.append(CheckpointError(f"{path}: tensor {shown(name)} is in {other} too"))
            checkpoint.files.append(path)
            checkpoint.tensors.update(tensors)
    return checkpoint


def _read_index(path: Path, problems: Problems) -> dict[str, list[str]]:
    """The names of the tensors in each shard."""
    shards: dict[str, list[str]] = {}
    try:
        index = read_json(path)
    except CheckpointError as error:
        problems.append(error)
        return shards
    for key in ("metadata", "weight_map"):
        if not isinstance(index.get(key), dict):
            problems.append(CheckpointError(f"{path}: needs {key!r}, a JSON object"))
            return shards
    for name, shard in index["weight_map"].items():
        if isinstance(shard, str):
            shards.setdefault(shard, []).append(name)
        else:
            problems.append(CheckpointError(f"{path}: tensor {shown(name)} must name a file, not {shown(shard)}"))
    if not shards:
        problems.append(CheckpointError(f"{path}: 'weight_map' names no tensor"))
    return shards
