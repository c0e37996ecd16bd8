"""The documentation: its links work on a code host and on the site, and the site builds strictly."""

import functools
import http.server
import importlib.util
import re
import threading
from pathlib import Path

import browser
import pytest
import website

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = ("zensical", "mkdocstrings_handlers.python", "latex2mathml")


def installed() -> bool:
    try:
        return all(importlib.util.find_spec(name) for name in TOOLS)
    except ModuleNotFoundError:
        return False


def prose(text: str) -> str:
    """Without fenced code."""
    return website.FENCE.sub("", text)


def anchors(path: Path) -> set[str]:
    """The headings' anchors as a code host makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", prose(path.read_text()))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_work_on_the_code_host(path):
    for _, address, _ in website.LINK.findall(prose(path.read_text())):
        if re.match(r"[a-z]+:", address):
            continue
        name, _, anchor = address.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists() and ROOT in target.parents, f"{path.name}: {address}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{path.name}: {address} has no such heading"


def test_every_page_stands_in_the_menu():
    menu = set(re.findall(r'= "([\w./]+\.md)"', (ROOT / "docs" / "zensical.toml").read_text()))
    assert menu == {path.name for path in (ROOT / "docs").glob("*.md")} | {
        "index.md",
        "api.md",
        "contributing.md",
    }


def test_a_link_to_nothing_ends_the_build(tmp_path):
    stage = website.Stage(tmp_path / "stage")
    assert stage.link("docs/selm.md", "../selm.py#L1") == "source/selm.py.md#L1"
    assert stage.link("README.md", "docs/selm.md#results") == "selm.md#results"
    assert stage.link("docs/selm.md", "https://arxiv.org/abs/2405.19332").startswith("https:")
    for missing in ("nowhere.md", "../nowhere.py", "../../outside"):
        with pytest.raises(SystemExit, match=re.escape(missing)):
            stage.link("docs/selm.md", missing)
    assert "[x](nowhere)" in stage.rewritten("docs/selm.md", "```\n[x](nowhere)\n```\n")  # code is no link


def test_dead_links_of_built_pages_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text('<a id="x" href="a/#y">1</a><a href="a/#z">2</a><img src="no.png">')
    (tmp_path / "a" / "index.html").write_text(
        '<p id="y"></p><a href="../#x">3</a><a href="https://x.y">4</a>'
    )
    assert website.broken(tmp_path) == ["index.html: a/#z (no such anchor)", "index.html: no.png"]


def test_the_workflow_builds_what_a_reader_builds():
    text = (ROOT / ".github" / "workflows" / "site.yml").read_text()
    assert "python docs/website.py" in text and "path: build/site" in text
    for name in re.search(r"constraints\.txt (.*)", text)[1].split():
        assert f"\n{name}==" in (ROOT / "constraints.txt").read_text()


@pytest.mark.skipif(not installed(), reason="the site's tools are not installed: pip install -e '.[docs]'")
def test_the_site(tmp_path):
    """Strictly built; formulae, docstrings, sources and the game on it; its search finds; nothing is fetched
    from elsewhere."""
    site = website.build(tmp_path)
    theory = (site / "theory" / "index.html").read_text()
    assert theory.count("<math") == 12 and "```math" not in theory
    assert 'id="common.completion_logprobs"' in (site / "api" / "index.html").read_text()
    assert "def selm_loss" in re.sub(r"<[^>]*>", "", (site / "source" / "selm.py" / "index.html").read_text())
    for source in (ROOT / "notebooks").glob("[0-9]*.py"):
        notebook = (site / "source" / "notebooks" / source.name / "index.html").read_text()
        assert "%%" not in notebook and '<h2 id="the-loss-in-ten-lines"' in notebook
    assert (site / "games.html").read_bytes() == (ROOT / "docs" / "games.html").read_bytes()
    assert (site / "files" / "benchmark" / "results" / "selm.json").exists()
    if browser.CHROMIUM is None:
        return
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=site)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        with browser.Browser(1280, 900) as page:
            for name in ("", "games/"):
                page.ask("Page.navigate", url=home + name)
                page.wait("document.readyState === 'complete' && location.href.startsWith('http')")
            page.wait(
                "document.querySelector('iframe.games')?.contentDocument?.documentElement.dataset.ready"
            )
            page.click("button.md-search__button")
            page.wait("!!document.activeElement.shadowRoot || document.activeElement.tagName === 'INPUT'")
            for letter in "exploitability":
                page.press(letter)
            found = (  # of the search's own shadow tree too
                "(function text(n) { return (n.innerText || n.textContent || '') + [...n.querySelectorAll('*')]"
                ".map(e => e.shadowRoot ? text(e.shadowRoot) : '').join('') })(document.body)"
            )
            page.wait(f"/[0-9]+ results/.test({found})")
            outside = [c for c in page.complaints() if home not in c]
            assert not outside
        server.shutdown()
