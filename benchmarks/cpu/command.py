"""fastgpt compared with transformers, ctranslate2 and onnxruntime on a CPU, with the same weights, interleaved.

The other engines live in processes of their own: `benchmarks/peers/cpu_engines.py` says why.

pip install ctranslate2 onnxruntime onnx onnxscript     # what is missing is left out, with the reason
python -m benchmarks cpu --model gpt2 --out benchmarks/results/cpu/DATE-gpt2-peers.json
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console

from fastgpt import bench as benchmark
from fastgpt.bench import plotting
from fastgpt.bench.workloads import BASELINES

from ..peers.contenders import CPU_PEERS


def main(
    out: Annotated[Path, typer.Option(help="the result, as `fastgpt bench --json` writes it")],
    model: Annotated[str, typer.Option(help="demo, a preset's name, a directory, or a Hub id")] = "gpt2",
    workload: Annotated[str, typer.Option(help="prefill, decode; comma-separated")] = "prefill,decode",
    batch: Annotated[int, typer.Option(help="sequences at a time")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the prompt")] = 512,
    new_tokens: Annotated[int, typer.Option(help="tokens that decode adds")] = 32,
    baselines: Annotated[str, typer.Option(help="of transformers; comma-separated")] = ",".join(BASELINES),
    peers: Annotated[str, typer.Option(help="other engines; comma-separated")] = ",".join(CPU_PEERS),
    runs: Annotated[int, typer.Option(help="timed runs of each contender")] = 7,
) -> None:
    """Compare tokens/s in float32 with transformers and other engines, after a parity check of each."""
    unknown = [name for name in peers.split(",") if name and name not in CPU_PEERS]
    if unknown:
        raise typer.BadParameter(f"unknown peer {unknown[0]!r}: give some of {', '.join(CPU_PEERS)}")
    try:
        options = benchmark.BenchmarkOptions(
            model=model,
            workloads=workload.split(","),
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            device="cpu",
            dtype="float32",
            baselines=baselines.split(","),
            runs=runs,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    transformers.logging.set_verbosity_error()
    with benchmark.progress_bar(Console(stderr=True)) as progress:
        chosen = {name: CPU_PEERS[name] for name in peers.split(",") if name}
        result = benchmark.run_benchmark(options, progress, chosen)
    timed = {row["contender"] for row in result["results"]}
    result["versions"] |= {name: metadata.version(name) for name in chosen if name in timed}
    out.write_text(json.dumps(result, indent=2) + "\n")
    plotting.render(result, Console(width=120))
