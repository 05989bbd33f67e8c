"""The package as a whole: what imports what, what an import costs, and what a wheel holds."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from paths import ROOT

SOURCE_ROOTS = {"fastgpt": ROOT / "fastgpt", "fastgpt_kernels": ROOT / "kernels" / "fastgpt_kernels"}
FILES = {package: sorted(root.rglob("*.py")) for package, root in SOURCE_ROOTS.items()}
ALL_FILES = [file for files in FILES.values() for file in files]


def run_python(code: str, directory: Path, **environment: str) -> str:
    """What a fresh interpreter prints; fails with what it says on standard error."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=directory, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(tree: ast.Module, *, at_import: bool) -> Iterator[str]:
    """Every module that a file imports by an absolute name; at_import leaves out those inside of functions."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        if not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def packages_imported_by(file: Path, *, at_import: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    return {module.partition(".")[0] for module in imports(tree, at_import=at_import)}


# --- import direction -----------------------------------------------------------------------------------------------


def test_the_parser_of_imports_sees_imports() -> None:
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\nif 1:\n    import h\ndef i():\n    from j import k\n"
    assert sorted(imports(ast.parse(source), at_import=False)) == ["a.b", "c", "d.e", "h", "j"]
    assert sorted(imports(ast.parse(source), at_import=True)) == ["a.b", "c", "d.e", "h"]
    assert {"torch", "transformers"} <= packages_imported_by(ROOT / "fastgpt" / "modeling.py")


@pytest.mark.parametrize("file", FILES["fastgpt_kernels"], ids=name_of)
def test_kernels_know_nothing_above_them(file: Path) -> None:
    assert not packages_imported_by(file) & {"fastgpt", "transformers", "tests", "benchmarks", "kernels"}


@pytest.mark.parametrize("file", FILES["fastgpt"], ids=name_of)
def test_fastgpt_knows_no_tests_and_no_benchmarks(file: Path) -> None:
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert not packages_imported_by(file) & {"tests", "benchmarks", "kernels", "pytest", *helpers}


@pytest.mark.parametrize("file", ["__init__.py", "reference.py"])
def test_the_torch_side_of_the_kernels_never_imports_triton(file: str) -> None:
    assert "triton" not in packages_imported_by(SOURCE_ROOTS["fastgpt_kernels"] / file)


@pytest.mark.parametrize("file", FILES["fastgpt"], ids=name_of)
def test_fastgpt_reaches_triton_through_the_kernels(file: Path) -> None:
    assert "triton" not in packages_imported_by(file, at_import=True)


def test_no_folder_can_shadow_hugging_faces_kernels() -> None:
    """transformers imports a package named kernels when there is one."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


# --- public functions -----------------------------------------------------------------------------------------------


