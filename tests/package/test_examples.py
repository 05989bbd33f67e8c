"""The scripts of examples/ run from a folder of their own, as a reader of the repository would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"


def run(folder: Path, *command: str) -> str:
    """Standard output of an example. TRITON_INTERPRET, which the tests set, is not what a reader has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
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
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(AssertionError, match="one window takes"):
        run(tmp_path, str(EXAMPLES / "finetune.py"), str(text))


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
    arguments = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    out = run(tmp_path, *arguments, str(EXAMPLES / "ddp.py"))
    losses = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines() if line.startswith("step ")]
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_count_parameters(tmp_path: Path):
    out = run(tmp_path, str(EXAMPLES / "count_parameters.py"))
    for total in ("124,439,808", "354,823,168", "774,030,080", "1,557,611,200"):
        assert f": {total} parameters" in out
