"""Shared fixtures: one tiny world (model folder, prompts, judges) for the whole session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the hub is a bug

import pytest
import tiny
import torch

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with model/ (chat template), plain/ (none), prompts.jsonl, pairs.jsonl, demonstrations.jsonl
    and judges.py."""
    root = tmp_path_factory.mktemp("world")
    tiny.folder(root / "model")
    tiny.folder(root / "plain", chat=False)
    tiny.prompts_file(root / "prompts.jsonl")
    tiny.prompts_file(root / "pairs.jsonl", pairs=True)
    tiny.prompts_file(root / "demonstrations.jsonl", responses=True)
    tiny.judge_file(root / "judges.py")
    return root


@pytest.fixture
def flags(world, tmp_path):
    """Flags of a short run in the tiny world; every script understands them."""
    return [
        f"--model={world}/model",
        f"--dataset={world}/prompts.jsonl",
        f"--judge={world}/judges.py:more_good",
        "--eval-judge=None",
        f"--run-dir={tmp_path}",
        "--device=cpu",
        "--dtype=float32",
        "--max-new-tokens=6",
        "--eval-prompts=16",
        "--batch-size=8",
        "--micro-batch-tokens=4096",
    ]
