"""The dependencies between packages, read from the source, and the size of files and functions.

CONTRIBUTING.md draws the arrows that ARROWS spells out.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_rl"

# Every module may import these; they import only each other.
LEAVES = {"records", "config", "errors", "process", "observe.metrics", "weights"}
# What the modules of a package, or an entry point, may import besides leaves and their own package.
ARROWS = {
    "train": {"loop", "learner"},
    "sft": {"data", "learner", "objective", "observe"},
    "serve": {"engine"},
    "evaluate": {"loop", "data", "rollout", "reward", "engine", "observe"},
    "study": {"engine"},
    "plan": {"loop", "learner", "engine"},
    "doctor": set(),
    "loop": {
        "data",
        "rollout",
        "reward",
        "objective",
        "learner",
        "sync",
        "engine",
        "observe",
    },
    "rollout": {"engine"},
    "sync": {"engine"},
    "learner": {"objective", "ops"},
    "ops": {"_C"},
}
# The packages inside `learner`, each of which may import those before it. `learner.learner` stands
# between the passes and the update.
LEARNER_ORDER = ("layout", "batch", "model", "passes", "learner", "update")
# Dependency -> the modules, or the package, that may import it.
DOORS = {
    "megatron": {"learner"},
    "transformer_engine": {"learner"},
    "vllm": {"sync.engine_side"},
    "tensorboard": {"observe.tensorboard"},
    "wandb": {"observe.trackers.wandb"},
    "mlflow": {"observe.trackers.mlflow"},
    "trackio": {"observe.trackers.trackio"},
    "torch.utils.tensorboard": {"observe.tensorboard"},
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
MAX_ROOT_FILES, MAX_IMPORT_CHAIN = 7, 10
MAX_TRAIN_LINES = 100  # of train.py, the journey of a prompt
MIN_DOCUMENTED = 0.9  # share of the public classes, functions and methods
# Modules that may catch everything: commands, cleanups after a signal, and scoring processes.
PROCESS_BOUNDARIES = {"process.command", "process.lifetime", "reward.worker", "rollout.tool_worker"}
VAGUE = re.compile(r"(^|_)(utils?|helpers?|common|misc)(_|$)")

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in (PACKAGE, ROOT / "tools", ROOT / "tests")
    for path in folder.rglob("*")
    if path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh"}
)


def name_of(path: Path) -> str:
    """`sync.wire` of megatron_rl/sync/wire.py; a package's own name for its __init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES}


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


def wrong_arrows(source: str, module: str) -> set[str]:
    """Imports of megatron_rl's own modules that ARROWS does not allow."""
    package = module.split(".")[0]
    wrong = set()
    for imported in imports_of(source, module):
        inner = imported.removeprefix("megatron_rl").removeprefix(".")
        if not is_below(imported, "megatron_rl") or inner in ("", "__version__") or is_leaf(inner):
            continue
        target = inner.split(".")[0]
        is_own_package = target == package and not is_leaf(module) and "." in module
        is_up = package == target == "learner" and _learner_place(inner) > _learner_place(module)
        if is_up or not (is_own_package or target in ARROWS.get(package, set())):
            wrong.add(f"{module} -> {inner}")
    return wrong


def _learner_place(name: str) -> int:
    inside = [*name.split("."), ""][1]
    return LEARNER_ORDER.index(inside) if inside in LEARNER_ORDER else 0


def wrong_doors(source: str, module: str) -> set[str]:
    """Imports of a large dependency outside the modules that may import it."""
    return {
        f"{module} -> {imported}"
        for imported in imports_of(source, module)
        for dependency, doors in DOORS.items()
        if is_below(imported, dependency) and not any(is_below(module, door) for door in doors)
    }


def long_functions(source: str) -> dict[str, int]:
    return {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }


@cache
def imported_modules(module: str) -> frozenset[str]:
    """The package's own modules that a module names in an import, wherever it stands."""
    found = set()
    for imported in imports_of(NAMES[module].read_text(encoding="utf-8"), module):
        inner = imported.removeprefix("megatron_rl.")
        owner = inner if inner in NAMES else inner.rpartition(".")[0]
        if is_below(imported, "megatron_rl") and owner in NAMES and owner != module:
            found.add(owner)
    return frozenset(found)


@cache
def longest_chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports that starts at a module."""
    below = (longest_chain(each) for each in sorted(imported_modules(module)))
    return (module, *max(below, key=len, default=()))


def package_of(module: str) -> str:
    is_package = NAMES[module].name == "__init__.py"
    return module if is_package else module.rpartition(".")[0]


def packages_that_import_each_other() -> set[tuple[str, str]]:
    """Pairs of folders; the root, whose modules are entry points and leaves, is none."""
    pairs = {
        (package_of(module), package_of(target))
        for module in NAMES
        for target in imported_modules(module)
    } - {("", "")}
    return {(one, other) for one, other in pairs if one and one < other and (other, one) in pairs}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_one_way(path):
    source = path.read_text(encoding="utf-8")
    assert wrong_arrows(source, name_of(path)) == set()
    assert wrong_doors(source, name_of(path)) == set()


def test_the_root_holds_entry_points_and_leaves_alone():
    files = [path.name for path in PACKAGE.glob("*.py")]
    assert {"train.py", "records.py", "errors.py"} <= set(files)
    assert len(files) <= MAX_ROOT_FILES, files


def test_the_journey_of_a_prompt_is_short():
    lines = (PACKAGE / "train.py").read_text(encoding="utf-8").splitlines()
    assert 50 < len(lines) < MAX_TRAIN_LINES


def test_no_chain_of_imports_is_long():
    chain = max((longest_chain(module) for module in NAMES), key=len)
    assert len(longest_chain("train")) > 5
    assert len(chain) <= MAX_IMPORT_CHAIN, " -> ".join(chain)


def test_no_two_packages_import_each_other():
    assert packages_that_import_each_other() == set()


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


def public_definitions(source: str) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Of a module and of its public classes."""
    bodies = [ast.parse(source).body]
    while bodies:
        for node in bodies.pop():
            is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if is_definition and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    bodies.append(node.body)


