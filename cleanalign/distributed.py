"""Rank and world size: the one home of several processes. Today there is one, and more are refused."""

from __future__ import annotations

import os

from cleanalign.errors import require


def single_process() -> None:
    """Refuse to start as one of several processes.

    The one home of rank and world size: when several GPUs come, this function learns them and `Run` writes on
        rank 0.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    require(
        world.isdigit() and int(world) <= 1,
        f"WORLD_SIZE={world}: several processes are not supported yet. Start one process: unset WORLD_SIZE, "
        "and python instead of torchrun.",
    )
