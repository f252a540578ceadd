"""What the package's sources may not do: run code from data, or read files that can hold code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_rl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Objects between the ranks of one run over its own process groups; and the format of Megatron's own
# checkpoints, which the conversion of one reads and writes.
UNPICKLES = {"learner/layout/exchange.py", "weights/conversion/distributed.py"}
UNPICKLERS = {"load", "loads", "Unpickler"}
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "yaml.load",
    "yaml.unsafe_load",
    "marshal.loads",
    "shelve.open",
    "os.system",
    "os.popen",
}


def name_of(node: ast.expr) -> str:
    """`a.b` of an expression that is a name or an attribute of one."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return f"{module}.{name}"
    return ""


def found_in(source: str) -> Iterator[str]:
    """The forbidden calls of a module."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        module, _, function = name.rpartition(".")
        is_unpickling = module in ("pickle", "cloudpickle", "dill") and function in UNPICKLERS
        if name in FORBIDDEN or is_unpickling:
            yield name
        for keyword in node.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "weights_only" and is_false:
                yield f"{name}(weights_only=False)"
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                yield f"{name}({keyword.arg}=True)"
        if name == "torch.load" and not any(each.arg == "weights_only" for each in node.keywords):
            yield "torch.load without weights_only"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_code_from_data(path: Path) -> None:
    found = list(found_in(path.read_text()))
    if str(path.relative_to(PACKAGE)) in UNPICKLES:
        found = [each for each in found if not each.startswith("pickle.")]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "pickle.load(file)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_each_of_them_would_be_found(source: str) -> None:
    assert len(list(found_in(source))) == 1
