"""fastgpt and transformers beside other engines on a CPU, with the same weights, interleaved.

The other engines live in processes of their own: `benchmarks/peers/cpu_engines.py` says why. What is missing is left
out, with the reason; llama-cpp-python compiles llama.cpp, which takes minutes.

pip install ctranslate2 onnxruntime onnx onnxscript openvino gguf llama-cpp-python
python -m benchmarks cpu --model gpt2 --quantized --out benchmarks/results/cpu/DATE-gpt2-peers.json
"""

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console

from fastgpt import bench as benchmark
from fastgpt.bench import plotting
from fastgpt.bench.runs import compare
from fastgpt.bench.workloads import BASELINES

from ..peers.contenders import CPU_PEERS, OUR_QUANTIZED, QUANTIZED_PEERS

# Of the engines that are installed under another name.
PACKAGES = {"llama.cpp": "llama-cpp-python"}


def main(
    out: Annotated[Path, typer.Option(help="the result, as `fastgpt bench --json` writes it")],
    model: Annotated[str, typer.Option(help="demo, a preset's name, a directory, or a Hub id")] = "gpt2",
    workload: Annotated[str, typer.Option(help="prefill, decode; comma-separated")] = "prefill,decode",
    batch: Annotated[int, typer.Option(help="sequences at a time")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the prompt")] = 512,
    new_tokens: Annotated[int, typer.Option(help="tokens that decode adds")] = 32,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, which not every engine has")] = "float32",
    baselines: Annotated[str, typer.Option(help="of transformers; comma-separated")] = ",".join(BASELINES),
    peers: Annotated[str, typer.Option(help="other engines; comma-separated")] = ",".join(CPU_PEERS),
    quantized: Annotated[
        bool, typer.Option("--quantized", help="fastgpt and the other engines with int8 and int4 weights, too")
    ] = False,
    runs: Annotated[int, typer.Option(help="timed runs of each contender")] = 7,
) -> None:
    """Compare tokens/s with transformers and other engines, after a parity check of each."""
    known = CPU_PEERS | OUR_QUANTIZED | QUANTIZED_PEERS
    names = [name for name in peers.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown peer {unknown[0]!r}: give some of {', '.join(known)}")
    names += [name for name in OUR_QUANTIZED | QUANTIZED_PEERS if quantized and name not in names]
    try:
        options = benchmark.BenchmarkOptions(
            model=model,
            workloads=workload.split(","),
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            device="cpu",
            dtype=dtype,
            baselines=baselines.split(","),
            runs=runs,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    transformers.logging.set_verbosity_error()
    with benchmark.progress_bar(Console(stderr=True)) as progress:
        result = benchmark.run_benchmark(options, progress, {name: known[name] for name in names})
    timed = {row["contender"].partition("-")[0] for row in result["results"]}
    result["versions"] |= {name: metadata.version(PACKAGES.get(name, name)) for name in CPU_PEERS if name in timed}
    result["quantized_ratios"] = quantized_ratios(result["results"])
    out.write_text(json.dumps(result, indent=2) + "\n")
    plotting.render(result, Console(width=120))


def quantized_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast fastgpt is with rounded weights as each other engine with rounded weights, by workload."""
    samples = {(row["workload"], row["contender"]): row["samples_s"] for row in rows}
    return [
        {"workload": workload, "contender": ours, "baseline": name} | compare(samples[workload, ours], taken_s)
        for (workload, name), taken_s in samples.items()
        for ours in OUR_QUANTIZED
        if name in QUANTIZED_PEERS and (workload, ours) in samples
    ]
