"""A comparison as text: on the screen, and as Markdown."""

from __future__ import annotations


def printed(models: list[str], judges: dict[str, dict], prompts: int) -> str:
    """Every judge's table and ranking, for a terminal. `judges` hold what `comparison.pool` returns."""
    blocks = []
    for judge, result in judges.items():
        width = max(9, *(len(name) for name in models))
        head = " ".join(f"{name[:9]:>9}" for name in models)
        lines = [f"\np(row ≻ column), judge {judge}, {prompts} prompts", f"{'':{width}}  {head}"]
        for name, row in zip(models, result["preference"], strict=True):
            lines.append(f"{name:{width}}  " + " ".join(f"{p:9.3f}" for p in row))
        lines.append(f"\n{'':{width}}  against the others     Nash  exploitability, by whom")
        for name in result["ranking"]:
            i = models.index(name)
            low, high = result["score_interval"][i]
            score = f"{result['score'][i]:.3f}  [{low:.3f}, {high:.3f}]"
            exploited = f"{result['exploitability'][i]:.3f}" + by_whom(result, name, i)
            lines.append(f"{name:{width}}  {score}  {result['nash'][i]:7.3f}  {exploited}")
        blocks.append("\n".join([*lines, mixture(models, result)]))
    return "\n".join(blocks)


def by_whom(result: dict, name: str, model: int) -> str:
    """The best response, where it is another model and wins."""
    best = result["best_response"][model]
    return f"  {best}" if best != name and result["exploitability"][model] > 0 else ""


def mixture(models: list[str], result: dict) -> str:
    """The Nash mixture in a sentence."""
    shares = sorted(zip(result["nash"], models, strict=True), reverse=True)
    told = ", ".join(f"{share:.3f} {name}" for share, name in shares if share > 0)
    if not result["nash_unique"]:
        return f"Nash mixture: {told} (one of several: some models tie)"
    return f"Nash mixture: {told}"


def markdown(models: list[str], judges: dict[str, dict], prompts: int) -> str:
    """Every judge's table with intervals, and its ranking. `judges` hold what `comparison.pool` returns."""
    lines = []
    for judge, result in judges.items():
        lines += [f"## Judge {cell(judge)}, {prompts} prompts", ""]
        lines += [
            "| p(row ≻ column) | " + " | ".join(map(cell, models)) + " |",
            "|---" * (len(models) + 1) + "|",
        ]
        for i, name in enumerate(models):
            cells = [
                shown(result["preference"][i][j], result["interval"][i][j], i == j)
                for j in range(len(models))
            ]
            lines.append(f"| {cell(name)} | " + " | ".join(cells) + " |")
        lines += [
            "",
            "| | against the others | share in the Nash mixture | exploitability | by |",
            "|---|---|---|---|---|",
        ]
        for name in result["ranking"]:
            i = models.index(name)
            columns = [shown(result["score"][i], result["score_interval"][i]), share(result, i)]
            columns += [f"{result['exploitability'][i]:.3f}", cell(by_whom(result, name, i).strip() or "–")]
            lines.append(f"| {cell(name)} | " + " | ".join(columns) + " |")
        lines += ["", mixture(models, result) + ".", ""]
        for name, told in (result.get("length_controlled") or {}).items():
            lines += [cell(length_controlled((models[0], name), told)) + ".", ""]
    lines.append("Brackets: 95 % bootstrap over prompts.")
    return "\n".join(lines) + "\n"


def length_controlled(names: tuple[str, str], told: dict) -> str:
    """What alpaca_eval says of a model, the second of `names`, against the first."""
    controlled, plain = told["length_controlled_winrate"], told["win_rate"]
    rates = f"{controlled:.1f} % length-controlled, {plain:.1f} % plain"
    return f"{names[1]} against {names[0]}: {rates}, by alpaca_eval"


def shown(value: float, bounds: list[float], same: bool = False) -> str:
    """A figure with its interval; of a model against itself the figure alone."""
    return f"{value:.3f}" if same else f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def share(result: dict, model: int) -> str:
    """A model's share in the mixture, with its interval where there is one."""
    bounds = result["nash_interval"]
    return shown(result["nash"][model], bounds[model] if bounds else [], same=not bounds)


def cell(text: str) -> str:
    """Text that cannot leave its cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
