"""What this machine has, which backend each operation takes here, and whether the results are right."""

import platform
from typing import Any

import fastgpt_kernels
import torch
import transformers
from fastgpt_kernels import OPERATIONS, KernelUnavailableError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import container, measured, ops
from .bench.machine import cpu_name, versions
from .generate import products, routing
from .load import default_device
from .messages import one_line
from .model.patching import patch


def check_parity(device: str) -> dict[str, Any]:
    """Compare logits, loss and gradients of a tiny model with transformers' on the same weights, in float32.

    Returns {"passed", "largest_error", "allowed", "obstacle"}: errors relative to the largest value; the obstacle
    says why there is no result, None when there is one.
    """
    allowed = 2e-5
    try:
        largest_error, obstacle = _largest_error(device), None
    except Exception as error:  # report whatever stops the model
        largest_error, obstacle = None, one_line(error)
    passed = largest_error is not None and largest_error <= allowed
    return {"passed": passed, "largest_error": largest_error, "allowed": allowed, "obstacle": obstacle}


def _largest_error(device: str) -> float:
    model = _tiny_model(device)
    ids = torch.arange(2 * 33, device=device).mul(37).remainder(131).view(2, 33)
    results = []
    # In "auto", products in float32 would leave the kernels untried.
    with ops.backend("triton" if ops.runs_kernels(device) else ops.backend_setting()):
        for change in (lambda model: model, patch):
            change(model).train().zero_grad()
            output = model(ids, labels=ids)
            output.loss.backward()
            results.append(
                [output.logits, output.loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            )
    errors = [(ours - theirs).abs().max() / theirs.abs().max() for theirs, ours in zip(*results, strict=True)]
    return torch.stack(errors).max().item()  # NaN if one of them is


def _tiny_model(device: str) -> Any:
    """transformers' own model, with the same random weights every time."""
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=131, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").to(device)  # type: ignore[call-arg]


def diagnose(device: str | None = None) -> dict[str, Any]:
    """Everything that `fastgpt doctor` reports, ready for JSON."""
    device = default_device() if device is None else device
    operations = {}
    for operation in OPERATIONS:
        try:
            backend, reason = ops.explain(operation, device)
        except (KernelUnavailableError, ValueError) as error:
            backend, reason = "none", str(error)
        operations[operation] = {"backend": backend, "reason": reason}
        for dtype in (torch.float32, torch.bfloat16) if backend == "triton" else ():
            if (choice := ops.explain(operation, device, dtype)) != (backend, reason):
                name = f"{operation} in {str(dtype).removeprefix('torch.')}"
                operations[name] = dict(zip(("backend", "reason"), choice, strict=True))
    try:
        generate = routing.describe(patch(_tiny_model(device)).eval())
    except (KernelUnavailableError, ValueError) as error:
        generate = f"nowhere: {error}"
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "cores_of_container": container.cores(),
        "backend_setting": ops.backend_setting(),
        "first_kernel": _first_kernel(torch.device(device)),
        "measurements": _measurements(torch.device(device)),
        "cpu_products": _cpu_products(torch.device(device)),
        "operations": operations,
        "generate": generate,
        "parity": check_parity(device),
    }


def describe_threads(n_threads: int, cores: float | None) -> str:
    """torch's threads, and what to do where they are more than the cores of this container."""
    if cores is None or n_threads <= max(1, cores):
        return str(n_threads)
    at_most = f"{cores:g} core{'s' * (cores != 1)}"
    return f"{n_threads}, but this container has {at_most}: set OMP_NUM_THREADS={max(1, int(cores))}"


def _first_kernel(device: torch.device) -> str:
    """The result of compiling and launching a tiny kernel."""
    if device.type != "cuda":
        return f"not tried: {device} is no GPU"
    return fastgpt_kernels.why_unavailable(OPERATIONS[0], device) or "compiled and launched"


def _measurements(device: torch.device) -> str:
    """The table of this GPU that `auto` follows, or why there is none."""
    if device.type != "cuda":
        return f"none: {device} is no GPU"
    fault = fastgpt_kernels.why_unavailable(OPERATIONS[0], device)
    return "none: no kernel runs" if fault else measured.known(device).note


def _cpu_products(device: torch.device, n_steps: int = 128) -> str:
    """How `generate()` multiplies rows by gpt2's matrices in float32 here, and how much faster than torch's product."""
    if device.type != "cpu":
        return f"not timed: {device} is no CPU"
    c, vocabulary = 768, 50257
    blocks = {"qkv": (c, 3 * c), "proj": (c, c), "fc": (c, 4 * c), "mlp proj": (4 * c, c)}
    matrices = {name: [torch.rand(shape, device=device) for _ in range(12)] for name, shape in blocks.items()}
    matrices["head"] = [torch.rand(vocabulary, c, device=device).t()]
    lines = []
    for n_rows in (1, 8):
        chosen = []
        for name, same in matrices.items():
            costs = {name: cost.if_kept() for name, cost in products.costs(same, n_rows).items()}
            fastest = products.fastest(costs, n_steps)
            gain = costs["as stored"].of(n_steps) / costs[fastest].of(n_steps)
            chosen.append(f"{name} {fastest}" + (f" ({gain:.1f}x)" if fastest != "as stored" else ""))
        lines.append(f"{n_rows} row{'s' * (n_rows > 1)}: {', '.join(chosen)}")
    return "; ".join(lines)


def render(diagnosis: dict[str, Any], console: Console) -> None:
    """Print a diagnosis as tables."""
    table = Table("what", "is", title="This machine", title_justify="left")
    for name, found in diagnosis["versions"].items():
        table.add_row(name, found or "not installed")
    table.add_row("threads", describe_threads(diagnosis["threads"], diagnosis["cores_of_container"]))
    for name in (
        "platform",
        "device",
        "device_name",
        "backend_setting",
        "first_kernel",
        "measurements",
        "cpu_products",
    ):
        table.add_row(name.replace("_", " "), escape(str(diagnosis[name])))
    console.print(table)

    table = Table("operation", "backend", "why", title="Where each operation runs", title_justify="left")
    for name, choice in diagnosis["operations"].items():
        table.add_row(name, choice["backend"], choice["reason"])
    table.add_row("generate()", "", diagnosis["generate"])
    console.print(table)

    parity = diagnosis["parity"]
    verdict = "[green]passed[/]" if parity["passed"] else "[red]FAILED[/]"
    found = parity["obstacle"] or f"largest relative error {parity['largest_error']:.1e}"
    console.print(
        f"Parity with transformers (logits, loss and gradients of a tiny model, float32): {verdict}, "
        f"{escape(found)}, allowed {parity['allowed']:.0e}"
    )
