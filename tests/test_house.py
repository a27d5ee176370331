"""The house: imports only go down, one address per upstream library, nothing too long, cold modules stay cold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from lora_tune.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lora_tune"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
# Imports go from a layer to the same one or a lower one; verbs import no verb.
LAYERS = {"errors": 0, "recipe": 1, "data": 2, "model": 3, "adapter": 4, "evaluation": 5, "training": 6, "serving": 7}
RECIPE_LAYER = {
    "recipe",
    "recipe_values",
    "recipe_file",
    "recipe_paths",
    "recipe_problems",
    "yaml_tree",
    "foreign_keys",
    "foreign_values",
    "foreign_sources",
    "recipe_import",
    "terminal",
    "imports",
    "disk",
    "interrupts",
}
VERBS = {module.removeprefix("lora_tune.") for module, _ in COMMANDS.values()} | {"cli", "__main__"}
VERB_LAYER = 9
ADDRESSES = {
    "trl": {"lora_tune.training.trainer"},
    "bitsandbytes": {"lora_tune.model.base"},
    "peft": {
        "lora_tune.model.methods",
        "lora_tune.model.merging",
        "lora_tune.adapter.load",
        "lora_tune.adapter.mixture",
    },
    "datasets": {"lora_tune.data.sources"},
    "gguf": {"lora_tune.model.gguf_file"},
    "triton": {f"lora_tune.model.kernels.triton_{name}" for name in ("dequantize", "gated", "loss", "norm", "rope")}
    | {"lora_tune.model.kernels.readiness"},
    "llguidance": {"lora_tune.serving.grammar"},
    "deepspeed": {"lora_tune.model.zero3"},
    "optuna": {"lora_tune.training.sweep_study"},
    "uvicorn": {"lora_tune.serving.http_server"},
    "prompt_toolkit": {"lora_tune.serving.chat_prompt"},
    "prometheus_client": {"lora_tune.serving.metrics"},
    "openai": {"lora_tune.serving.conformance"},
}
HEAVY = {"torch", "transformers", "peft", "datasets", "trl", "numpy", "bitsandbytes", "pyarrow", "matplotlib"}
COLD = [
    "lora_tune.errors",
    "lora_tune.recipe",
    "lora_tune.recipe_values",
    "lora_tune.recipe_file",
    "lora_tune.recipe_paths",
    "lora_tune.recipe_problems",
    "lora_tune.foreign_keys",
    "lora_tune.foreign_values",
    "lora_tune.foreign_sources",
    "lora_tune.recipe_import",
    "lora_tune.yaml_tree",
    "lora_tune.imports",
    "lora_tune.terminal",
    "lora_tune.disk",
    "lora_tune.interrupts",
    "lora_tune.cli",
    "lora_tune.model.source",
    "lora_tune.model.memory",
    "lora_tune.model.scaling",
    "lora_tune.training.sweep_space",
    "lora_tune.sweep",
    "lora_tune.model.cards",
    "lora_tune.model.device",
    "lora_tune.model.missing",
    "lora_tune.model.choice",
    "lora_tune.model.footprint",
    "lora_tune.model.speed",
    "lora_tune.model.activations",
    "lora_tune.model.calibration",
    "lora_tune.model.meta_shape",
    "lora_tune.data.amount",
    "lora_tune.plan",
    "lora_tune.model.machine",
    "lora_tune.model.conditions",
    "lora_tune.adapter.folder",
    "lora_tune.adapter.claim",
    "lora_tune.chat",
    "lora_tune.serving.deploy",
    "lora_tune.adapter.engine_arguments",
]  # fmt: skip
DISTRIBUTION = {"pynvml": "nvidia-ml-py", "pydantic_core": "pydantic", "ruamel": "ruamel.yaml"}


def layer(module: str) -> int:
    """The number of a module's layer; higher may import lower."""
    part = module.split(".")[1] if "." in module else "errors"  # the package itself holds the version alone
    if part in RECIPE_LAYER:
        return LAYERS["recipe"]
    if part in VERBS:
        return VERB_LAYER
    return LAYERS[part]


