"""A comparison as one HTML file: tables, plots and all replies side by side, readable without a network.

Replies are hostile: nothing of them is ever HTML. They lie in a JSON block in which no `<` stands, reach the
page as text nodes only, and the page's policy runs no script but its own, known by its hash, and fetches
nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json

CSS = """
:root { color-scheme: light; --ink: #1b1f24; --faint: #57606a; --line: #d0d7de; --link: #0550ae; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0 .8rem; max-width: 56rem; } .faint { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0; text-align: center; font-weight: normal; border: 1px solid #fff; }
th[scope=row] { text-align: right; padding: 0 .7rem; font-weight: 600; }
th[scope=col] { padding: .3rem .5rem; font-weight: 600; max-width: 9rem; overflow-wrap: anywhere; }
td button { display: block; width: 100%; min-width: 6.2rem; padding: .45rem .5rem; border: 0; color: inherit;
            background: none; font: inherit; cursor: pointer; }
td button small { display: block; font-size: .72rem; opacity: .8; }
td.same { color: var(--faint); background: #f6f8fa; }
td button[aria-pressed=true] { outline: 3px solid var(--ink); outline-offset: -3px; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 1px; }
table.ranking td, table.ranking th { border-bottom: 1px solid var(--line); padding: .3rem .8rem; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .6rem 1rem;
       align-items: end; padding: .7rem 0; background: #fff; border-bottom: 1px solid var(--line); }
label { display: grid; gap: .1rem; font-size: .8rem; color: var(--faint); }
select, input { font: inherit; font-size: .95rem; padding: .3rem .4rem; border: 1px solid #8c959f;
                border-radius: 5px; color: var(--ink); background: #fff; max-width: 17rem; }
input { width: 17rem; }
article { padding: .9rem 0 1rem; border-bottom: 1px solid var(--line); scroll-margin-top: 5rem; }
article:focus-visible { outline-offset: 4px; }
.prompt { font-weight: 600; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; margin-top: .5rem; }
.prompt, .reply { white-space: pre-wrap; overflow-wrap: anywhere; }
.reply { max-height: 24rem; overflow-y: auto; border-left: 4px solid var(--line); padding-left: .7rem; }
.reply.won { border-color: #2166ac; } .reply.lost { border-color: #d6604d; } .who { font-size: .8rem; color:
var(--faint); } .bar { height: 7px; margin-top: .5rem; background: #d6604d; border-radius: 4px; overflow:
hidden; } .bar i { display: block; height: 100%; background: #2166ac; } mark { background: #fff1a8; color:
inherit; } button.more { margin: 1rem 0; padding: .45rem 1rem; font: inherit; border: 1px solid #8c959f;
              border-radius: 5px; background: #f6f8fa; cursor: pointer; }
@media (max-width: 45rem) { .sides { grid-template-columns: 1fr; } form { position: static; } }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const pick = id => document.getElementById(id);
const PAGE = 40;
const state = { judge: 0, a: 0, b: 1, sort: "a", query: "", shown: PAGE };

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}
function fill(select, names) {
  names.forEach((name, i) => {
    const option = element("option", "", name);
    option.value = i;
    select.append(option);
  });
}
function marked(parent, text) {  // the text with what is searched for marked; text nodes only
  const query = state.query.toLowerCase(), low = text.toLowerCase();
  let from = 0;
  if (query && low.length === text.length) {
    for (let at = low.indexOf(query); at >= 0; at = low.indexOf(query, from)) {
      parent.append(text.slice(from, at), element("mark", "", text.slice(at, at + query.length)));
      from = at + query.length;
    }
  }
  parent.append(text.slice(from));
  return parent;
}
const preference = i => data.preference[state.judge][i][state.a][state.b];
function found() {
  const query = state.query.toLowerCase(), { a, b } = state;
  const texts = i => [data.prompts[i], data.replies[i][a], data.replies[i][b]];
  const has = i => texts(i).some(text => text.toLowerCase().includes(query));
  const rows = data.prompts.map((_, i) => i).filter(i => !query || has(i));
  const by = {
    a: i => -preference(i),
    b: preference,
    tie: i => Math.abs(preference(i) - 0.5),
    file: i => i,
  }[state.sort];
  return rows.sort((i, j) => by(i) - by(j) || i - j);
}
function card(i) {
  const p = preference(i), made = element("article");
  made.tabIndex = 0;
  made.dataset.row = i;
  made.append(marked(element("div", "prompt"), data.prompts[i]));
  made.firstChild.dir = "auto";
  const bar = element("div", "bar"), inner = element("i");
  inner.style.width = 100 * p + "%";
  bar.append(inner);
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", "p = " + p.toFixed(3));
  const sides = element("div", "sides");
  for (const [model, q] of [[state.a, p], [state.b, 1 - p]]) {
    const side = element("div"), fate = q > 0.5 ? " won" : q < 0.5 ? " lost" : "";
    const reply = element("div", "reply" + fate);
    reply.dir = "auto";
    marked(reply, data.replies[i][model]);
    if (!data.replies[i][model]) reply.append(element("span", "faint", "(empty)"));
    side.append(element("div", "who", data.models[model] + " · p = " + q.toFixed(3)), reply);
    sides.append(side);
  }
  made.append(bar, sides);
  return made;
}
function show(keep) {
  if (!keep) state.shown = PAGE;
  const rows = found(), list = pick("list");
  list.replaceChildren(...rows.slice(0, state.shown).map(card));
  pick("count").textContent = rows.length + " of " + data.prompts.length + " prompts" +
    (rows.length > state.shown ? ", the first " + state.shown + " shown" : "");
  pick("more").hidden = rows.length <= state.shown;
  for (const name of ["judge", "a", "b", "sort"]) pick(name).value = state[name];
  if (pick("query").value !== state.query) pick("query").value = state.query;
  for (const cell of document.querySelectorAll("td button")) {
    const on = ["judge", "a", "b"].every(name => +cell.dataset[name] === state[name]);
    cell.setAttribute("aria-pressed", on);
  }
  const words = new URLSearchParams();
  for (const name of ["judge", "a", "b"]) words.set(name, state[name]);
  words.set("sort", state.sort);
  if (state.query) words.set("q", state.query);
  try {
    history.replaceState(null, "", "#" + words);
  } catch (error) { /* some browsers refuse it for files */ }
}
function read() {  // the page's address drives it: a view can be sent to somebody
  const words = new URLSearchParams(location.hash.slice(1));
  const number = (name, count) => {
    const value = Number(words.get(name));
    if (words.has(name) && Number.isInteger(value) && value >= 0 && value < count) state[name] = value;
  };
  number("judge", data.judges.length); number("a", data.models.length); number("b", data.models.length);
  if (["a", "b", "tie", "file"].includes(words.get("sort"))) state.sort = words.get("sort");
  state.query = words.get("q") || "";
  show();
}
fill(pick("judge"), data.judges); fill(pick("a"), data.models); fill(pick("b"), data.models);
pick("form").addEventListener("submit", event => event.preventDefault());
for (const name of ["judge", "a", "b", "sort"]) {
  pick(name).addEventListener("change", event => {
    state[name] = name === "sort" ? event.target.value : +event.target.value;
    show();
  });
}
pick("query").addEventListener("input", event => { state.query = event.target.value; show(); });
pick("more").addEventListener("click", () => { state.shown += PAGE; show(true); });
for (const cell of document.querySelectorAll("td button")) {
  cell.addEventListener("click", () => {
    for (const name of ["judge", "a", "b"]) state[name] = +cell.dataset[name];
    show();
    pick("replies").scrollIntoView();
  });
}
addEventListener("hashchange", read);
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  const cards = [...document.querySelectorAll("article")], at = cards.indexOf(document.activeElement);
  const next = { j: at + 1, k: at - 1 }[event.key];
  if (event.key === "/") { event.preventDefault(); pick("query").focus(); }
  else if (cards[next]) { event.preventDefault(); cards[next].focus(); }
});
read();
document.documentElement.dataset.ready = "yes";
"""


def page(models: list[str], judges: dict[str, dict], replies: tuple[list, list, dict]) -> str:
    """The page. `judges` hold what `comparison.pool` returns; `replies` are the prompts, replies
    [prompt][model], and of each judge p(row ≻ column), [prompt][row][column]."""
    prompts, texts, tables = replies
    sections = [section(models, number, judge, judges[judge]) for number, judge in enumerate(judges)]
    data = {
        "models": models,
        "judges": list(judges),
        "prompts": prompts,
        "replies": texts,
        "preference": [rounded(table) for table in tables.values()],
    }
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    own = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    policy = f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"
    title = f"{len(models)} models, {len(prompts)} prompts"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{escaped(title)}</h1>
<p class="faint">{escaped(", ".join(models))}. Brackets and bars: 95&nbsp;% bootstrap over prompts.</p>
<main>
{"".join(sections)}
<h2 id="replies">Replies side by side</h2>
<form id="form" aria-label="Which replies">
<label>judge <select id="judge"></select></label>
<label>model a <select id="a"></select></label>
<label>model b <select id="b"></select></label>
<label>order <select id="sort">
<option value="a">a preferred most</option><option value="b">b preferred most</option>
<option value="tie">closest to a tie</option><option value="file">as in the file</option></select></label>
<label>search <input id="query" type="search" placeholder="in prompt and replies" autocomplete="off"></label>
<span id="count" class="faint" role="status"></span>
</form>
<p class="faint">Keys: <kbd>/</kbd> search, <kbd>j</kbd> and <kbd>k</kbd> next and previous. A cell of the
table picks its pair. Blue: preferred, red: not.</p>
<div id="list"></div>
<button id="more" class="more" type="button" hidden>Show more</button>
<noscript><p>The replies need JavaScript; they also lie in comparisons.jsonl beside this page.</p></noscript>
</main>
<script type="application/json" id="data">{as_data(data)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def as_data(value) -> str:
    """JSON that cannot end its script element, whatever text is in it: ASCII, and no `<`, `>` or `&`."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def escaped(text: str) -> str:
    """Text for HTML, in an element or an attribute."""
    return html.escape(text, quote=True)


def rounded(table: list) -> list:
    """Nested lists of probabilities with four digits: less to load."""
    return [rounded(part) for part in table] if isinstance(table, list) else round(table, 4)


def section(models: list[str], number: int, judge: str, result: dict) -> str:
    """One judge's table and plot."""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in models)
    rows = []
    for i, name in enumerate(models):
        cells = "".join(table_cell(models, number, result, (i, j)) for j in range(len(models)))
        rows.append(f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>')
    return f"""<section aria-label="Judge {escaped(judge)}">
<h2>Judge {escaped(judge)}: p(row ≻ column)</h2>
<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>
<p>{escaped(mixture(models, result))}</p>
<div class="wide">{plot(models, result)}</div>
</section>
"""


def table_cell(models: list[str], number: int, result: dict, pair: tuple[int, int]) -> str:
    """A pair's preference in its colour, a button that shows its replies."""
    i, j = pair
    if i == j:
        return '<td class="same">½</td>'
    p, (low, high) = result["preference"][i][j], result["interval"][i][j]
    label = f"{models[i]} against {models[j]}: {p:.3f}, between {low:.3f} and {high:.3f}; show the replies"
    back, ink = heat(p)
    pair_data = f'data-judge="{number}" data-a="{i}" data-b="{j}"'
    return (
        f'<td style="background:{back};color:{ink}">'
        f'<button type="button" {pair_data} aria-pressed="false" aria-label="{escaped(label)}">'
        f"{p:.3f}<small>{low:.3f} – {high:.3f}</small></button></td>"
    )


def heat(p: float) -> tuple[str, str]:
    """Background and text: blue above ½, red below, white at it."""
    end = (33, 102, 172) if p > 0.5 else (178, 24, 43)
    strength = min(1.0, abs(p - 0.5) * 2) ** 0.8
    red, green, blue = (round(255 + strength * (channel - 255)) for channel in end)
    return f"rgb({red},{green},{blue})", "#fff" if strength > 0.6 else "#1b1f24"


def mixture(models: list[str], result: dict) -> str:
    """The equilibrium in words."""
    shares = sorted(zip(result["nash"], models, strict=True), reverse=True)
    told = ", ".join(f"{share:.1%} {name}" for share, name in shares if share > 0)
    several = "" if result["nash_unique"] else " It is one of several, as some models tie."
    return f"Nash mixture of this pool, which no model in it is preferred to: {told}.{several}"


PANELS = (  # (title, key, key of intervals, right end of the axis)
    ("mean preference against the others", "score", "score_interval", 1.0),
    ("share in the Nash mixture", "nash", "nash_interval", 1.0),
    ("exploitability in this pool", "exploitability", None, 0.5),
)


def plot(models: list[str], result: dict) -> str:
    """Three panels, a line a model, in the order of the ranking."""
    left, width, gap, line = 8 * min(26, max(map(len, models))) + 20, 230, 64, 26
    order = [models.index(name) for name in result["ranking"]]
    height = 30 + line * len(order) + 26
    parts = []
    for place, model in enumerate(order):
        name = models[model] if len(models[model]) <= 26 else models[model][:25] + "…"
        parts.append(
            f'<text x="{left - 12}" y="{48 + line * place}" text-anchor="end">{escaped(name)}</text>'
        )
    for number, (title, key, bounds_key, end) in enumerate(PANELS):
        start, scale = left + number * (width + gap), width / end
        parts.append(f'<text x="{start}" y="16" font-weight="600">{title}</text>')
        for tick in (0, end / 2, end):
            x, dash = start + tick * scale, ' stroke-dasharray="3 3"' if tick == end / 2 else ""
            parts.append(f'<line x1="{x}" x2="{x}" y1="26" y2="{height - 24}" stroke="#d0d7de"{dash}/>')
            parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
        for place, model in enumerate(order):
            value, y = result[key][model], 43 + line * place
            bounds = result[bounds_key][model] if bounds_key and result[bounds_key] else None
            told = f"{models[model]}: {value:.3f}" + (
                f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
            )
            bar = f'<rect x="{start}" y="{y - 7}" width="{value * scale:.1f}" height="14" fill="#92b8dc"/>'
            whisker = ""
            if bounds:
                x1, x2 = (start + bound * scale for bound in bounds)
                whisker = (
                    f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}" stroke="#1b1f24" stroke-width="2"/>'
                )
            after = start + max([value, *(bounds or [])]) * scale + 6
            figure = f'<text x="{after:.1f}" y="{y + 5}">{value:.3f}</text>'
            parts.append(f"<g><title>{escaped(told)}</title>{bar}{whisker}{figure}</g>")
    total = left + len(PANELS) * (width + gap)
    label = "Ranking, Nash mixture and exploitability"
    size = f'width="{total}" height="{height}" viewBox="0 0 {total} {height}"'
    return f'<svg {size} role="img" aria-label="{label}">{"".join(parts)}</svg>'
