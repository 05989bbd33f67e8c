"""Strict loading: a checkpoint that does not fit its model raises an error of one line with the file and the tensor.

`LoadingMixin.from_pretrained` calls transformers' own. It checks the headers of local files before and the loaded model
after. For a model id there is only the second check.
"""

import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Self

from huggingface_hub import constants, get_session, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_peft_available

from ..messages import one_line, shown
from .blame import faulty_key, find_fault
from .fit import (
    OLD_BUFFER,
    PREFIX,
    body_shapes,
    by_model_name,
    config_problems,
    field_problems,
    head_shapes,
    missing,
    name_problems,
    not_finite,
    rounding_of,
    shape_problems,
)
from .headers import (
    Checkpoint,
    CheckpointError,
    CheckpointFileError,
    CheckpointShapeError,
    find_weights,
    inspect_weights,
    raise_first,
    read_json,
)

HUB_TIMEOUT_S = 3.0
# JSON files besides config.json that transformers reads with a model.
OTHER_CONFIGURATIONS = "generation_config.json", "adapter_config.json"


def load_without_code(auto_class: Any, name: str, **options: Any) -> Any:
    """auto_class.from_pretrained(name) that neither runs nor offers to run Python code in the checkpoint.

    auto_class: AutoTokenizer, AutoConfig, ... Raises CheckpointError when only such code can load it.
    """
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        kind = auto_class.__name__.removeprefix("Auto").lower()
        raise CheckpointError(f"{name}: its {kind} is Python code of the checkpoint, and fastgpt runs none") from error


