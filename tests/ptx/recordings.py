"""Launches as a GPU made them, in a file, and the same machine code on this CPU beside what the GPU wrote.

    PYTHONPATH=tests:kernels python -m ptx.recordings record FILE [--only "layer_norm bf16*" ...]   # on a GPU
    PYTHONPATH=tests:kernels python -m ptx.recordings compare FILE

A recording holds the PTX, the arguments, and the bytes of every tensor before and after. Exit code of `compare`: 0 when
all bits are equal, 1 when some are not. They may differ where the hardware's approximations do (ex2.approx,
rsqrt.approx, tanh.approx) and in the order in which tensor cores and atomics add: each difference is to be explained.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from fastgpt_kernels.audit import shipped
from fastgpt_kernels.common import chip
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import executing

# Bytes that all tensors of a launch may have, so that a hundred launches are a file of a few megabytes.
MOST_BYTES = 2**20
_VOCABULARY = 1041  # as in `python -m ptx`
_DTYPES = {str(dtype): dtype for dtype in (tl.float16, tl.bfloat16, tl.float32, tl.float64)}


class _Unrecordable(Exception):
    """A launch that a recording cannot hold; the text says why."""


# --- recording ------------------------------------------------------------------------------------------------------


class Recording:
    """Launches with what they read and wrote. launches: what JSON holds of each. bytes: of storages, by name."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}  # kernel -> why
        self.bytes: dict[str, Tensor] = {}

    @contextmanager
    def listening(self, call: str, most_bytes: int = MOST_BYTES) -> Iterator[None]:
        """Record the launches of the block. call: what they are named after."""
        run = JITFunction.run

        def recorded(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            try:
                launch = {"call": call, "kernel": _name(kernel), "grid": list(grid)}
                storages = _storages(named, most_bytes)
                launch["arguments"] = {name: _described(value, storages) for name, value in named.items()}
            except _Unrecordable as why:
                self.left_out[kernel.fn.__name__] = str(why)
                return run(kernel, *arguments, grid=grid, warmup=warmup, **options)
            before = [_bytes(storage) for storage in storages]
            compiled: Any = run(kernel, *arguments, grid=grid, warmup=warmup, **options)
            for place, (storage, earlier) in enumerate(zip(storages, before, strict=True)):
                self.bytes[f"{len(self.launches)}.before.{place}"] = earlier
                self.bytes[f"{len(self.launches)}.after.{place}"] = _bytes(storage)
            self.launches.append(launch | {"target": f"sm_{compiled.metadata.target.arch}", "ptx": compiled.asm["ptx"]})
            return compiled

        with (
            mock.patch.object(JITFunction, "run", recorded),
            mock.patch("fastgpt_kernels.common.launch._triton_only_launches", return_value=False),
        ):
            yield

    def save(self, file: Path) -> None:
        save_file(self.bytes, file, {"launches": json.dumps(self.launches)})

    @classmethod
    def load(cls, file: Path) -> "Recording":
        recording = cls()
        with safe_open(file, "pt") as stored:
            recording.launches = json.loads(stored.metadata()["launches"])
            recording.bytes = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return recording


def _name(kernel: Any) -> str:
    module, name = kernel.fn.__module__, kernel.fn.__name__
    if getattr(sys.modules[module], name, None) is not kernel:
        raise _Unrecordable(f"{module} does not hold it by its name")
    return f"{module}:{name}"


def _tensor(value: Any) -> Tensor | None:
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value if isinstance(value, Tensor) else None


def _storages(named: dict[str, Any], most_bytes: int) -> list[Any]:
    """The storages of all tensors, each once."""
    tensors = [tensor for tensor in map(_tensor, named.values()) if tensor is not None]
    storages = list({tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values())
    n_bytes = sum(storage.nbytes() for storage in storages)
    if n_bytes > most_bytes:
        raise _Unrecordable(f"its tensors have {n_bytes} bytes")
    return storages


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().clone()


def _described(value: Any, storages: list[Any]) -> Any:
    """An argument as JSON holds it."""
    tensor = _tensor(value)
    if tensor is not None:
        places = [storage.data_ptr() for storage in storages]
        described = {
            "storage": places.index(tensor.untyped_storage().data_ptr()),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "strides": list(tensor.stride()),
            "offset": tensor.storage_offset(),
        }
        fields = {} if value is tensor else {name: x for name, x in vars(value).items() if name != "base"}
        return described | ({"descriptor": fields} if fields else {})
    if isinstance(value, tl.dtype):
        return {"triton": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Unrecordable(f"an argument is a {type(value).__name__}")


# --- the same on a CPU ----------------------------------------------------------------------------------------------


def differences(recording: Recording) -> Iterator[tuple[dict[str, Any], dict[int, int]]]:
    """Each launch, with the number of bytes that differ in each storage where some do."""
    for number, launch in enumerate(recording.launches):
        storages = []
        while (before := recording.bytes.get(f"{number}.before.{len(storages)}")) is not None:
            storages.append(before.clone())
        module, name = launch["kernel"].split(":")
        kernel = getattr(import_module(module), name)
        arguments = {name: _restored(value, storages) for name, value in launch["arguments"].items()}
        # The recorded machine code, whatever triton makes of the kernel today.
        with executing(launch["target"], edit=lambda _, text, recorded=launch["ptx"]: recorded or text):
            kernel[tuple(launch["grid"])](**arguments)
        after = [recording.bytes[f"{number}.after.{place}"] for place in range(len(storages))]
        unequal = {place: int((a != b).sum()) for place, (a, b) in enumerate(zip(after, storages, strict=True))}
        yield launch, {place: n for place, n in unequal.items() if n}


def _restored(value: Any, storages: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "triton" in value:
        return _DTYPES[value["triton"]]
    storage = storages[value["storage"]].untyped_storage()
    tensor = torch.empty(0, dtype=getattr(torch, value["dtype"]))
    tensor.set_(storage, value["offset"], value["shape"], value["strides"])  # type: ignore[call-overload]
    return TensorDescriptor(tensor, **value["descriptor"]) if "descriptor" in value else tensor


# --- the command ----------------------------------------------------------------------------------------------------


def record(only: list[str], device: torch.device) -> Recording:
    """The launches of the calls that ship, whose names match."""
    recording = Recording()
    shipped._VOCABULARY = _VOCABULARY
    torch.manual_seed(0)
    with device:
        for call in shipped.calls(chip.architecture(device)):
            name = f"{call.operation} {call.label}"
            if any(fnmatchcase(name, pattern) for pattern in only):
                with recording.listening(name):
                    call.run()
    return recording


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx.recordings", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], help='by operation and label, such as "layer_norm bf16*"')
    options = parser.parse_args()
    if options.what == "record":
        recording = record(options.only, torch.device("cuda", torch.cuda.current_device()))
        recording.save(options.file)
        print(json.dumps({"launches": len(recording.launches), "left out": recording.left_out}, indent=1))
        return 0
    n_unequal = 0
    for launch, unequal in differences(Recording.load(options.file)):
        n_unequal += bool(unequal)
        found = ", ".join(f"{n} bytes of storage {place} differ" for place, n in unequal.items())
        print(f"{launch['call']}: {launch['kernel'].partition(':')[2]}: {found or 'the same bits'}", flush=True)
    return 1 if n_unequal else 0


if __name__ == "__main__":
    sys.exit(main())
