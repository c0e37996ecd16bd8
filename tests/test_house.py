"""The house's law: who may import whom, what is imported late, how long and how wide things may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {  # a module of the root imports modules of a lower level only; below them all lies cleanalign/
    **dict.fromkeys(("selm", "ipo_md", "nash_md", "afd", "spin", "preference_model", "evaluate"), 4),
    "rewards": 3,
    "experiment": 2,
    **dict.fromkeys(("judges", "common"), 1),
}
OPTIONAL = {  # may be missing, or are not needed by every run; `resource` is missing on Windows
    "alpaca_eval",
    "chitchat_dataset",
    "datasets",
    "gguf",
    "matplotlib",
    "peft",
    "pyarrow",
    "resource",
    "textblob",
    "torch.utils.tensorboard",
    "vaderSentiment",
    "wandb",
}
# users rely on the arguments of these losses
CONTRACT = {"selm_loss", "preference_loss", "nash_md_loss", "discriminator_loss"}

FILES = {path.stem: path for path in ROOT.glob("*.py")}
SCRIPTS = [name for name in FILES if LEVELS.get(name) == 4]
PACKAGE = {f"cleanalign.{path.stem}": path for path in (ROOT / "cleanalign").glob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in {**FILES, **PACKAGE}.items()}


def imported(tree: ast.AST) -> list[str]:
    """Every module a piece of code imports by statement, `from cleanalign import data` as cleanalign.data."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import names its module in full"
            inside = node.module == "cleanalign"
            names += [f"cleanalign.{alias.name}" for alias in node.names] if inside else [node.module]
    return names


def functions(name: str) -> list[ast.FunctionDef]:
    """Every function of a module, methods and inner ones among them."""
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]


def is_optional(module: str) -> bool:
    """Whether it is one of `OPTIONAL`, or within one."""
    return any(module == name or module.startswith(name + ".") for name in OPTIONAL)


@pytest.mark.parametrize("name", FILES)
def test_the_root_imports_lower_rooms_only(name):
    assert name in LEVELS, f"{name}.py has no room: give it a level here"
    for module in imported(TREES[name]):
        if module in FILES:
            assert LEVELS[module] < LEVELS[name], f"{name}.py imports {module}"
        assert not module.startswith("cleanalign") or module in PACKAGE, f"{name}.py: there is no {module}"


@pytest.mark.parametrize("name", PACKAGE)
def test_the_package_knows_nothing_of_the_root(name):
    assert not [module for module in imported(TREES[name]) if module in FILES]


def test_the_package_has_no_circle():
    needs = {name: {m for m in imported(TREES[name]) if m in PACKAGE} for name in PACKAGE}
    while ready := [name for name, modules in needs.items() if not modules]:
        for name in ready:
            del needs[name]
        needs = {name: modules - set(ready) for name, modules in needs.items()}
    assert not needs, f"in or above a circle: {needs}"


@pytest.mark.parametrize("name", TREES)
def test_only_optional_packages_are_imported_late(name):
    """And they are imported late, by a statement within a function or by `optional_import`."""
    for function in functions(name):
        late = imported(function)
        late += [
            call.args[0].value
            for call in ast.walk(function)
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "optional_import"
        ]
        for module in late:
            assert is_optional(module), f"{name}.{function.name} imports {module} late"
    for node in TREES[name].body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not any(map(is_optional, imported(node))), f"{name}: {ast.unparse(node)}"


@pytest.mark.parametrize("name", [*SCRIPTS, "experiment"])
def test_functions_take_at_most_five_arguments(name):
    for function in functions(name):
        count = len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs)
        assert count <= 5 or function.name in CONTRACT, f"{name}.{function.name} takes {count}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_main_is_read_at_a_glance(name):
    main = next(function for function in functions(name) if function.name == "main")
    assert main.end_lineno - main.lineno + 1 <= 60


@pytest.mark.parametrize("path", [*FILES.values(), *PACKAGE.values()], ids=lambda path: path.name)
def test_no_line_is_wider_than_a_page(path):
    wide = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert not wide, f"lines {wide}"


def test_only_the_package_is_installed():
    """Twelve names as general as `common` do not belong into a user's site-packages."""
    text = (ROOT / "pyproject.toml").read_text()
    settings = re.search(r"^\[tool\.setuptools\]\n(.*?)(?=^\[)", text, re.S | re.M).group(1)
    assert settings.strip() == 'packages = ["cleanalign"]' and "[tool.setuptools." not in text
    # no folder within it that would be left out
    assert set((ROOT / "cleanalign").rglob("*.py")) == set(PACKAGE.values())