class LoadingMixin:
    """The from_pretrained of fastgpt's classes; must precede transformers' class among their bases."""

    _keys_to_ignore_on_load_unexpected = [OLD_BUFFER]  # noqa: RUF012 (the form that transformers reads)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, check_finite: bool = True, **kwargs: Any
    ) -> Self:
        """transformers' from_pretrained with all its arguments and results, but it refuses broken checkpoints.

        pretrained_model_name_or_path: a directory, a model id, or None with state_dict=.
        check_finite: refuse weights that hold NaN or Inf.
        use_safetensors: False loads pickle files, and only plain weights in them; otherwise they are refused.
        No Python code of the checkpoint runs: trust_remote_code=True is refused.
        Raises CheckpointError, a ValueError. As in transformers, it is also an OSError when something cannot be found
        or read, and a RuntimeError when a shape differs.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info, problems = cls.load_with_problems(
            pretrained_model_name_or_path, *model_args, check_finite=check_finite, **kwargs
        )
        for problem in problems:
            raise problem
        return (model, info) if wants_info else model  # type: ignore[return-value]

    @classmethod
    def _load_from_fields(cls, fields: dict[str, Any]) -> Any:
        """A model with new weights, built through the same path as a loaded one."""
        config = cls.config_class.from_dict(fields)  # type: ignore[attr-defined]
        return super().from_pretrained(None, config=config, state_dict={}, trust_remote_code=False)  # type: ignore[misc]

    @classmethod
    def load_with_problems(
        cls, path: Any, *model_args: Any, check_finite: bool = True, **kwargs: Any
    ) -> tuple[Any, dict[str, Any], Iterator[CheckpointError]]:
        """Like `from_pretrained`, but returns (model, transformers' loading info, problems of the loaded model).

        Raises when the model cannot be loaded.
        """
        if kwargs.get("weights_only") is False:
            raise ValueError("weights_only=False lets a pickle file run code: fastgpt loads weights only")
        if kwargs.get("trust_remote_code"):
            raise ValueError("trust_remote_code=True lets a checkpoint run code: fastgpt runs none")
        kwargs["trust_remote_code"] = False
        checkpoint, unreachable, directory = None, None, None
        is_from_memory = path is None and kwargs.get("state_dict") is not None
        source = None if is_from_memory or kwargs.get("gguf_file") else _source(path, kwargs)
        model_id = None if source is None or os.path.exists(source) else source
        if model_id is not None:
            unreachable, kwargs = _prepare_hub(model_id, kwargs)
        elif source is not None:
            directory = Path(source) / (kwargs.get("subfolder") or "")
            checkpoint = _inspect(cls, Path(source), kwargs)
            if checkpoint is None:
                kwargs = {"use_safetensors": True} | kwargs

        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            # The loading info names the tensors of wrong shape; the error of transformers does not.
            model, info = super().from_pretrained(  # type: ignore[misc]
                path, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {one_line(error)}") from error
        except Exception as error:
            if model_id is not None and isinstance(error, OSError):
                cache = kwargs.get("cache_dir") or constants.HF_HUB_CACHE
                answer = unreachable or f"{constants.ENDPOINT} gave no model: {one_line(error)}"
                tried = f"no such directory, nothing usable in the cache {cache}, {answer}"
                raise _no_model(model_id, tried) from error
            # Any error may come from the files. If it does not, it comes from the arguments of the call.
            fault = None if directory is None else find_fault(cls._load_from_fields, directory, error)
            if fault is None:
                raise
            raise fault from error

        problems = _loaded_problems(
            model,
            info,
            path,
            checkpoint,
            ignore_missing=kwargs.get("state_dict") == {},  # asks transformers for new weights
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            check_finite=check_finite,
        )
        return model, info, problems


def _loaded_problems(
    model: Any,
    info: dict[str, Any],
    path: Any,
    checkpoint: Checkpoint | None,
    *,
    ignore_missing: bool,
    ignore_mismatched_sizes: bool,
    check_finite: bool,
) -> Iterator[CheckpointError]:
    """Problems that the headers did not show. info: transformers' loading info."""
    stored = by_model_name(checkpoint) if checkpoint else {}

    def origin(name: str) -> Any:
        tensor = stored.get(name.removeprefix(PREFIX))
        return tensor.file if tensor else path

    if not ignore_missing:
        architecture, absent = type(model).__name__, {name.removeprefix(PREFIX) for name in info["missing_keys"]}
        named = {name for name, _ in body_shapes(model.config)} | head_shapes(architecture, model.config).keys()
        for name in missing(named - absent, model.config, architecture):
            yield CheckpointError(f"{path}: has no tensor {name!r}, which the configuration asks for")
    if not ignore_mismatched_sizes:
        for name, shape, expected in sorted(info["mismatched_keys"]):
            yield CheckpointShapeError(
                f"{origin(name)}: tensor {name!r} has shape {tuple(shape)}, "
                f"but the configuration asks for {tuple(expected)}"
            )
    if check_finite:
        tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        # In a thread of its own, because torch's operations on several cores do not return in a process that is forked
        # from a thread that ran one: a server may load a model and then fork its workers.
        with ThreadPoolExecutor(max_workers=1) as thread:
            all_found = thread.map(not_finite, tensors.values())
        for (name, tensor), found in zip(tensors.items(), all_found, strict=True):
            if found:
                yield CheckpointError(
                    f"{origin(name)}: tensor {name!r} holds {found} as {tensor.dtype}; "
                    "check_finite=False loads it all the same"
                )


# --- local files ----------------------------------------------------------------------------------------------------


def _source(path: Any, kwargs: dict[str, Any]) -> str:
    """Where the weights come from: `path`, or the base model that the adapter there was trained on."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected a directory or a model id, not {type(path).__name__}")
    if not os.path.isdir(path) or (Path(path) / "config.json").exists():
        return os.fspath(path)
    adapter = Path(path) / (kwargs.get("subfolder") or "") / "adapter_config.json"
    if not adapter.is_file() or not is_peft_available():
        return os.fspath(path)
    base = read_json(adapter).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise CheckpointError(f"{adapter}: base_model_name_or_path must name a model, not {shown(base)}")
    return base


def _inspect(model_class: Any, path: Path, kwargs: dict[str, Any]) -> Checkpoint | None:
    """Check the files that transformers is about to load; None where only transformers can read them."""
    if not path.is_dir():
        raise CheckpointFileError(f"{path}: is a file: give the directory that holds it and config.json")
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        file = _config_file(path, kwargs)
        config = None if file is None else read_config(model_class.config_class, file, kwargs)
        if config is not None:
            raise_first([CheckpointError(f"{file}: {problem}") for problem in config_problems(config)], path)
    directory = path / (kwargs.get("subfolder") or "")
    for name in OTHER_CONFIGURATIONS:
        if (directory / name).is_file():
            read_json(directory / name)
    if any(directory.glob("shard-*-model-*.safetensors")):
        return None  # torch's distributed format, which transformers loads strictly
    checkpoint = inspect_weights(
        find_weights(
            directory,
            use_safetensors=kwargs.get("use_safetensors"),
            variant=kwargs.get("variant"),
            named=getattr(config, "transformers_weights", None),
        )
    )
    raise_first(checkpoint.problems, path)
    # These change the names of the stored tensors, or their shapes and dtypes.
    if config is None or kwargs.get("key_mapping"):
        return checkpoint
    if getattr(config, "quantization_config", None) is None or rounding_of(config):
        # A user's subclass may have other heads.
        is_own = model_class.__module__.partition(".")[0] == __name__.partition(".")[0]
        architecture = model_class.__name__ if is_own else ""
        ignore_mismatched_sizes = kwargs.get("ignore_mismatched_sizes", False)
        problems = chain(
            name_problems(checkpoint, config, architecture),
            shape_problems(checkpoint, config, architecture, ignore_mismatched_sizes=ignore_mismatched_sizes),
        )
        raise_first(list(problems), path)
    return checkpoint


def _config_file(path: Path, kwargs: dict[str, Any]) -> Path | None:
    """The file that transformers will read the configuration from; None when it is on a hub."""
    given = kwargs.get("config")
    if given is not None and not Path(given).exists():
        return None
    source = Path(given or path)
    return source if source.is_file() else source / (kwargs.get("subfolder") or "") / "config.json"


def read_config(config_class: Any, file: Path, changes: dict[str, Any]) -> PreTrainedConfig:
    """The configuration in a file. changes: fields that differ (num_labels=3); other names are ignored.

    Raises CheckpointError when the file is absent or damaged, or its fields have wrong types.
    """
    if not file.is_file():
        raise CheckpointFileError(f"{file}: does not exist: a model directory holds config.json and model.safetensors")
    written = read_json(file)
    raise_first([CheckpointError(f"{file}: {problem}") for problem in field_problems(written)], file.parent)
    fields = vars(config_class()).keys() | config_class.attribute_map.keys() | {"num_labels"}
    changes = {name: value for name, value in changes.items() if name in fields - {"dtype"}}
    try:
        return config_class.from_pretrained(file, **changes)
    except Exception as error:  # fields of a wrong type reach code that does not check them
        key = faulty_key(written, config_class.from_dict)
        where = "" if key is None else f"{key} {shown(written[key])}: "
        raise CheckpointError(
            f"{file}: describes no {config_class.model_type} model: {where}{one_line(error)}"
        ) from error


# --- model ids ------------------------------------------------------------------------------------------------------


def _prepare_hub(model_id: str, kwargs: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Why the hub is not asked, or None, and the arguments to load with; then they allow only the cache."""
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        raise _no_model(model_id, "no such directory, and no model id has this form") from None
    if kwargs.get("use_safetensors") is None:
        kwargs = kwargs | {"use_safetensors": True}
    if is_offline_mode():
        return f"{constants.ENDPOINT} was not asked (HF_HUB_OFFLINE is set)", kwargs
    if kwargs.get("local_files_only"):
        return f"{constants.ENDPOINT} was not asked (local_files_only=True)", kwargs
    reason = None if kwargs.get("proxies") else _why_unreachable(constants.ENDPOINT)
    if reason is None:
        return None, kwargs
    return f"{constants.ENDPOINT} cannot be reached ({reason})", kwargs | {"local_files_only": True}


def _why_unreachable(url: str) -> str | None:
    """Why a server does not answer within seconds, or None. transformers would retry for most of a minute."""
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            get_session().head(url, timeout=HUB_TIMEOUT_S)
            answers.put(None)
        except Exception as error:  # the HTTP library differs between releases of huggingface_hub
            answers.put(one_line(error))

    # In a thread, because looking up a host name can take long and has no timeout.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=HUB_TIMEOUT_S + 1)
    except queue.Empty:
        return f"no answer in {HUB_TIMEOUT_S:g} s"


def _no_model(model_id: str, tried: str) -> CheckpointFileError:
    return CheckpointFileError(
        f"cannot load {shown(model_id)}: {tried}; give a directory that holds config.json and model.safetensors, or "
        "use the model 'demo' (--model demo, fastgpt.load_demo()), which works offline"
    )
