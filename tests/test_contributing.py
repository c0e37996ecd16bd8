"""CONTRIBUTING's example works as printed."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_five_line_loss(flags, tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"<!-- example.*?-->\n```python\n(.*?)```", text, re.S).group(1)
    assert len(re.search(r"def hinge.*?\n(?=\nselm)", code, re.S).group(0).strip().splitlines()) <= 5
    script = tmp_path / "hinge.py"
    script.write_text(code)
    command = [sys.executable, str(script), *flags, "--run-name=x", "--max-steps=2", "--num-prompts=32"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()[0]
    # a hinge at margin 0, not log 2
    assert '"loss": 1.0' in first or '"loss": 0.99' in first or '"loss": 1.00' in first
