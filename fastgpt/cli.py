"""The command line. Results go to standard output, progress and notes to standard error.

Exit codes: 0 done, 1 the work failed, 2 wrong usage. An error is one line; --debug adds the traceback.
"""

import shlex
import sys
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import __version__, accounting, measured, ops
from . import bench as benchmark
from . import doctor as checks
from .accounting.tables import render
from .bench import profiling
from .corpus import pack, read_text, text_files
from .evaluation import evaluate_text, settle_windows
from .generate import options as sampling
from .load import device_and_dtype, load_model_and_tokenizer
from .progress import progress_bar, without_transformers_bars
from .terminal import (
    Interrupted,
    check_outputs,
    check_text,
    chosen_bits,
    notes,
    numbers,
    path,
    print_json,
    run,
    strict_json,
    tables,
    words,
    write_now,
    wrong_usage,
)
from .text import stream_text
from .verify import verify_checkpoint

app = typer.Typer(
    help="GPT-2 with Hugging Face weights on fused Triton kernels, and on plain torch where there is no GPU.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="demo, a Hugging Face id, or a directory with config.json and weights.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU, if there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; by default float32 on a CPU and bfloat16 on a GPU.")
]
Int8 = Annotated[bool, typer.Option("--int8", help="Quantize the weights of the blocks to int8, in memory.")]
Int4 = Annotated[bool, typer.Option("--int4", help="Quantize them to int4, in groups of 64.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of text.")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"fastgpt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of every command; --debug may come anywhere."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Model = "demo",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k most likely tokens; 0 for all.")] = 50,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample among the most likely tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(min=-(2**63), max=2**64 - 1, help="The same seed gives the same text; by default one is drawn."),
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(min=1, help="Propose up to this many tokens by prompt lookup: the same text, often sooner."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    int8: Int8 = False,
    int4: Int4 = False,
    as_json: AsJson = False,
) -> None:
    """Continue a text, streaming it as it comes; tokens/s go to standard error."""
    with wrong_usage():
        device_and_dtype(device, dtype)
        ops.selected_backend()
        sampling.check_sampling_options(temperature=temperature or None, top_p=top_p)
        check_text(prompt)
        bits = chosen_bits(int8, int4)
    result = stream_text(
        prompt,
        model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        prompt_lookup=prompt_lookup,
        device=device,
        dtype=dtype,
        bits=bits,
        write=None if as_json else write_now,
    )
    if as_json:
        print_json(result.as_dict())
    print(result.summary(), file=sys.stderr)


@app.command()
def bench(
    model: Model = "gpt2",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build the model from its configuration alone.")
    ] = False,
    workload: Annotated[str, typer.Option(help="prefill, decode, train; comma-separated.")] = "prefill,decode",
    batch: Annotated[str, typer.Option(help="Sequences at a time; comma-separated.")] = "1",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt or training sequence.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that decode generates.")] = 32,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16; comma-separated; by default float32 on a CPU and bfloat16 on a GPU."
        ),
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="hf-eager, hf-sdpa, hf-compile; comma-separated.")
    ] = "hf-eager,hf-sdpa",
    runs: Annotated[int, typer.Option(min=5, help="Timed runs of each contender.")] = 7,
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=path, help="Write the result to this file.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", parser=path, help="Draw the result as a PNG.")] = None,
    profile_file: Annotated[
        Path | None,
        typer.Option("--profile", parser=path, help="Trace one run of each workload, for chrome://tracing."),
    ] = None,
) -> None:
    """Measure tokens/s compared with transformers on the same weights, after a parity check."""
    with wrong_usage():
        ops.selected_backend()
        series = [
            benchmark.BenchmarkOptions(
                model=model,
                random_weights=random_weights,
                workloads=workload.split(","),
                batch=n_batch,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                device=device,
                dtype=name,
                baselines=baselines.split(","),
                runs=runs,
            )
            for name in (words(dtype) if dtype is not None else [None])
            for n_batch in numbers("--batch", batch)
        ]
    if profile_file is not None and len(series) > 1:
        raise typer.BadParameter("--profile takes one dtype and one batch size")
    if plot_file is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install matplotlib")
    check_outputs({"--json": json_file, "--plot": plot_file, "--profile": profile_file})
    with progress_bar(notes) as progress:
        results = benchmark.run_series(series, progress)
    try:
        if json_file is not None:
            json_file.write_text(strict_json(benchmark.bring_together(results)) + "\n")
        if plot_file is not None:
            benchmark.plot(results, plot_file)
    finally:  # A full disk does not cost the tables, nor a closed pipe the files.
        for result in results:
            benchmark.render(result, tables())
    if profile_file is not None:
        profiling.render(profiling.profile(series[0], profile_file), notes)