def is_jit(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def public_functions(file: Path) -> list[ast.FunctionDef]:
    """Those at the top of a module; triton's own language has no types."""
    body = ast.parse(file.read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return [function for function in functions if not function.name.startswith("_") and not is_jit(function)]


@pytest.mark.parametrize("file", ALL_FILES, ids=name_of)
def test_modules_and_public_functions_have_docstrings(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))
    assert [function.name for function in public_functions(file) if not ast.get_docstring(function)] == []


@pytest.mark.parametrize("file", ALL_FILES, ids=name_of)
def test_public_functions_have_types(file: Path) -> None:
    untyped = []
    for function in public_functions(file):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        untyped += [f"{function.name}({argument.arg})" for argument in arguments if argument.annotation is None]
        untyped += [f"{function.name} -> ?"] if function.returns is None else []
    assert untyped == []


@pytest.mark.parametrize("package", SOURCE_ROOTS)
def test_packages_are_typed(package: str) -> None:
    assert (SOURCE_ROOTS[package] / "py.typed").exists()


# --- importing ------------------------------------------------------------------------------------------------------

# Later versions keep them. Whole models that 0.1.0 pickled name the classes of fastgpt.modeling.
NAMES_OF_0_1_0 = {
    "fastgpt": "CheckpointError GPT2DoubleHeadsModel GPT2ForQuestionAnswering GPT2ForSequenceClassification "
    "GPT2ForTokenClassification GPT2LMHeadModel GPT2Model backend count_parameters load_demo patch unpatch",
    "fastgpt.modeling": "GPT2Attention GPT2Block GPT2MLP LayerNorm PositionEmbedding TokenEmbedding",
    "fastgpt_kernels": "KERNEL_MODULES OPERATIONS KernelUnavailableError check_device kernel reference supports",
    "fastgpt_kernels.reference": "add_layer_norm causal_attention gelu_mlp layer_norm linear_cross_entropy",
}


@pytest.mark.parametrize("module", NAMES_OF_0_1_0)
def test_names_of_0_1_0_import_as_before(module: str) -> None:
    assert set(NAMES_OF_0_1_0[module].split()) <= set(import_module(module).__all__)


WHAT_IMPORTS_ADD = """
import json, sys

def added_by(*modules):
    before = set(sys.modules)
    for module in modules:
        __import__(module)
    return sorted(set(sys.modules) - before)

added = {
    "torch": added_by("torch"),
    "fastgpt_kernels": added_by("fastgpt_kernels"),
    "transformers": added_by("transformers.models.gpt2.modeling_gpt2", "transformers.generation.utils"),
    "fastgpt": added_by("fastgpt"),
}
import fastgpt, fastgpt_kernels, torch
files = [fastgpt.__file__, fastgpt_kernels.__file__]
print(json.dumps({"added": added, "cuda": torch.cuda.is_initialized(), "files": files}))
"""


@pytest.fixture(scope="module")
def fresh_import(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What importing the packages does, in a directory that is not the repository."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return json.loads(run_python(WHAT_IMPORTS_ADD, tmp_path_factory.mktemp("elsewhere"), PYTHONPATH=path))


def test_importing_initialises_no_gpu(fresh_import: dict) -> None:
    assert fresh_import["cuda"] is False


@pytest.mark.parametrize("package", SOURCE_ROOTS)
def test_importing_adds_no_other_package(package: str, fresh_import: dict) -> None:
    """On top of torch, and for fastgpt of transformers' GPT-2, which themselves import triton where it is there."""
    added = {module.partition(".")[0] for module in fresh_import["added"][package]}
    assert package in added
    allowed = {*SOURCE_ROOTS, "transformers"} if package == "fastgpt" else {package}
    assert added - sys.stdlib_module_names <= allowed


def test_importing_loads_no_part_that_only_the_command_line_needs(fresh_import: dict) -> None:
    everything = {module for package in SOURCE_ROOTS for module in fresh_import["added"][package]}
    assert "fastgpt.modeling" in everything
    assert not everything & {"typer", "rich", "matplotlib", "fastgpt.cli", "fastgpt_kernels.audit"}


def test_editable_install_works_in_another_directory(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
try:
    from importlib.metadata import version
    version("fastgpt")
except ImportError:
    sys.exit(print("not installed"))
for package in ("fastgpt", "fastgpt_kernels"):
    print(importlib.util.find_spec(package).origin)
"""
    lines = run_python(code, tmp_path, PYTHONPATH="").splitlines()
    if lines == ["not installed"]:
        pytest.skip("fastgpt runs from a checkout here")
    assert [Path(line).name for line in lines] == ["__init__.py"] * 2
    assert len({Path(line).parent for line in lines}) == 2


# --- without triton -------------------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # import triton: ModuleNotFoundError

# The repository root, with its folder of kernels, comes first in the path here.
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import is_kernels_available
import torch
import fastgpt, fastgpt_kernels

print("kernels package:", is_kernels_available())
config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=61, n_positions=16, eos_token_id=0, pad_token_id=0)
model = fastgpt.GPT2LMHeadModel(config)
assert isinstance(model, GPT2LMHeadModel)
ids = torch.randint(1, 61, (2, 5))

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for _ in range(2):
    torch.manual_seed(0)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print("learns:", losses[1] < losses[0])
print("generates:", tuple(model.eval().generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1).shape))

for ask in (lambda: fastgpt_kernels.kernel("layer_norm"), lambda: fastgpt_kernels.layer_norm, lambda: model(ids)):
    try:
        with fastgpt.backend("triton"):
            ask()
    except fastgpt_kernels.KernelUnavailableError as error:
        print("says:", error)
"""


def test_everything_but_the_kernels_works_without_triton() -> None:
    path = os.pathsep.join([".", "kernels"])
    lines = run_python(WITHOUT_TRITON, ROOT, PYTHONPATH=path, FASTGPT_BACKEND="auto").splitlines()
    assert lines[1:3] == ["learns: True", "generates: (2, 9)"]
    for line, operation in zip(lines[3:], ("layer_norm", "layer_norm", "add_layer_norm"), strict=True):
        assert line.startswith(f"says: {operation}: triton is not installed")
    # The folder of this name in the checkout can be imported, too, and is not the package that transformers asks for.
    if "kernels" not in {distribution.name for distribution in distributions()}:
        assert lines[0] == "kernels package: False"


IMPORTS_AGAIN = """
import sys
import fastgpt

before, tokenizer = fastgpt.load_demo()
ids = tokenizer("The", return_tensors="pt").input_ids
for name in [name for name in sys.modules if name.partition(".")[0] in ("fastgpt", "fastgpt_kernels")]:
    del sys.modules[name]

import fastgpt

after, _ = fastgpt.load_demo()
fastgpt.quantize(after).save_pretrained("int8")
assert type(after) is not type(before)
assert fastgpt.explain(after).startswith("the engine")
assert fastgpt.explain(fastgpt.GPT2LMHeadModel.from_pretrained("int8")).startswith("the engine")
print(*(model.generate(ids, max_new_tokens=4).shape[1] - ids.shape[1] for model in (before, after)))
"""


def test_bug_a_second_import_in_a_process_raised(tmp_path: Path) -> None:
    """As in a notebook that forgets all modules to read their files again."""
    assert run_python(IMPORTS_AGAIN, tmp_path, PYTHONPATH=os.pathsep.join(sys.path)).split() == ["4", "4"]


RELOADS_TRANSFORMERS = """
import importlib
import fastgpt, torch, transformers
from transformers.models.gpt2 import modeling_gpt2

demo, _ = fastgpt.load_demo()
ids = torch.arange(9)[None]
importlib.reload(modeling_gpt2)
stock = modeling_gpt2.GPT2LMHeadModel(demo.config).train()
stock.load_state_dict(demo.state_dict())
for model in (demo, fastgpt.GPT2LMHeadModel(demo.config)):
    model.load_state_dict(stock.state_dict())
    losses = [one.eval()(ids, labels=ids).loss for one in (model, stock)]
    torch.testing.assert_close(*losses)
    model.train()(ids, labels=ids).loss.backward()
    assert torch.equal(*(one.eval().generate(ids, max_new_tokens=4, do_sample=False) for one in (model, stock)))
    print(fastgpt.explain(model).splitlines()[0])
"""


def test_bug_models_raised_once_the_file_of_transformers_gpt2_was_reloaded() -> None:
    """As notebooks do that reload what was edited. The model that was made before has the functions from before."""
    lines = run_python(RELOADS_TRANSFORMERS, ROOT, PYTHONPATH=os.pathsep.join(sys.path)).splitlines()
    assert all(line.startswith("transformers' loop: the model is not a plain module") for line in lines)
    assert len(lines) == 2


# --- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, because setuptools leaves its build folders in the source."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source") / "fastgpt"
    copytree(ROOT, copy, ignore=ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__"))
    run_python("from setuptools.build_meta import build_wheel; build_wheel('.')", copy)
    (file,) = copy.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"fastgpt", "fastgpt_kernels", info}
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "fastgpt=fastgpt.cli:main" in wheel.read(f"{info}/entry_points.txt").decode().replace(" ", "")


@pytest.mark.parametrize("package", SOURCE_ROOTS)
def test_wheel_holds_every_file_of_a_package(package: str, wheel: zipfile.ZipFile) -> None:
    root = SOURCE_ROOTS[package]
    files = {file.relative_to(root.parent) for file in root.rglob("*") if file.is_file()}
    expected = {file.as_posix() for file in files if "__pycache__" not in file.parts}
    assert expected == {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert f"{package}/py.typed" in expected


def test_wheel_holds_the_demo_model(wheel: zipfile.ZipFile) -> None:
    demo = {name.removeprefix("fastgpt/demo/") for name in wheel.namelist() if name.startswith("fastgpt/demo/")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "train.py"} <= demo
