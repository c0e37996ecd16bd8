"""What users read must be true: every flag documented and used, recipes' help, README's commands, imports."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import afd
import experiment
import ipo_md
import nash_md
import preference_model
import selm
import spin
from cleanalign import command_line

ROOT = Path(__file__).parent.parent
SCRIPTS = {"selm": selm, "ipo_md": ipo_md, "nash_md": nash_md, "afd": afd, "spin": spin}
SCRIPTS["preference_model"] = preference_model


def docstrings(file: str, name: str) -> dict[str, str]:
    """The documented fields of a class in a file of the root, each with the text below it."""
    tree = ast.parse((ROOT / file).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    pairs = zip(body, body[1:], strict=False)
    return {
        field.target.id: doc.value.value
        for field, doc in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_documented_and_read(name):
    documented = docstrings("experiment.py", "RunArgs") | docstrings(f"{name}.py", "Args")
    source = (ROOT / f"{name}.py").read_text()
    shared = [ROOT / "experiment.py", ROOT / "common.py", *sorted((ROOT / "cleanalign").glob("*.py"))]
    if "from rewards import" in source:
        shared.append(ROOT / "rewards.py")
    source += "".join(file.read_text() for file in shared)
    for field in dataclasses.fields(SCRIPTS[name].Args):
        assert len(documented.get(field.name, "")) > 15, f"--{field.name} has no docstring"
        assert re.search(rf"args\.{field.name}\b", source), f"--{field.name} is never read"


@pytest.mark.parametrize("name,recipe", [(n, r) for n, module in SCRIPTS.items() for r in module.RECIPES])
def test_help_shows_the_recipe(name, recipe, capsys):
    module = SCRIPTS[name]
    with pytest.raises(SystemExit) as stop:
        command_line.command_line(module.main, module.RECIPES, ["--model", recipe, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "arXiv" in text and f"python {name}.py" in text
    values = dataclasses.asdict(module.RECIPES[recipe])
    for flag in ("beta", "batch_size", "max_new_tokens"):
        if flag in values:
            assert re.search(
                rf"--{flag.replace('_', '-')}\b[^)]*default: {re.escape(str(values[flag]))}\)", text, re.S
            ), flag


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_what_inherited_flags_mean(name, capsys):
    """The machine's flags stand in `RunArgs` alone; a reader of `--help` is told of them all the same."""
    module = SCRIPTS[name]
    with pytest.raises(SystemExit):
        command_line.command_line(module.main, module.RECIPES, ["--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    inherited = docstrings("experiment.py", "RunArgs")
    assert set(inherited) == {field.name for field in dataclasses.fields(experiment.RunArgs)}
    for field, doc in inherited.items():
        assert f"--{field.replace('_', '-')}" in text and " ".join(doc.split()) in text, field


def test_flags_given_by_hand_win_over_the_recipe():
    args = command_line.parse(selm.RECIPES, ["--model", "llama3-8b", "--beta", "0.5"])
    assert (args.beta, args.alpha, args.learning_rate) == (0.5, 1e-4, (1.5e-5, 9e-6, 3e-6))
    assert command_line.parse(selm.RECIPES, ["--model=meta-llama/Meta-Llama-3-8B-Instruct"]).alpha == 1e-4


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_weights_are_trained_at_lower_rates_than_an_adapter(name):
    recipes = SCRIPTS[name].RECIPES
    for model, recipe in recipes.items():
        argv = ["--model", model, "--lora-rank", "0"]
        args = command_line.parse(recipes, argv)
        rates = [field for field in dataclasses.asdict(recipe) if field.endswith("learning_rate")]
        for rate in rates:
            adapter, whole = np.min(getattr(recipe, rate)), np.min(getattr(args, rate))
            assert whole < adapter / 4 if recipe.lora_rank else whole == adapter, (model, rate)
        by_hand = command_line.parse(recipes, [*argv, f"--{rates[0].replace('_', '-')}", "1e-3"])
        assert np.max(getattr(by_hand, rates[0])) == 1e-3
    if name == "selm":  # the paper's
        assert args.learning_rate == (5e-7, 3e-7, 1e-7)


def commands(text: str) -> list[str]:
    """Lines of fenced shell blocks that run one of our scripts."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        line.split("#")[0].strip()
        for line in lines
        if re.search(r"\bpython (selm|ipo_md|nash_md|afd|spin|preference_model)\.py", line)
    ]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_commands_in_the_documentation_parse(page):
    for line in commands((ROOT / page).read_text()):
        words = shlex.split(line[line.index("python ") :])
        name, argv = Path(words[1]).stem, words[2:]
        if "--resume" in argv or "--help" in argv or name not in SCRIPTS:
            continue
        assert command_line.parse(SCRIPTS[name].RECIPES, [w for w in argv if w not in ("&&",)])


def test_readme_names_existing_files():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_imports_are_light():
    """No optional package, network or model at import."""
    heavy = (
        "vaderSentiment textblob chitchat_dataset matplotlib tensorboard wandb datasets peft pyarrow".split()
    )
    code = f"import sys, {', '.join(SCRIPTS)}; loaded = [m for m in {heavy} if m in sys.modules]; "
    code += "assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