def test_public_definitions_have_docstrings():
    definitions = {
        f"{name}.{node.name}": ast.get_docstring(node)
        for name, path in NAMES.items()
        for node in public_definitions(path.read_text(encoding="utf-8"))
    }
    assert len(definitions) > 400
    missing = [name for name, docstring in definitions.items() if not docstring]
    assert len(missing) <= (1 - MIN_DOCUMENTED) * len(definitions), missing


def broad_excepts(source: str) -> list[int]:
    """Lines of handlers that catch everything and do not raise again."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]


def test_only_the_boundaries_of_processes_catch_everything():
    """Where a process reports an error and goes on to its end, or to its next request."""
    found = {
        name for name, path in NAMES.items() if broad_excepts(path.read_text(encoding="utf-8"))
    }
    assert found == PROCESS_BOUNDARIES
    assert broad_excepts("try:\n    f()\nexcept Exception:\n    pass") == [3]
    assert broad_excepts("try:\n    f()\nexcept:\n    g()\n    raise") == []


BLOCKED = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {dependencies!r} or name.partition(".")[0] in {dependencies!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
for module in {modules!r}:
    importlib.import_module(module)
try:
    importlib.import_module("megatron.core")
except ModuleNotFoundError:
    print("imported without them")
"""


def test_what_needs_no_large_dependency_imports_without_any():
    wanted = [
        name
        for name in map(name_of, MODULES)
        if is_leaf(name) or name.split(".")[0] in {"objective", "ops", "data", "reward"}
    ]
    modules = ["megatron_rl", *(f"megatron_rl.{name}" for name in wanted)]
    assert {"megatron_rl.records", "megatron_rl.config", "megatron_rl.objective"} <= set(modules)
    script = BLOCKED.format(dependencies=sorted(DOORS), modules=modules)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "imported without them\n", result.stderr


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        (
            "reward.score",
            "from megatron_rl.learner.update.step import step",
            {"learner.update.step.step"},
        ),
        ("reward.score", "from ..learner import learner", {"learner.learner"}),
        ("reward.score", "from . import worker\nfrom megatron_rl.errors import DataError", set()),
        ("learner.update.step", "import megatron_rl.objective.constraint", set()),
        ("learner.update.step", "from megatron_rl.sync import publish", {"sync.publish"}),
        ("learner.update.step", "from megatron_rl.learner.learner import Learner", set()),
        (
            "learner.passes.forward",
            "from megatron_rl.learner.learner import Learner",
            {"learner.learner.Learner"},
        ),
        (
            "learner.layout.parallel",
            "from megatron_rl.learner.model.build import DTYPES",
            {"learner.model.build.DTYPES"},
        ),
        ("records", "from megatron_rl.objective import constraint", {"objective.constraint"}),
        ("observe.metrics", "from megatron_rl.observe import console", {"observe.console"}),
        ("observe.console", "from megatron_rl.observe.metrics import Mean", set()),
        ("train", "from megatron_rl.loop.run import start", set()),
        ("train", "from megatron_rl.sft import warm_start", {"sft.warm_start"}),
        ("train", "from megatron_rl.sync.publish import Publisher", {"sync.publish.Publisher"}),
        ("loop.publish", "from megatron_rl.sync.publish import Publisher", set()),
        ("data.prompts", "from megatron_rl.train import main", {"train.main"}),
        ("ops.logprobs", "from megatron_rl import _C", set()),
    ],
)
def test_the_reader_of_arrows_sees_them(module, source, wrong):
    assert wrong_arrows(source, module) == {f"{module} -> {name}" for name in wrong}


@pytest.mark.parametrize(
    ("module", "source", "is_wrong"),
    [
        ("engine.http", "def f():\n    from vllm import LLM", True),
        ("engine.http", "import importlib\nimportlib.import_module('vllm.config')", True),
        ("sync.engine_side.plugin", "import vllm", False),
        ("learner.model.build", "from megatron.core import tensor_parallel", False),
        ("objective.constraint", "import megatron.core", True),
        ("observe.console", "from torch.utils.tensorboard import SummaryWriter", True),
        ("observe.console", "import megatron_rl.errors", False),
    ],
)
def test_the_reader_of_doors_sees_them(module, source, is_wrong):
    assert bool(wrong_doors(source, module)) == is_wrong