def imported(node: ast.stmt) -> list[str]:
    """The modules that an import statement names; `from a import b` counts as a.b where that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        below = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in below]
    return []


def imports(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that is imported anywhere in a module, with the statement."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in imported(node):
                yield name, node


def functions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_every_module_has_a_layer() -> None:
    assert len(MODULES) > 30
    unplaced = []
    for module in MODULES:
        try:
            layer(module)
        except KeyError:
            unplaced.append(module)
    assert unplaced == [], "give it a place in LAYERS or COMMANDS"


def test_imports_go_down() -> None:
    wrong = []
    for module in MODULES:
        for name, node in imports(module):
            if not name.startswith("lora_tune"):
                continue
            between_verbs = layer(module) == layer(name) == VERB_LAYER and module != "lora_tune.__main__"
            between_verbs &= (module, name) != ("lora_tune.rehearse", "lora_tune.cli")  # reads the table of commands
            if layer(name) > layer(module) or between_verbs:
                wrong.append(f"{module}:{node.lineno} imports {name}")
    assert wrong == []


def test_relative_imports_are_not_used() -> None:
    relative = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


@pytest.mark.parametrize("library", ADDRESSES)
def test_one_address_for_each_library(library: str) -> None:
    typing_only = {id(node) for tree in TREES.values() for node in typing_blocks(tree)}
    users = {
        module
        for module in MODULES
        for name, node in imports(module)
        if name.split(".")[0] == library and id(node) not in typing_only
    }
    assert users, f"nobody uses {library} any more"
    assert users <= ADDRESSES[library]


def typing_blocks(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything below `if TYPE_CHECKING:`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.body:
                yield from ast.walk(statement)


def test_cold_modules_import_nothing_heavy_at_the_top() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {COLD!r}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [f"{name} []" for name in COLD]


def test_files_and_functions_are_short() -> None:
    long_files = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in long_files.items() if lines > 400} == {}
    too_long, too_many = [], []
    for module in MODULES:
        for node in functions(module):
            if (node.end_lineno or 0) - node.lineno + 1 > 60:
                too_long.append(f"{module}:{node.lineno} {node.name}")
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            # a command has an argument for each option, a kernel one for each pointer, size and stride
            free = any(word in ast.unparse(by) for by in node.decorator_list for word in (".command(", "triton.jit"))
            if not free and len([name for name in names if name not in ("self", "cls")]) > 7:
                too_many.append(f"{module}:{node.lineno} {node.name}")
    assert too_long == [], "at most 60 lines"
    assert too_many == [], "at most 7 parameters"


def test_no_tunnels_and_no_globals() -> None:
    wrong = [
        f"{module}:{node.lineno} {node.name} takes **{node.args.kwarg.arg}"
        for module in MODULES
        for node in functions(module)
        if node.args.kwarg is not None and not node.name.startswith("on_")  # the form of transformers' callbacks
    ]
    wrong += [
        f"{module}:{node.lineno} global"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert wrong == []


EVERYTHING_BECOMES_A_MESSAGE = (
    "lora_tune.terminal",
    "lora_tune.data.template_child",
    "lora_tune.data.prompt_child",
    "lora_tune.serving.engine",
)


def test_nothing_is_swallowed() -> None:
    """`except Exception` stands where everything becomes a message, and nowhere else; `assert` checks no input."""
    wrong = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                wrong.append(f"{module}:{node.lineno} assert")
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if broad and not raises and module not in EVERYTHING_BECOMES_A_MESSAGE:
                    wrong.append(f"{module}:{node.lineno} broad except")
    assert wrong == []


def test_modules_and_public_functions_say_what_they_are() -> None:
    silent = [module for module, tree in TREES.items() if not ast.get_docstring(tree)]
    for module, tree in TREES.items():
        for node in public(tree):
            if not ast.get_docstring(node):
                silent.append(f"{module}:{node.lineno} {node.name}")
    assert silent == []


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and the public methods of those classes that are ours alone."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            upstream = any(ast.unparse(base).endswith(("Trainer", "Callback", "Module")) for base in node.bases)
            for method in [] if upstream else node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield method


def test_no_booleans_in_public_signatures() -> None:
    """Words instead of booleans, but for the switches of the command line."""
    wrong = []
    for module, tree in TREES.items():
        if layer(module) == VERB_LAYER:
            continue
        for node in public(tree):
            if isinstance(node, ast.FunctionDef):
                for argument in (*node.args.args, *node.args.kwonlyargs):
                    if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool":
                        wrong.append(f"{module}:{node.lineno} {node.name}({argument.arg})")
    assert wrong == []


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, extra in project["optional-dependencies"].items() if name != "test" for line in extra]
    lines = [*project["dependencies"], *extras]  # those of extras are imported where they are installed
    declared = {re.split(r"[<>=\[ ]", line)[0].lower().replace("_", "-") for line in lines}
    used = {name.split(".")[0] for module in MODULES for name, _ in imports(module)}
    foreign = used - set(sys.stdlib_module_names) - {"lora_tune"}
    names = {name: DISTRIBUTION.get(name, name).lower().replace("_", "-") for name in foreign}
    assert {name for name, distribution in names.items() if distribution not in declared} == set()
    assert set(names) <= set(packages_distributions()), "imported, but not installed"


def test_constraints_admit_the_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]]
    for file in ("tested.txt", "gpu.txt"):
        lines = (ROOT / "constraints" / file).read_text().splitlines()
        pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
        versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
        assert versions["torch"].count(".") == 2 and "+" not in versions["torch"]
        for requirement in needed:
            version = versions.get(canonicalize_name(requirement.name))
            assert version or file == "gpu.txt", f"{file} does not pin {requirement.name}"
            assert version is None or version in requirement.specifier, f"{file}: {requirement} is not met by {version}"


def test_the_project_speaks_of_itself() -> None:
    """No path of a developer's machine, and no word about who or what wrote the code."""
    words = re.compile(r"/(?:wor[k]|roo[t])/|/hom[e]/\w|\b(?:claud[e]|anthropi[c]|copilo[t])\b", re.IGNORECASE)
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".json", ".jinja", ""}
    found = []
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.suffix in suffixes and path.is_file() and path.stat().st_size < 500_000:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if words.search(line):
                    found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert found == []


def test_make_installs_torch_first_and_then_under_constraints(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "--dry-run", "quickstart"]
    command += [f"VENV={tmp_path}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert [line.split()[-1] for line in installs] == ["torch", "."]
    assert all(f"-c {tmp_path}/constraints.txt" in line for line in installs)
    assert done.stdout.splitlines()[-1].endswith("-m lora_tune.run recipes/quickstart.yaml --overwrite")


def test_make_uses_a_torch_that_is_there(tmp_path: Path) -> None:
    packages = tmp_path / "venv" / "lib" / "python3.99" / "site-packages"
    packages.mkdir(parents=True)
    command = [sys.executable, "constraints/own_torch.py", str(tmp_path / "venv"), "constraints/tested.txt"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    tested = (ROOT / "constraints" / "tested.txt").read_text()
    assert (tmp_path / "venv" / "constraints.txt").read_text() == re.sub(r"(torch|triton)==.*\n", "", tested)
    (folder,) = (packages / "own_torch.pth").read_text().splitlines()
    assert (Path(folder) / "torch" / "__init__.py").is_file()
    command.insert(1, "-S")  # a Python without site-packages has no torch
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "venv" / "constraints.txt").read_text() == tested
    assert not (packages / "own_torch.pth").exists()