@app.command("eval")
def evaluate(
    file: Annotated[Path, typer.Argument(parser=path, help="The text, in UTF-8.")],
    model: Model = "demo",
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a window; by default the model's whole context."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens from the start of a window to the next; by default half a window."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    int8: Int8 = False,
    int4: Int4 = False,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts a text: loss, perplexity and bits per byte over a sliding window."""
    with wrong_usage():
        device_and_dtype(device, dtype)
        ops.selected_backend()
        text = read_text(file)
        bits = chosen_bits(int8, int4)
    network, tokenizer = load_model_and_tokenizer(model, device, dtype, bits=bits)
    with wrong_usage():
        context, stride = settle_windows(network.config.n_positions, context, stride)
    with progress_bar(notes) as progress:
        result = evaluate_text(text, network, tokenizer, context=context, stride=stride, batch=batch, progress=progress)
    if as_json:
        print_json(asdict(result))
    else:
        print(result.result())
    print(result.speed(), file=sys.stderr)


@app.command()
def train(
    invocation: typer.Context,
    text: Annotated[
        Path,
        typer.Argument(parser=path, help="A text file in UTF-8, or a directory whose *.txt files are taken in order."),
    ],
    out: Annotated[
        Path, typer.Option(parser=path, help="Folder of the run: the model, checkpoints, log.jsonl and loss.png.")
    ],
    model: Model = "demo",
    validation: Annotated[
        Path | None,
        typer.Option(parser=path, help="A validation text; by default the end of the text is held out."),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(help="Share of the text that is held out, at its end, without --validation."),
    ] = 0.05,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence; by default the model's whole context."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Epochs: passes over the text.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Steps to train for, instead of --epochs.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients are accumulated for one step.")] = 1,
    learning_rate: Annotated[
        float, typer.Option(help="The peak, after a warm-up of 5% of the steps; a cosine decays it to 0.")
    ] = 1e-4,
    weight_decay: Annotated[float, typer.Option(help="The weight decay of AdamW.")] = 0.1,
    every: Annotated[
        int | None, typer.Option(help="Steps between evaluations, each with a checkpoint; by default a tenth of all.")
    ] = None,
    keep: Annotated[int, typer.Option(help="How many checkpoints to keep, the newest.")] = 2,
    seed: Annotated[int, typer.Option(help="The seed of the order of sequences and of dropout.")] = 0,
    recompute: Annotated[
        str, typer.Option(help="What backward computes again to save memory: nothing, norms or blocks.")
    ] = "nothing",
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out from its last checkpoint.")] = False,
    device: Device = None,
) -> None:
    """Fine-tune a model on text with transformers' Trainer. Ctrl-C saves a checkpoint to --resume from."""
    if find_spec("accelerate") is None:
        raise typer.BadParameter("training needs accelerate: pip install accelerate")
    from . import train as training  # It imports accelerate.

    with wrong_usage():
        settings = training.Settings(
            context=context,
            epochs=epochs,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            every=every,
            keep=keep,
            seed=seed,
            recompute=recompute,
        )
        torch_device, _ = device_and_dtype(device)
        ops.selected_backend()
        texts = [read_text(file) for file in text_files(text)]
        measured = None if validation is None else read_text(validation)
        training.check_folder(out, resume)
    network, tokenizer = load_model_and_tokenizer(model, "cpu", "float32")
    with progress_bar(notes) as progress:
        with wrong_usage():
            context, _ = settle_windows(network.config.n_positions, context)
            corpus = pack(texts, tokenizer, context, held_out=held_out, validation=measured, progress=progress)
        outcome = training.fine_tune(
            network,
            tokenizer,
            corpus,
            out,
            settings,
            name=model,
            device=torch_device,
            resume=resume,
            say=partial(notes.print, soft_wrap=True),
            progress=progress,
        )
    if outcome.step < outcome.n_steps:
        said = invocation.obj if resume else [invocation.obj[0], "--resume", *invocation.obj[1:]]  # before any "--"
        again = shlex.join(["fastgpt", *said])
        message = f"interrupted and saved at step {outcome.step} of {outcome.n_steps}; to go on: {again}"
        raise Interrupted(message, code=128 + (outcome.signal or 0))
    print(f"validation loss {outcome.loss:.4f}: written to {out}; try: fastgpt generate 'Once' --model {out}")


@app.command()
def params(
    name: Annotated[str, typer.Argument(help="A preset (gpt2, gpt2-xl, gpt3-175b, ...), demo, or a directory.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time, for memory and decoding.")] = 1,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context; n_positions by default.")] = None,
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth in bytes/s, for the ceilings.")] = 4.3e12,
    matrix_rate: Annotated[float, typer.Option(help="Matrix rate in FLOP/s, for the ceilings.")] = 7.9e14,
    as_json: AsJson = False,
) -> None:
    """Count parameters, storage, FLOPs and the physical limits of a model, from its configuration alone."""
    accounting.count_parameters(name)  # outside, because a fault of the model is not wrong usage
    with wrong_usage():
        report = accounting.report(name, bandwidth=bandwidth, matrix_rate=matrix_rate, batch=batch, context=context)
    if as_json:
        print_json(report)
    else:
        render(report, tables())


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(parser=path, help="A directory with config.json and weights.")],
    as_json: AsJson = False,
) -> None:
    """Check a checkpoint: its files, then that it loads and runs; and print the sha256 of its files."""
    with without_transformers_bars(), notes.status("checking") as status:
        report = verify_checkpoint(directory, tell=status.update)
    if as_json:
        print_json(asdict(report))
    else:
        for file, sha256 in report.files.items():
            print(f"{sha256}  {file}")
        for problem in report.problems:
            print(f"problem: {problem}")
        for warning in report.warnings:
            print(f"warning: {warning}")
        n_problems = len(report.problems)
        verdict = f"{n_problems} problem{'s' * (n_problems > 1)}" if report.problems else "sound"
        print(f"{directory}: {report.n_parameters:,} parameters, {', '.join(report.dtypes) or 'no weights'}, {verdict}")
    if report.problems:
        raise typer.Exit(1)


@app.command()
def doctor(
    device: Device = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="First time each operation's kernel and torch form, for `auto` to follow.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --measure: a preset's name, or a directory; gpt2 by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, the device, which backend every operation takes and why, and check parity here."""
    with wrong_usage():
        torch_device, _ = device_and_dtype(device)
    if model is not None and not measure:
        raise typer.BadParameter("--model is what --measure times: give both")
    if measure:
        _measure(model or "gpt2", torch_device)
    diagnosis = checks.diagnose(device)
    if as_json:
        print_json(diagnosis)
    else:
        checks.render(diagnosis, tables())
    if not diagnosis["parity"]["passed"]:
        raise typer.Exit(1)


def _measure(model: str, device: torch.device) -> None:
    """Write the table of measurements of a GPU."""
    if device.type != "cuda":
        raise RuntimeError("doctor --measure needs a GPU: it times the kernels that run there")
    measured.check_writable()
    with progress_bar(notes) as progress:
        table = benchmark.measure_against_torch(model, device, progress)
    print(f"wrote {measured.write(table)}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line on `arguments` (sys.argv by default) and exit with its code; without any, show the help."""
    run(app, (sys.argv[1:] if arguments is None else arguments) or ["--help"])
