"""The audit compiles what ships and fails what may not ship."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import fastgpt_kernels
import pytest
from fastgpt_kernels import audit
from fastgpt_kernels.audit.__main__ import main
from fastgpt_kernels.operations.gelu_mlp import tiles as mlp_tiles
from fastgpt_kernels.operations.gelu_mlp.tiles import ProductTile
from paths import ROOT

LAUNCH = audit.Launch("layer_norm", "bf16 C=768", "", "_layer_norm_fwd_kernel", "{}")
FINDING = audit.Finding("layer_norm", "layer_norm_fwd_kernel", "bf16 C<=1024", "sm_90", registers=56)
# Every launch that ships for every chip, as JSON.
LIST_LAUNCHES = """
import json
from fastgpt_kernels import audit
chips = [name for name in audit.SHARED_LIMITS if name not in ("sm_86", "sm_89")]  # whose calls are those of sm_80
print(json.dumps({name: audit.launches(name) for name in chips}))
"""
# The second products of the MLP that take descriptors, compiled for Hopper, as JSON.
AUDIT_SECOND_PRODUCTS = """
import json
from dataclasses import asdict
from fastgpt_kernels import audit
found = [one for one in audit.launches("sm_90", "bf16 gelu") if one.kernel == "_gelu_mlp_fwd_out_kernel"]
print(json.dumps([asdict(audit.audit(one, "sm_90")) for one in found if "DESCRIPTORS" in one.label]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_what_ships_passes(tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    arguments = "--arch", "90,gfx942", "--only", "layer_norm bf16 C=768", "--json", str(file)
    finished = run("-m", "fastgpt_kernels.audit", *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    findings = json.loads(file.read_text())
    assert {finding["architecture"] for finding in findings} == {"sm_90", "gfx942"}
    assert {finding["kernel"] for finding in findings} == {"layer_norm_fwd_kernel", "layer_norm_bwd_kernel"}
    assert all(finding["registers"] > 16 and finding["spilled_bytes"] == 0 for finding in findings)
    assert len(finished.stdout.splitlines()) == 1 + len(findings) == 1 + 2 * 4
    assert f"{len(findings)} launches" in finished.stderr


def test_each_fault_is_found() -> None:
    finished = run(str(Path(__file__).with_name("audited_kernels.py")))
    assert finished.returncode == 0, finished.stderr
    failures = [(f["configuration"].partition(":")[0], f["failure"]) for f in json.loads(finished.stdout)]
    reasons = dict(failures)
    assert len(failures) == 8
    assert [label for label, failure in failures if failure is None] == ["sound", "sound", "no tf32", "bf16 wgmma"]
    assert reasons["spills"].endswith("bytes spilled")
    assert reasons["tf32"].endswith("tf32 instructions")
    assert reasons["bf16 no wgmma"] == "no wgmma instruction"
    assert reasons["does not compile"].startswith(("CompilationError", "ValueError"))


def test_limit_of_shared_memory_is_the_chips() -> None:
    for architecture, limit in audit.SHARED_LIMITS.items():
        finding = replace(FINDING, architecture=architecture, shared_bytes=limit * 1024)
        assert audit._failure(LAUNCH, finding) is None
        beyond = replace(finding, shared_bytes=limit * 1024 + 1)
        assert str(audit._failure(LAUNCH, beyond)).endswith(f"exceed {limit} KiB")


def test_tf32_is_demanded_where_it_is_asked_for() -> None:
    asking = audit.Launch("gelu_mlp", "fp32 as tf32 gelu", "", "_gelu_mlp_fwd_hidden_kernel", "{}")
    assert audit._failure(asking, FINDING) == "no tf32 instruction"
    assert audit._failure(asking, replace(FINDING, tf32=8)) is None
    assert audit._failure(asking, replace(FINDING, architecture="gfx942")) is None
    rows = asking._replace(kernel="_gelu_mlp_bwd_product_kernel")  # which multiplies no matrices
    assert audit._failure(rows, FINDING) is None
    unasked = asking._replace(label="fp32 gelu")
    assert audit._failure(unasked, replace(FINDING, tf32=8)) == "8 tf32 instructions"


@pytest.mark.parametrize(
    ("machine_code", "n_bytes"),
    [
        ("LDG.E.128 R4, [R2]; STG.E [R2], R4", 0),
        ("STL [R1], R2", 4),
        ("@P0 STL.64 [R1+0x8], R2; STL.128 [R1], R4; LDL R2, [R1]", 24),
        ("LDL.64 R2, [R1]; LDL R4, [R1]", 8),
    ],
)
def test_spilled_bytes_are_counted(machine_code: str, n_bytes: int) -> None:
    assert audit.spilled_bytes(machine_code) == n_bytes


def test_exit_code_tells_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    failed = replace(FINDING, failure="4 bytes spilled")
    for findings, code in (([FINDING], 0), ([FINDING, failed], 1)):
        monkeypatch.setattr("fastgpt_kernels.audit.__main__.audit_all", lambda *_, findings=findings: findings)
        assert main([]) == code
    assert "FAILED: 4 bytes spilled" in capsys.readouterr().out


def test_one_launch_of_each_kernel_can_be_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [LAUNCH, LAUNCH._replace(label="bf16 C=1600"), LAUNCH._replace(kernel="_layer_norm_bwd_kernel")]
    monkeypatch.setattr(audit, "launches", lambda *_: found)
    monkeypatch.setattr(audit, "audit", lambda launch, architecture: f"{launch.kernel} {launch.label} {architecture}")
    every = audit.audit_all(["sm_80", "sm_90"])
    assert len(every) == 6
    assert audit.audit_all(["sm_80", "sm_90"], once=True) == [every[place] for place in (0, 2, 3, 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "90,42"], "unknown sm_42: choose from sm_80"),
        (["--only", "no such thing"], "no launch that ships holds 'no such thing'"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(audit, "launches", lambda *_: [])
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        main(["--arch", "90"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@cache
def shipped_launches() -> dict[str, list[audit.Launch]]:
    """The launches of every chip but two, by the chip's name."""
    finished = run("-c", LIST_LAUNCHES)
    assert finished.returncode == 0, finished.stderr
    return {chip: [audit.Launch(*launch) for launch in found] for chip, found in json.loads(finished.stdout).items()}


def test_every_visible_kernel_is_audited() -> None:
    files = (Path(fastgpt_kernels.__file__).parent / "operations").rglob("*kernels.py")
    written = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    for launches in shipped_launches().values():
        assert len({(launch.kernel, launch.label) for launch in launches}) == len(launches)
    assert {launch.kernel for launches in shipped_launches().values() for launch in launches} == written


def test_what_models_launch_is_audited() -> None:
    """Of a block that is not the first, a training step without dropout and an evaluation, some launches were not."""
    finished = run(str(Path(__file__).with_name("launched_models.py")))
    assert finished.returncode == 0, finished.stderr
    audited = {(launch.kernel, launch.specialization) for launch in shipped_launches()["sm_90"]}
    # The state of one row, from which the choice of a token reads numbers, lies at other addresses than that of two.
    launched = [one for one in json.loads(finished.stdout) if not one[0].startswith("_sampling")]
    assert [label for kernel, specialization, label in launched if (kernel, specialization) not in audited] == []
    kernels = {kernel for kernel, *_ in launched}
    assert kernels > {"_causal_attention_bwd_dq_kernel", "_decode_head_kernel", "_linear_cross_entropy_kernel"}


def test_both_tiles_of_the_products_of_the_mlp_on_hopper_are_audited() -> None:
    launches = [one for one in shipped_launches()["sm_90"] if re.match(r"bf16 gelu\w* (?!.*odd)", one.label)]
    for kernel in ("_gelu_mlp_fwd_hidden_kernel", "_gelu_mlp_fwd_out_kernel", "_gelu_mlp_bwd_pre_kernel"):
        labels = [launch.label for launch in launches if launch.kernel == kernel]
        assert {"BLOCK_COLS=128", "BLOCK_COLS=256"} == {
            word for text in labels for word in text.split() if "_COLS" in word
        }


def test_programs_of_the_mlp_fit_beside_each_other_where_they_are_meant_to() -> None:
    """A stream in float32 takes more shared memory: of two programs that were launched, one was resident."""
    finished = run("-c", AUDIT_SECOND_PRODUCTS)
    assert finished.returncode == 0, finished.stderr
    shipped = {tuple(tile[:5]): tile.n_resident for tile in vars(mlp_tiles).values() if type(tile) is ProductTile}
    seen = set()
    for finding in json.loads(finished.stdout):
        words = dict(word.split("=") for word in finding["configuration"].split() if "=" in word)
        names = "BLOCK_ROWS", "BLOCK_COLS", "BLOCK_INNER", "warps", "stages"
        n_resident = shipped[tuple(int(words[name]) for name in names)]
        seen.add(n_resident)
        n_threads = 32 * int(words["warps"])
        # Of a multiprocessor's 228 KiB, the system takes one for each program.
        assert n_resident * (finding["shared_bytes"] + 1024) <= 228 * 1024, finding
        assert n_resident * finding["registers"] * n_threads <= 65536, finding
    assert seen == {1, 2}


def test_torchs_setting_for_float32_reaches_every_product() -> None:
    for architecture, launches in shipped_launches().items():
        products = [launch for launch in launches if launch.kernel in audit._MATRIX_KERNELS]
        rounded = {launch.kernel for launch in products if "PRECISION=tf32" in launch.label}
        assert rounded == (set() if architecture.startswith("gfx") else audit._MATRIX_KERNELS)
        for launch in products:
            asks = launch.label.startswith(audit.TF32)
            assert f"PRECISION={'tf32' if asks else 'ieee'}" in launch.label


def test_bug_float64_takes_arguments_in_float32() -> None:
    """Triton passes a Python float as float32: too coarse for float64, and the interpreter does not show it."""
    wide = 0
    for launch in (launch for launches in shipped_launches().values() for launch in launches):
        types = json.loads(launch.specialization)["signature"].values()
        if "*fp64" in types:
            assert "fp32" not in types, (
                f"{launch.kernel} ({launch.label}): make it constexpr, or derive it in the kernel"
            )
            wide += 1
    assert wide
