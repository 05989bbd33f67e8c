"""Where a model is looked for, and the one line that says why none was found: directories, the hub, its cache."""

import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from checkpoints import KEY, load, refused, rewrite, same_tensors
from huggingface_hub import constants

from fastgpt.checkpoint import loading
from fastgpt.checkpoint.headers import CheckpointFileError

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


def test_directory_without_weights(saved):
    (saved / "model.safetensors").unlink()
    refused(saved, saved, "model.safetensors and model.safetensors.index.json", error=OSError)
    refused(saved, "pytorch_model.bin", use_safetensors=False)
    refused(saved, "model.fp16.safetensors", variant="fp16")


def test_empty_directory(tmp_path):
    refused(tmp_path, "config.json", "model.safetensors", error=OSError)


def test_weight_file_is_no_directory(pristine):
    refused(pristine / "model.safetensors", pristine / "model.safetensors", "give the directory", error=OSError)


@pytest.mark.parametrize("path", ["./no/such/directory", "/no/such/directory", Path("no") / "such" / "directory", "\0"])
def test_path_that_does_not_exist(path):
    refused(path, repr(str(path)), "--model demo", error=CheckpointFileError)


def test_overlong_name():
    refused("x" * 5000, "'xxx", error=CheckpointFileError)


def test_offline_mode_is_named(tmp_path):
    refused(
        "nobody/nothing", "'nobody/nothing'", "not asked (HF_HUB_OFFLINE", tmp_path, "--model demo", cache_dir=tmp_path
    )


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return monkeypatch


@pytest.fixture
def silent_server():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_unreachable_hub_fails_fast(online, tmp_path, silent_server):
    online.setattr(loading, "HUB_TIMEOUT_S", 0.2)
    for endpoint in ("http://127.0.0.1:1", silent_server):
        online.setattr(constants, "ENDPOINT", endpoint)
        start = time.perf_counter()
        refused("nobody/nothing", endpoint, "cannot be reached", "directory", "--model demo", cache_dir=tmp_path)
        assert time.perf_counter() - start < 3


class EmptyHub(BaseHTTPRequestHandler):
    """A hub that is well and holds no model."""

    def do_HEAD(self):
        is_front_page = self.path == "/"
        self.send_response(200 if is_front_page else 404)
        if not is_front_page:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_model_that_the_hub_does_not_have(online, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        online.setattr(constants, "ENDPOINT", endpoint)
        online.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        refused("nobody/nothing", "'nobody/nothing'", f"{endpoint} gave", "--model demo", cache_dir=tmp_path)
        server.shutdown()


def test_local_files_only_asks_nobody(online, tmp_path):
    online.setattr(loading, "_why_unreachable", pytest.fail)
    refused("nobody/nothing", "local_files_only", local_files_only=True, cache_dir=tmp_path)


@pytest.fixture
def cached(saved, tmp_path) -> tuple[Path, Path]:
    """(cache, snapshot) in which somebody/model was downloaded before."""
    commit, repository = "0" * 40, tmp_path / "cache" / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = shutil.copytree(saved, repository / "snapshots" / commit)
    return tmp_path / "cache", snapshot


def test_cached_model_loads_when_the_hub_cannot_be_reached(online, cached, language_model):
    online.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    model = load("somebody/model", cache_dir=cached[0])
    assert same_tensors(model.state_dict(), language_model.state_dict())


def test_cached_model_is_checked_after_loading(cached):
    cache, snapshot = cached
    file = snapshot / "model.safetensors"
    content = file.read_bytes()
    for change, fragment in [
        (lambda tensors: tensors.pop(KEY), KEY.removeprefix("transformer.")),
        (lambda tensors: tensors.update({KEY: torch.zeros(64, 255)}), "(64, 255)"),
        (lambda tensors: tensors[KEY].fill_(float("nan")), "NaN"),
    ]:
        file.write_bytes(content)
        rewrite(file, change)
        refused("somebody/model", "somebody/model", KEY.removeprefix("transformer."), fragment, cache_dir=cache)
    file.write_bytes(content[:-1])
    refused("somebody/model", "somebody/model", cache_dir=cache)
    file.rename(snapshot / "pytorch_model.bin")
    refused("somebody/model", "model.safetensors", cache_dir=cache)
