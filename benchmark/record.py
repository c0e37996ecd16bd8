"""What every recorded result begins with: the command that made it, and the commit, versions and device it
ran on. No path of that machine stands in it, so that anybody can run the command.

    import record                                        # first: it makes the checkout's modules importable
    record.write(out, {**record.origin(), "seconds": …})

and how a study runs a script: `run_once`, `result`.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))

from cleanalign.reporting import environment  # noqa: E402

WHERE_TO = ("--out", "--run-dir", "--copy")  # flags that say where results go: they change no figure
ABSOLUTE = re.compile(r"(?<![\w./~-])/[\w.+~-]+(?:/[\w.+~-]+)*")


def origin() -> dict:
    """The command of this process, and the commit, versions and device it ran on."""
    return {"command": command(), **environment()}


ORIGIN = ("git_commit", "git_dirty", "versions", "device_name")


def of_run(folder: Path) -> dict:
    """The same of a finished run: what its args.json holds."""
    return json.loads((folder / "args.json").read_text())


def where_from(folder: Path) -> dict:
    """Of that only commit, versions and device."""
    origin = of_run(folder)
    return {key: origin[key] for key in ORIGIN}


def result(folder: Path, command: str) -> dict:
    """Where a finished run came from and how it ended."""
    summary = json.loads((folder / "summary.json").read_text())
    return {"command": f"python {command}", **where_from(folder), "summary": summary}


def run_once(command: str, folder: Path) -> None:
    """Run a script (`selm.py --seed 1`) into `folder`, unless it is finished there; its output goes to a .log
    beside it. Ends the program if it fails."""
    if (folder / "summary.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *command.split(), "--run-dir", str(folder.parent), "--run-name", folder.name]
    log = folder.parent / f"{folder.name}.log"
    with open(log, "w") as lines:
        done = subprocess.run(words, cwd=ROOT, stdout=lines, stderr=lines, check=False)
    if done.returncode:
        sys.exit(f"failed: {command}; see {log}")
    print(f"done: {folder.name}", flush=True)


def command(argv: list[str] | None = None) -> str:
    """`argv` (None: this process's) as it is typed in the checkout; flags that say where results go are left
    out."""
    script, *words = sys.argv if argv is None else argv
    kept = []
    while words:
        word = words.pop(0)
        if word in WHERE_TO:
            words = words[1:]
        elif not word.startswith(tuple(f"{flag}=" for flag in WHERE_TO)):
            kept.append(portable(word))
    return shlex.join(["python", _name(Path(script).resolve()), *kept])


def portable(value):
    """`value`, in all of whose strings an absolute path became one that says what, not where: within the
    checkout relative to it; in a run folder runs/NAME/…; else, as for an environment, its last part."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(inner) for inner in value]
    if isinstance(value, str):
        return ABSOLUTE.sub(lambda found: _name(Path(found[0])), value)
    return value


def _name(path: Path) -> str:
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    for run in (path, *path.parents):
        if (run / "args.json").exists():
            return str("runs" / path.relative_to(run.parent))
    return path.name


def write(file: Path | str, result: dict) -> None:
    """Write `result` as JSON, without a path of this machine in it."""
    Path(file).write_text(json.dumps(portable(result), indent=1, ensure_ascii=False) + "\n")
