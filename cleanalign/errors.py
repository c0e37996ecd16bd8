"""The ground floor: a user's mistake is one sentence, not a traceback."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: the message names what, where and how. The program ends with code 2."""


class JudgeFailure(UserError):
    """A judge that failed in the middle of a run: the run checkpoints, and --resume asks again."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def optional_import(module: str, install: str):
    """Import an optional package where it is used, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs the package {module.split('.')[0]!r}: pip install {install}") from error


def near(name: str, known: Iterable[str]) -> str:
    """A hint ' Did you mean …?' with the closest known names, or the whole list when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}."
