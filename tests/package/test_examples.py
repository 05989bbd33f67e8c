"""The scripts of examples/ run from a folder of their own, as a reader of the repository would run them."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from models import token_ids
from paths import ROOT
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import fastgpt

EXAMPLES = ROOT / "examples"
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


def finish(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """An example at its end. TRITON_INTERPRET, which the tests set, is not what a reader has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    environment |= variables
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def run(folder: Path, *command: str) -> str:
    """Standard output of an example that ends well."""
    done = finish(folder, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tried_here():
    tried = Path(__file__).read_text()
    assert all(f'"{example.name}"' in tried for example in EXAMPLES.glob("*.py"))


def test_generate(tmp_path: Path):
    out = run(tmp_path, str(EXAMPLES / "generate.py"))
    greedy, streamed = out.split("greedy:\nROMEO:")[1].split("\n\nsampled:")[0], out.split("streamed:\n")[1]
    assert greedy.strip() == streamed.strip() != ""
    assert out.count("row ") == 2


def test_finetune(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text() * 20)  # far from what the demo was trained on
    out = run(tmp_path, str(EXAMPLES / "finetune.py"), str(text), "--steps", "6", "--batch", "2")
    first, last = out.split("loss ")[-1].split(";")[0].split(" -> ")
    assert float(last) < float(first)
    assert (tmp_path / "finetuned" / "model.safetensors").is_file()


def test_finetune_refuses_a_short_text(tmp_path: Path):
    """In a locale without UTF-8 it reads the text all the same."""
    text = tmp_path / "short.txt"
    text.write_text("trop br\u00e8ve", encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = finish(tmp_path, str(EXAMPLES / "finetune.py"), str(text), **locale)
    assert done.returncode != 0
    assert "one window takes" in done.stderr
    assert "Traceback" not in done.stderr


def test_patch_peft(tmp_path: Path):
    out = run(tmp_path, str(EXAMPLES / "patch_peft.py"))
    losses = next(line for line in out.splitlines() if line.startswith("loss ")).removeprefix("loss ").split(" -> ")
    assert float(losses[1]) < float(losses[0])
    assert "To be," in out


def test_one_kernel(tmp_path: Path):
    out = run(tmp_path, str(EXAMPLES / "one_kernel.py"))
    assert "(2, 12, 100, 64)" in out
    assert "padding gets no gradient: True" in out


def test_ddp(tmp_path: Path):
    losses = list(losses_of(run(tmp_path, *TORCHRUN, str(EXAMPLES / "ddp.py"))).values())
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def losses_of(out: str) -> dict[int, str]:
    """The loss that was printed for each step."""
    return {int(step): loss for step, loss in re.findall(r"^step (\d+): loss (\S+)", out, re.MULTILINE)}


def test_count_parameters(tmp_path: Path):
    out = run(tmp_path, str(EXAMPLES / "count_parameters.py"))
    for total in ("124,439,808", "354,823,168", "774,030,080", "1,557,611,200"):
        assert f": {total} parameters" in out


# --- sharded training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """A sharded run that nothing disturbed: its folder and its losses."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder / "sharded", losses_of(run(folder, *TORCHRUN, str(EXAMPLES / "fsdp.py")))


def test_fsdp(sharded: tuple[Path, dict[int, str]], tmp_path: Path):
    """It learns, and stock transformers reads what it saves: the whole model, and a checkpoint that torch joins."""
    out, losses = sharded
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert float(losses[6]) < float(losses[1]) / 2
    stock = transformers.GPT2LMHeadModel.from_pretrained(out).eval()
    dcp_to_torch_save(out / "step-6", tmp_path / "joined.pt")
    joined = transformers.GPT2LMHeadModel(stock.config).eval()
    joined.load_state_dict(torch.load(tmp_path / "joined.pt")["model"])
    ids = token_ids(2, 20, stock.config.vocab_size)
    logits = stock(ids).logits
    assert torch.equal(joined(ids).logits, logits)
    torch.testing.assert_close(fastgpt.GPT2LMHeadModel.from_pretrained(out).eval()(ids).logits, logits)
    assert not torch.allclose(fastgpt.load_demo()[0](ids).logits, logits, rtol=0.1)


DYING = """
import os, runpy, signal
import torch.distributed.checkpoint as dcp

save, saved = dcp.FileSystemWriter.write_data, []
def die(self, *plan):
    saved.append(self)
    if os.environ["RANK"] == "1" and len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, *plan)
dcp.FileSystemWriter.write_data = die
runpy.run_path({example!r}, run_name="__main__")
"""


def test_a_killed_process_ends_the_other_and_the_last_checkpoint_goes_on_bitwise(
    sharded: tuple[Path, dict[int, str]], tmp_path: Path
):
    """It is killed while both save their part of the checkpoint of step 4."""
    dying, out, (whole, losses) = tmp_path / "dying.py", tmp_path / "sharded", sharded
    dying.write_text(DYING.format(example=str(EXAMPLES / "fsdp.py")))
    # Not by torchrun, which would end the other process itself.
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}
    with ThreadPoolExecutor() as pool:
        ends = pool.map(lambda rank: finish(tmp_path, str(dying), **place, RANK=rank), "01")
    survivor, killed = ends
    assert killed.returncode == -signal.SIGKILL
    assert survivor.returncode == 1
    # The system words it as closed, reset or a broken pipe, by what the survivor was doing.
    assert "gloo/transport/tcp" in survivor.stderr
    assert (out / "step-4").is_dir()
    assert not (out / "step-4" / ".metadata").exists()
    assert not (out / "model.safetensors").exists()

    resumed = losses_of(run(tmp_path, *TORCHRUN, str(EXAMPLES / "fsdp.py")))
    assert resumed == {step: losses[step] for step in (3, 4, 5, 6)}
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
