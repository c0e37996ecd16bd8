"""The documentation site, built from README.md, CONTRIBUTING.md, docs/ and notebooks/ as they stand.

    pip install -e '.[docs]'
    python docs/website.py           # writes build/site; a broken link or anchor ends it with 1
    python -m http.server -d build/site

The pages are written for a code host, where a link may lead to any file of the repository. So they are
staged first, in build/site-source: README.md becomes the first page, a linked source file or folder becomes
a page of its own, a picture or a result is copied, a formula becomes MathML, and zensical builds that in
its strict mode. Then every link and anchor of the built pages is followed, the hand-written ones and the
menu's among them. Nothing in docs/ is changed, and the site fetches nothing from elsewhere.
"""

from __future__ import annotations

import ast
import html.parser
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"  # ignored by git
MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # of the root; all else lies in docs/
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(?ms)^(```+|~~~+).*?^\1[^\n]*$")
LANGUAGE = {".py": "python", ".sh": "bash", ".toml": "toml", ".md": "markdown", ".c": "c", ".html": "html"}
API = (  # (heading, what it is, the objects of the page): everything from their docstrings
    ("common", "Text to tokens to samples to log-probs; micro-batches.", ("common",)),
    ("The losses", "Pure functions of tensors; tests, games and training call the same ones.",
     ("selm.selm_loss", "ipo_md.preference_loss", "nash_md.nash_md_loss", "afd.discriminator_loss")),
    ("What a step shares", "", ("experiment.Experiment",)),
)  # fmt: skip
CSS = """
.md-typeset math[display=block] { overflow-x: auto; padding: .6em 0; font-size: 1.08em; }
.md-typeset img { border-radius: 4px; } [data-md-color-scheme=slate] .md-content img { background: #fff; }
.md-typeset table:not([class]) { font-size: .68rem; }
.md-typeset table:not([class]) :is(td, th) { min-width: 0; padding: .55em .9em; }
.games { display: block; width: 100%; height: min(86vh, 60rem); }
.games { border: 1px solid #8886; border-radius: 10px; }
.narrow { display: none; }
@media (max-width: 45em) { .games { display: none; } .narrow { display: block; } }
"""
GAMES = '<iframe class="games" src="games.html" title="The games, played" loading="lazy"></iframe>\n'


class Stage:
    """The pages as zensical reads them, with what they link to."""

    def __init__(self, folder: Path):
        self.docs = folder / "docs"
        shutil.rmtree(folder, ignore_errors=True)
        self.docs.mkdir(parents=True)
        self.waiting: list[str] = []  # files and folders of the repository that need a page
        self.seen: set[str] = set()

    def write(self, name: str, text: str) -> None:
        """A page, by its name within the site's sources."""
        target = self.docs / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def page(self, source: str) -> None:
        """A Markdown file of the repository."""
        self.write(placed(source), self.rewritten(source, (ROOT / source).read_text()))

    def rewritten(self, source: str, text: str) -> str:
        """Its text with links that lead where the site has their targets, and formulae as MathML."""
        text = re.sub(r"(?ms)^```math\n(.*?)^```$", lambda found: mathml(found[1]), text)
        parts, end = [], 0
        for fence in FENCE.finditer(text):  # code is no text: nothing in it is a link
            parts += [self._links(source, text[end : fence.start()]), fence[0]]
            end = fence.end()
        return "".join([*parts, self._links(source, text[end:])])

    def _links(self, source: str, text: str) -> str:
        return LINK.sub(lambda found: found[1] + self.link(source, found[2]) + found[3], text)

    def link(self, source: str, address: str) -> str:
        """An address in `source`, as the staged page has to say it."""
        parts = urlsplit(address)
        if parts.scheme or not parts.path:
            return address
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(parts.path)))
        if not (ROOT / target).exists() or target.startswith(".."):
            raise SystemExit(f"{source} links to {address}: there is no {target}")
        self.need(target)
        here = posixpath.dirname(placed(source))
        return posixpath.relpath(placed(target), here or ".") + (
            f"#{parts.fragment}" if parts.fragment else ""
        )

    def need(self, target: str) -> None:
        """Make sure that a file or folder of the repository is on the site."""
        place = placed(target)
        if target in self.seen or not place.startswith(("source/", "files/")):
            return  # docs/ is on the site as it stands
        self.seen.add(target)
        if place.startswith("files/"):
            copy = self.docs / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / target, copy)
        else:
            self.waiting.append(target)

    def sources(self) -> None:
        """A page for each file and folder that some page links to."""
        while self.waiting:
            target = self.waiting.pop()
            if (ROOT / target).is_dir():
                self.write(placed(target), self.listing(target))
            else:
                self.write(placed(target), code_page(target))

    def listing(self, folder: str) -> str:
        """A folder's files, those that can be read."""
        lines = []
        for path in tracked(folder):
            if path.suffix in (*LANGUAGE, ".json") and path.parent == ROOT / folder:
                name = path.relative_to(ROOT).as_posix()
                address = self.link("README.md", name)
                here = posixpath.dirname(placed(folder))
                lines.append(f"- [`{path.name}`]({posixpath.relpath(address, here)}){summary(path)}")
        return f"# {folder}/\n\n" + "\n".join(lines) + "\n"


def tracked(folder: str) -> list[Path]:
    """The files of a folder, those of git where there is git."""
    asked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True)
    names = asked.stdout.split("\n") if asked.returncode == 0 else []
    found = [ROOT / name for name in names if name and (ROOT / name).exists()]
    return found or sorted(path for path in (ROOT / folder).iterdir() if path.is_file())


def placed(path: str) -> str:
    """Where a file or folder of the repository lies within the site's sources."""
    if path in MOVED:
        return MOVED[path]
    if path.startswith("docs/") and not path.endswith((".py", ".toml")) and path != "docs/play.html":
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return "source/index.md" if path == "." else f"source/{path.rstrip('/')}/index.md"
    if path.endswith((".png", ".json", ".csv", ".svg")):
        return f"files/{path}"
    return f"source/{path.removeprefix('.')}.md"


def summary(path: Path) -> str:
    """The first sentence of a Python file's docstring, for a listing."""
    found = re.match(r'(?s)"""(.*?)(?:\n\n|""")', path.read_text()) if path.suffix == ".py" else None
    if not found:
        return ""
    first = re.split(r"(?<=[.:])\s", " ".join(found[1].split()))[0].rstrip(".:")
    return ": " + first.replace("<", "&lt;")


def code_page(path: str) -> str:
    """A source file to read, with line numbers."""
    text, language = (ROOT / path).read_text(), LANGUAGE.get(Path(path).suffix, "text")
    ticks = "`" * max(4, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    front = "---\nhide: [navigation, toc]\nsearch: {exclude: true}\n---\n\n"
    return f'{front}# {path}\n\n{ticks}{language} linenums="1"\n{text.rstrip()}\n{ticks}\n'


def mathml(formula: str) -> str:
    """A TeX formula as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    return convert(" ".join(formula.split()), display="block")


def notebook(path: Path) -> str:
    """A notebook's percent source as a page: its Markdown cells as they are, its code as code."""
    cells = re.split(r"(?m)^# %%", path.read_text().split("# ---\n", 2)[-1])[1:]
    parts = []
    for cell in cells:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            parts.append(re.sub(r"(?m)^# ?", "", body).strip())
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def quoted(source: str) -> str:
    """A module in whose docstrings `[prompt][completion]` is code: Markdown would take it for a link."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        has = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        for n in range(node.body[0].lineno - 1, node.body[0].end_lineno) if has else ():
            lines[n] = re.sub(r"(?:\[\w+\]){2,}", r"`\g<0>`", lines[n])
    return "".join(lines)


def api() -> str:
    """The page of docstrings."""
    parts = [
        "# API\n\nFrom the docstrings. How the rooms build on each other: [Contributing](contributing.md#the-rooms)."
    ]
    for heading, about, objects in API:
        parts += [f"## {heading}", about, *(f"::: {name}" for name in objects)]
    return "\n\n".join(part for part in parts if part) + "\n"


def stage(folder: Path) -> None:
    """Write what zensical reads."""
    staged = Stage(folder)
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
    staged.seen |= {
        path.relative_to(ROOT).as_posix() for path in notebooks
    }  # no link needs their bare source
    for path in notebooks:
        name = path.relative_to(ROOT).as_posix()
        staged.write(placed(name), staged.rewritten(name, notebook(path)))
    for name in MOVED:
        staged.page(name)
    for path in sorted((ROOT / "docs").glob("*.md")):
        staged.page(path.relative_to(ROOT).as_posix())
    shutil.copytree(ROOT / "docs" / "figures", staged.docs / "figures")
    shutil.copyfile(ROOT / "docs" / "games.html", staged.docs / "games.html")
    games = staged.docs / "games.md"
    picture = re.search(r"(?m)^!\[.*\n", games.read_text())[0]
    linked = f"[{picture.strip()}](games.html){{ .narrow }}\n"  # a telephone opens the page by itself
    games.write_text(games.read_text().replace(picture, f"{GAMES}\n{linked}"))
    staged.write("api.md", api())
    modules = folder / "modules"
    modules.mkdir()
    for path in ROOT.glob("*.py"):
        (modules / path.name).write_text(quoted(path.read_text()))
    staged.sources()
    staged.write("site.css", CSS)
    settings = (ROOT / "docs" / "zensical.toml").read_text()
    if notebooks:
        titles = [(re.search(r"(?m)^# # (.*)$", path.read_text())[1], path) for path in notebooks]
        lines = [
            f'    {{ "{title}" = "{placed(path.relative_to(ROOT).as_posix())}" }},' for title, path in titles
        ]
        block = '  { "Notebooks" = [\n' + "\n".join(lines) + "\n  ] },\n"
        settings = settings.replace('  { "Theory" = [', block + '  { "Theory" = [')
    (folder / "zensical.toml").write_text(settings)


class Page(html.parser.HTMLParser):
    """The links and anchors of a built page."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]


def aimed(site: Path, page: Path, link: str) -> Path:
    """The file of the site that a link on a page leads to."""
    name = unquote(urlsplit(link).path)
    if not name:
        return page
    target = (site / name.lstrip("/") if name.startswith("/") else page.parent / name).resolve()
    return target / "index.html" if target.is_dir() else target


def broken(site: Path) -> list[str]:
    """Every link of the built pages that leads nowhere within the site. (A fragment of games.html is no
    anchor: it says what is shown there.)"""
    site = site.resolve()
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html") if path.is_file()}
    found = []
    for path, page in sorted(pages.items()):
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target, anchor = aimed(site, path, link), unquote(parts.fragment)
            no_page = target not in pages or target.name == "games.html"
            if not target.exists():
                found.append(f"{path.relative_to(site)}: {link}")
            elif anchor and not no_page and anchor not in pages[target].anchors:
                found.append(f"{path.relative_to(site)}: {link} (no such anchor)")
    return found


def build(folder: Path) -> Path:
    """Stage, build and check; the site's folder. Ends with a message if anything is broken."""
    source, site = folder / "site-source", folder / "site"
    stage(source)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    if subprocess.run(command, cwd=source).returncode:
        raise SystemExit("zensical found something broken: see above")
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(source / "site", site)
    if wrong := broken(site):
        raise SystemExit("links that lead nowhere:\n" + "\n".join(wrong))
    return site


def main() -> None:
    """Write build/site."""
    site = build(BUILD)
    print(f"{site.relative_to(ROOT)}: {len(list(site.rglob('*.html')))} pages, every link leads somewhere")


if __name__ == "__main__":
    main()
