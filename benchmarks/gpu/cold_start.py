"""From the start of a process to its first generated token.

python -m benchmarks.gpu.cold_start FOLDER cuda bfloat16 50256,11,262     # what the process does: prints JSON
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastgpt import GPT2LMHeadModel
from fastgpt.bench.parity import ParityError

ROOT = Path(__file__).parents[2]
LIMIT_S = 300


def measure(
    folder: str, ids: list[int], device: torch.device, dtype: torch.dtype, expected: int, kernel_cache: str
) -> dict[str, float]:
    """Seconds from the start of a fresh process to the first token, and those for loading the model and for the token.

    folder: of the model. ids: the prompt. expected: the token. kernel_cache: triton's cache folder.
    Raises ParityError when the token differs, RuntimeError when the process fails, subprocess.TimeoutExpired.
    """
    name = str(dtype).removeprefix("torch.")
    prompt = ",".join(map(str, ids))
    command = [sys.executable, "-m", "benchmarks.gpu.cold_start", folder, device.type, name, prompt]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": kernel_cache}
    start = time.time()  # both processes read this clock
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if finished.returncode != 0:
        raise RuntimeError((finished.stderr.splitlines() or ["no error was printed"])[-1])
    report = json.loads(finished.stdout)
    if (token := report.pop("token")) != expected:
        raise ParityError(f"the first token of a fresh process is {token}, not {expected}")
    return {"total_s": report.pop("ended") - start} | report


def main(folder: str, device: str, dtype: str, ids: str) -> None:
    """Print what each part took, and the token."""
    start = time.perf_counter()
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()  # type: ignore[arg-type]
    loaded = time.perf_counter()
    prompt = torch.tensor([[int(token) for token in ids.split(",")]], device=device)
    token = int(model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1)[0, -1])
    seconds = {"model_s": loaded - start, "token_s": time.perf_counter() - loaded}
    print(json.dumps(seconds | {"ended": time.time(), "token": token}))


if __name__ == "__main__":
    main(*sys.argv[1:])
