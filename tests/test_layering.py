"""The shape of the house, read from the source: who imports whom, and how big things are.

Rooms are the folders of `megatron_rl`; CONTRIBUTING.md draws the arrows that ARROWS spells out.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_rl"

# All may import these, and these import only each other.
LEAVES = {"records", "config", "errors", "lifetime", "observe.metrics", "weights"}
ROOMS = {"data", "rollout", "reward", "objective", "learner", "sync", "observe"}
# What a room may import besides leaves and itself. A module at the top, such as train, is part of a
# loop over the stations: it may import every room and its like, and nothing imports it back.
ARROWS = {"learner": {"objective", "ops"}, "ops": {"_C"}}
# Giant -> the files, or the room, that may import it.
DOORS = {
    "megatron": {"learner"},
    "transformer_engine": {"learner"},
    "vllm": {"rollout.server", "sync.receive", "sync.cpu_reload"},
    "tensorboard": {"observe.tensorboard"},
    "torch.utils.tensorboard": {"observe.tensorboard"},
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
VAGUE = re.compile(r"(^|_)(utils?|helpers?|common|misc)(_|$)")

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in (PACKAGE, ROOT / "tools", ROOT / "tests")
    for path in folder.rglob("*")
    if path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh"}
)


def name_of(path: Path) -> str:
    """`learner.step` of megatron_rl/learner/step.py; a room's own name for its __init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str, module: str) -> set[str]:
    """Every dotted name that a module imports, inside functions and by import_module too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["megatron_rl", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            first = node.args[0]
            is_name = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if called in ("import_module", "__import__") and is_name:
                found.add(first.value)
    return found


def is_below(name: str, above: str) -> bool:
    return name == above or name.startswith(above + ".")


def is_leaf(name: str) -> bool:
    return any(is_below(name, leaf) for leaf in LEAVES)


def is_part_of_a_loop(name: str) -> bool:
    return "." not in name and name not in ROOMS | {"ops", "_C"} and not is_leaf(name)


def wrong_arrows(source: str, module: str) -> set[str]:
    """Imports of megatron_rl's own modules that ARROWS does not allow."""
    room = module.split(".")[0]
    is_loop = is_part_of_a_loop(module)
    wrong = set()
    for imported in imports_of(source, module):
        inner = imported.removeprefix("megatron_rl").removeprefix(".")
        if not is_below(imported, "megatron_rl") or inner in ("", "__version__") or is_leaf(inner):
            continue
        target = inner.split(".")[0]
        is_own_room = target == room and not is_leaf(module)
        is_station = is_loop and (target in ROOMS or is_part_of_a_loop(target))
        if not is_own_room and not is_station and target not in ARROWS.get(room, set()):
            wrong.add(f"{module} -> {inner}")
    return wrong


def wrong_doors(source: str, module: str) -> set[str]:
    """Imports of a giant outside its door."""
    return {
        f"{module} -> {imported}"
        for imported in imports_of(source, module)
        for giant, doors in DOORS.items()
        if is_below(imported, giant) and not any(is_below(module, door) for door in doors)
    }


def long_functions(source: str) -> dict[str, int]:
    return {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_one_way(path):
    source = path.read_text(encoding="utf-8")
    assert wrong_arrows(source, name_of(path)) == set()
    assert wrong_doors(source, name_of(path)) == set()


def test_no_file_no_function_is_too_long_and_no_name_is_vague():
    assert len(SOURCES) > 20
    sources = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    lengths = {str(path.relative_to(ROOT)): len(s.splitlines()) for path, s in sources.items()}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}
    functions = {
        f"{path.relative_to(ROOT)}:{name}": n
        for path, source in sources.items()
        if path.suffix == ".py"
        for name, n in long_functions(source).items()
    }
    assert functions == {}
    names = {part for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert {name for name in names if VAGUE.search(name)} == set()


BLOCKED = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {giants!r} or name.partition(".")[0] in {giants!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
for module in {modules!r}:
    importlib.import_module(module)
try:
    importlib.import_module("megatron.core")
except ModuleNotFoundError:
    print("imported without the giants")
"""


def test_what_needs_no_giant_imports_without_any():
    wanted = [
        name
        for name in map(name_of, MODULES)
        if is_leaf(name) or name.split(".")[0] in {"objective", "ops", "data", "reward"}
    ]
    modules = ["megatron_rl", *(f"megatron_rl.{name}" for name in wanted)]
    assert {"megatron_rl.records", "megatron_rl.config", "megatron_rl.objective"} <= set(modules)
    script = BLOCKED.format(giants=sorted(DOORS), modules=modules)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "imported without the giants\n", result.stderr


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("reward.score", "from megatron_rl.learner.step import step", {"learner.step.step"}),
        ("reward.score", "from ..learner import step", {"learner.step"}),
        ("reward.score", "from . import exact\nfrom megatron_rl.errors import DataError", set()),
        ("learner.step", "import megatron_rl.objective.loss", set()),
        ("learner.step", "from megatron_rl.sync import publish", {"sync.publish"}),
        ("records", "from megatron_rl.objective import loss", {"objective.loss"}),
        ("observe.metrics", "from megatron_rl.observe import console", {"observe.console"}),
        ("observe.console", "from megatron_rl.observe.metrics import Mean", set()),
        ("train", "from megatron_rl.sync.publish import Publisher", set()),
        ("train", "from megatron_rl.stations import evaluate", set()),
        ("train", "from megatron_rl.ops import logprobs", {"ops.logprobs"}),
        ("data.prompts", "from megatron_rl.train import main", {"train.main"}),
        ("ops.logprobs", "from megatron_rl import _C", set()),
    ],
)
def test_the_reader_of_arrows_sees_them(module, source, wrong):
    assert wrong_arrows(source, module) == {f"{module} -> {name}" for name in wrong}


@pytest.mark.parametrize(
    ("module", "source", "is_wrong"),
    [
        ("rollout.client", "def f():\n    from vllm import LLM", True),
        ("rollout.client", "import importlib\nimportlib.import_module('vllm.config')", True),
        ("rollout.server", "import vllm", False),
        ("learner.model", "from megatron.core import tensor_parallel", False),
        ("objective.loss", "import megatron.core", True),
        ("observe.console", "from torch.utils.tensorboard import SummaryWriter", True),
        ("observe.console", "import megatron_rl.errors", False),
    ],
)
def test_the_reader_of_doors_sees_them(module, source, is_wrong):
    assert bool(wrong_doors(source, module)) == is_wrong
