"""The GPU benchmark's own arithmetic and its housekeeping; for all of it: `benchmark/gpu.sh --smoke`."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmark"))

import gpu  # noqa: E402

from cleanalign import decoding  # noqa: E402


def test_bytes_of_a_step_are_those_of_weights_and_caches(tmp_path, monkeypatch):
    """With a bandwidth of 1 byte a second the bound is the number of bytes: counted here from the tensors
    themselves."""
    device = torch.device("cpu")
    monkeypatch.setattr(gpu, "ceilings", lambda *_: {"copy_bytes_per_second": 1.0})
    caches = []
    decoder = decoding.Decoder.decode
    monkeypatch.setattr(
        decoding.Decoder, "decode", lambda self, *a: (decoder(self, *a), caches.append(self.caches))[0]
    )
    figures = gpu.Figures(tmp_path / "figures.json")
    gpu.decode(figures, device, smoke=True)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures.values
    model = gpu.random_model(gpu.TINY, device)
    weights = (
        2 * sum(p.numel() for p in model.model.layers.parameters())
        + 2 * model.lm_head.weight.numel()
        + 2 * model.model.norm.weight.numel()
    )
    layer = next(c[0].layers[0] for c in caches if c[0].layers[0].buffers[0].shape[0] == 8)
    a_token = sum(2 * b[0, :, 0].numel() for b in layer.buffers) * gpu.TINY["num_hidden_layers"]
    assert figures.values["eager, 8 rows"]["bound_milliseconds"] == pytest.approx(
        1e3 * (weights + 8 * (32 + 8) * a_token)
    )
    # nothing "not available"
    assert not [name for name, value in figures.values.items() if isinstance(value, str)]


def test_one_failing_part_loses_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SECONDS", {"nowhere": 60, "late": 0.01})
    # the processes started do not know them
    monkeypatch.setattr(gpu, "PARTS", {"nowhere": None, "late": None})
    gpu.main(("nowhere", "late"), smoke=True, out=str(tmp_path / "out.json"))
    parts = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert parts["nowhere"]["status"] != 0 and parts["nowhere"]["figures"] == {}
    assert parts["late"]["status"] == "stopped after 0.01 s"


def test_a_figure_that_cannot_be_had_says_why(tmp_path):
    figures = gpu.Figures(tmp_path / "figures.json")
    figures.attempt("ratio", lambda: 1 / 0)
    figures.attempt("two", lambda: 2)
    assert figures.values == {"ratio": "not available: ZeroDivisionError: division by zero", "two": 2}
