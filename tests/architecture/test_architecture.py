"""Who may import whom, who may read what, and that a method comes with all its touches."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_backdoor_defense.registry import (
    ATTACKS,
    COMPARATORS,
    CONTROLS,
    DEFENSES,
    DETECTORS,
    FILTERS,
    GENERATIVE,
    PRETRAINING,
    PURIFIERS,
)

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_backdoor_defense"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# Left of an arrow may import right of it; every floor lists all that it may see of ours.
FLOORS = {
    "functional": {"functional"},
    "objectives": {"functional"},
    "fetching": set(),
    "filters": {"functional", "fetching"},
    "models": {"functional"},
    "targets": {"functional"},
    "adapters": {"functional", "models"},
    "pretrained": {"functional", "models"},
    "vision": {"functional", "models"},
    "classifiers": {"functional", "models", "targets", "adapters", "pretrained", "vision"},
}
FLOORS["defenses"] = {
    "functional",
    "objectives",
    "fetching",
    "filters",
    "models",
    "adapters",
    "targets",
    "pretrained",
    "defenses",
}
FLOORS["trainers"] = FLOORS["defenses"] | {"trainers", "data"}
FLOORS["input_filters"] = FLOORS["trainers"] | {"input_filters"}
FLOORS["data"] = {"fetching", "data"}
FLOORS["warm_up"] = FLOORS["trainers"] | {"data"}
FLOORS["attacks"] = FLOORS["trainers"] | {"attacks", "data"}
FLOORS["evaluation"] = FLOORS["attacks"] | {"evaluation", "input_filters", "warm_up"}
FLOORS["reporting"] = {"evaluation", "reporting"}
FLOORS["registry"] = {"objectives", "filters"}
FLOORS["experiment"] = FLOORS["evaluation"] | {"reporting", "experiment", "registry", "vision", "classifiers"}
FLOORS["scan"] = {"models", "functional", "scan"}
FLOORS["hub"] = FLOORS["experiment"] | {"scan", "hub"}
FLOORS["cli"] = FLOORS["hub"] | {"cli", "__init__"}
NOTHING_OF_OURS = {"attacks/triggers.py", "attacks/image_triggers.py", "data/pixels.py", "evaluation/metrics.py"}
LATE = {"trl", "peft", "evaluate", "matplotlib", "sklearn"}
MAY_AT_THE_TOP = {"trainers/sft.py": {"trl"}}  # a class that inherits from trl's cannot wait for it


def floor(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, top_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    relative = str(path.relative_to(PACKAGE))
    ours = {name for name in imports(path) if name.split(".")[0] == "hf_backdoor_defense"}
    seen = {(name.split(".") + ["__init__"])[1] for name in ours}
    if relative in NOTHING_OF_OURS:
        assert not ours
    elif relative != "__init__.py":
        assert seen <= FLOORS[floor(path)], f"{relative} imports {seen - FLOORS[floor(path)]}"
    late = {name.split(".")[0] for name in imports(path, top_only=True)} & (LATE - MAY_AT_THE_TOP.get(relative, set()))
    assert not late, f"{relative} imports {late} at the top"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if floor(p) in ("defenses", "input_filters")], ids=lambda p: p.name
)
def test_no_defense_reads_is_poisoned(path):
    code = ast.unparse(ast.parse(path.read_text()))
    assert "is_poisoned" not in code and "IS_POISONED" not in code and "original_label" not in code


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle_no_remote_code_no_user_assert_and_no_private_trainer(path):
    tree = ast.parse(path.read_text())
    names = set(imports(path))
    assert not names & {"pickle", "dill", "cloudpickle", "joblib"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            raise AssertionError(f"{path}: torch.load")
        if isinstance(node, ast.Attribute) and re.match(r"(super\(\)|trainer)\._(?!_)", ast.unparse(node)):
            raise AssertionError(f"{path}: {ast.unparse(node)}: nothing private of the Trainer")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_and_docstrings(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450, f"{path} holds two ideas"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize(
    "table", [DEFENSES, COMPARATORS, CONTROLS, PRETRAINING, PURIFIERS, GENERATIVE, DETECTORS, ATTACKS, FILTERS]
)
def test_a_method_comes_with_all_its_touches(table):
    for name, where in table.items():
        folder, _, module = where.partition(":")[0].removeprefix("hf_backdoor_defense.").rpartition(".")
        assert (PACKAGE / folder / f"{module}.py").is_file()
        tests = ROOT / "tests" / folder / f"test_{module}.py"
        assert tests.is_file(), f"{tests} is missing"
        choosing = (ROOT / "docs" / "choosing.md").read_text()
        papers = (ROOT / "docs" / "papers.md").read_text()
        assert re.search(rf"^\| `{name}` ", choosing, re.M), f"docs/choosing.md has no row for {name}"
        assert f"## `{name}`" in papers, f"docs/papers.md has no section for {name}"


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, hf_backdoor_defense as h, hf_backdoor_defense.cli.main as m; m.main(['--help']);"
        "bad = {'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules); assert not bad, bad;"
        "assert 'DeCETrainer' in dir(h) and h.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, timeout=60)


def test_every_public_name_resolves():
    import hf_backdoor_defense

    for name in hf_backdoor_defense.__all__:
        assert getattr(hf_backdoor_defense, name) is not None
    with pytest.raises(AttributeError):
        hf_backdoor_defense.nothing  # noqa: B018


def test_no_machine_paths_in_the_tree():
    pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(work|root|home)/")
    for path in [*MODULES, *ROOT.glob("*.*"), *(ROOT / "docs").rglob("*"), *(ROOT / "tests").rglob("*.py")]:
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".cff", ".txt") and path != Path(__file__):
            assert not pattern.search(path.read_text()), path
