"""Every tensor that the library makes names its device, because a script may have set torch's default device."""

import ast

from paths import ROOT
from torch.utils._device import _device_constructors

# torch's functions that obey the default device.
FACTORIES = {function.__name__ for function in _device_constructors()}
# The audit is a command, whose process has no script's settings.
FILES = [
    file
    for folder in (ROOT / "fastgpt", ROOT / "kernels" / "fastgpt_kernels")
    for file in folder.rglob("*.py")
    if "audit" not in file.parts
]


def nameless(source: str) -> list[str]:
    """Calls that leave the device to torch's default."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and (call.func.value.id, call.func.attr in FACTORIES) == ("torch", True)
        and not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]


def test_every_tensor_names_its_device() -> None:
    assert {"empty", "zeros", "tensor", "arange", "randint", "as_tensor"} <= FACTORIES
    found = {str(file.relative_to(ROOT)): calls for file in FILES if (calls := nameless(file.read_text()))}
    assert not found


def test_a_call_without_a_device_is_found() -> None:
    assert nameless("x = torch.zeros(2, dtype=torch.int64)") == ["torch.zeros(2, dtype=torch.int64)"]
    assert nameless("x = torch.zeros(2, device=y.device) + y.new_zeros(2) + torch.zeros_like(y)") == []
