"""--dry-run: one rehearsed step on random weights, what is foreseen against what is held, and out of memory
as advice."""

import contextlib
import json
import re

import blocks
import pytest
import tiny
import torch
import transformers
from running import start

import afd
import common
import experiment
import ipo_md
import nash_md
import selm
import spin
from cleanalign import dry_run, phases, synthetic
from cleanalign.embedded import EMBEDDED_MODEL
from cleanalign.models import HUB_MODELS, load_model, make_trainable
from cleanalign.phases import Phases, give_back_freed_memory, keep_freed_memory, reset_peak_memory
from cleanalign.run import Run

SCRIPTS = {"selm": selm, "ipo_md": ipo_md, "nash_md": nash_md, "afd": afd, "spin": spin}
PUBLISHED = {  # numbers of weights
    "llama3-8b": 8_030_261_248,
    "zephyr-7b": 7_241_732_096,
    "gemma-2b": 2_506_172_416,
    "phi3-mini": 3_821_079_552,
    "pythia-1b-tldr": 1_011_781_632,
    "smollm2-135m": 134_515_008,
    "gpt2": 124_439_808,
}


def test_sizes_are_the_published_ones():
    assert {
        name: sum(p.numel() for p in synthetic.meta_model(name).parameters()) for name in synthetic.CONFIGS
    } == PUBLISHED


def test_every_recipe_of_the_hub_has_its_sizes():
    assert {EMBEDDED_MODEL, *HUB_MODELS} <= set(synthetic.CONFIGS)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "extra",
    [[], ["--lora-rank=2", "--gradient-checkpointing"], ["--optimizer-states=bfloat16", "--dtype=bfloat16"]],
    ids=str,
)
def test_rehearsal_of_a_tiny_model(name, extra, flags, tmp_path, capsys):
    flags = [f for f in flags if f.split("=")[0] not in {e.split("=")[0] for e in extra}]
    start(
        SCRIPTS[name], *flags, *extra, "--dry-run", "--run-name=x", "--max-prompt-length=12", "--batch-size=4"
    )
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "x" / "dry_run.json").read_text())
    phases = result["phases"]
    alone = name in ("afd", "spin")  # SFT: one reply a prompt and no reference
    assert set(phases) >= (
        {"sampling", "training", "update"} if alone else {"sampling", "reference", "training", "update"}
    )
    assert all(phase["seconds"] > 0 and phase["peak_memory_bytes"] > 0 for phase in phases.values())
    # every reply ran to its greatest length
    assert phases["training"]["tokens"] >= 4 * (12 + (1 if alone else 2) * 5)
    fewest = 4 if name in ("ipo_md", "nash_md") else 120  # of 128 --sample-rows, where a run would fill them
    assert phases["sampling"]["tokens"] >= fewest * 6 and phases["sampling"]["tokens"] % 6 == 0
    assert "together, evaluation" in printed and phases["evaluation"]["seconds"] > 0
    assert (
        0 < phases["training"]["model_flops_utilisation"] < 1 and result["matmul_peak_flops_per_second"] > 1e9
    )
    assert "foreseen" in printed and "random judge" in printed and not (tmp_path / "x" / "model").exists()


def test_a_rehearsal_decodes_the_rows_of_the_run(flags, tmp_path, monkeypatch):
    """selm.py samples a whole iteration at once, so that its batches are full; ipo_md.py a step's pairs."""
    monkeypatch.setattr(dry_run, "matmul_peak", lambda *_: 1e12)
    flags += ["--dry-run", "--sample-rows=20", "--max-prompt-length=12", "--batch-size=4", "--dev-prompts=1"]
    for script, rows in ((selm, 20), (ipo_md, 8)):
        start(script, *flags[:-1], f"--run-name={script.__name__}")
        result = json.loads((tmp_path / script.__name__ / "dry_run.json").read_text())
        assert result["phases"]["sampling"]["tokens"] == rows * 6
        a_row = 2 * 2 * 2 * 8 * 18 * 4  # two layers' keys and values, two heads of 8, 18 places, float32
        models = 2 if script is ipo_md else 1
        assert result["foreseen_bytes"][dry_run.CACHES] == models * rows * a_row
        assert result["foreseen_bytes"][dry_run.EVALUATED] == 16 * a_row


def test_a_phase_without_a_peak_of_its_own(tmp_path, monkeypatch):
    """The decoder's warm-up, which every CUDA run has, is seconds set apart from sampling."""
    monkeypatch.setattr(dry_run, "matmul_peak", lambda *_: 1e12)
    clock = Phases()
    with clock.phase("sampling"):
        pass
    clock.add_tokens("sampling", 8)
    clock.set_apart("sampling", "decoder warm-up", 1e-9)
    args = selm.Args(model="smollm2-135m", device="cpu")
    result = dry_run.report(args, tiny.model(24), clock.phases, {})
    assert re.search(r"decoder warm-up +0\.00 +– +– +–", dry_run.report_text(result, tmp_path))


def test_offline_responses_in_a_rehearsal(flags, tmp_path):
    """The paper's recipe: one greedy answer beside the data set's two, the third completion of some pairs
    included."""
    flags += [
        "--offline-responses",
        "--samples-per-prompt=1",
        "--temperature=0",
        "--offline-warmup",
        "--batch-size=16",
    ]
    start(selm, *flags, "--dry-run", "--run-name=x", "--max-prompt-length=12")
    phases = json.loads((tmp_path / "x" / "dry_run.json").read_text())["phases"]
    assert phases["training"]["scored"] > 16 * 2 * 6  # some y_s stood apart


def test_utilisation_counts_each_weight_where_it_works():
    """Against a count by hand for a two-layer Llama with tied embeddings; an adapter adds nothing."""

    policy = tiny.model(24)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    assert dry_run.model_flops(policy, 10, 4, 6) == 6 * (2 * layer * 10 + 24 * 32 * 4)
    lora = make_trainable(policy, 4, 8, False)
    assert dry_run.model_flops(lora, 10, 4, 4) == 4 * (2 * layer * 10 + 24 * 32 * 4)


@pytest.mark.parametrize(
    "lora_rank,states,exploration", [(0, "float32", "selm"), (0, "bfloat16", "xpo"), (8, "float32", "selm")]
)
def test_foreseen_is_what_is_held(lora_rank, states, exploration, monkeypatch):
    """Weights, reference and optimiser of a small model, byte for byte."""

    config = tiny.model(300).config
    monkeypatch.setitem(synthetic.CONFIGS, "small", ("LlamaConfig", config.to_dict()))
    args = selm.Args(
        model="small",
        lora_rank=lora_rank,
        optimizer_states=states,
        exploration=exploration,
        dtype="bfloat16",
        device="cpu",
    )
    needs = dry_run.foreseen(args, torch.device("cpu"))
    load = lambda: load_model("random:small", torch.bfloat16, torch.device("cpu"), "sdpa")  # noqa: E731
    policy = make_trainable(load(), lora_rank, 16, False)

    def count(adapter):
        return sum(p.nbytes for n, p in policy.named_parameters() if ("lora_" in n) == adapter)

    assert needs["policy's weights"] == count(False) and needs.get("LoRA adapter", 0) == count(True)
    assert needs.get("reference's weights", 0) == (
        count(False) if exploration == "xpo" and not lora_rank else 0
    )
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    expected = {"float32": 16, "bfloat16": 10}[states]
    assert sum(n for what, n in needs.items() if what.startswith("optimiser")) == expected * trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex"])
def test_activations_are_about_as_foreseen(monkeypatch, attention, dtype):
    """Bytes that autograd keeps for a Llama of ordinary proportions, against the estimate."""
    monkeypatch.setattr(blocks.KERNEL, blocks.attention)
    config = tiny.ordinary_config(attention)
    batch = common.collate([[5] * 16], [[[6] * 17, [7] * 17]], "cpu")
    row = tokens = batch.input_ids.numel()
    model = make_trainable(transformers.LlamaForCausalLM(config).to(dtype), 0, 0, False)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            held[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        common.completion_logprobs(model, batch)
    assert sum(n for _, n in held.values()) / tokens == pytest.approx(
        dry_run.activation_bytes(config, dtype.itemsize, False, attention, row), rel=0.1
    )


def test_too_large_for_this_machine_is_said_before_trying(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "free_memory", lambda device: 20 * 2**30)
    monkeypatch.setattr(experiment, "load_model", lambda *_: pytest.fail("it tried"))
    with pytest.raises(SystemExit) as stop:
        start(
            selm,
            "--model=llama3-8b",
            "--dry-run",
            "--lora-rank=0",
            "--device=cpu",
            "--dtype=bfloat16",
            f"--run-dir={tmp_path}",
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error and not list(tmp_path.iterdir())
    assert re.search(r"llama3-8b needs \d+\.\d GiB .*cpu has 20\.0 GiB free", error)
    assert re.search(r"optimiser: master +29\.92 GiB", error) and "--lora-rank 32 saves" in error


def test_unknown_sizes(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        start(selm, "--model=some/model", "--dry-run", f"--run-dir={tmp_path}")
    assert stop.value.code == 2 and "are not in the code. Known: llama3-8b" in capsys.readouterr().err


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9 bytes."
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_out_of_memory_is_advice(flags, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(common, "completion_logprobs", fail)
    with pytest.raises(SystemExit) as stop:
        start(selm, *flags, "--run-name=x", "--num-prompts=20")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message and "error: out of memory: " in message
    for flag in (
        "--micro-batch-tokens 2048",
        "--gradient-checkpointing",
        "--optimizer-states bfloat16",
        "--sample-rows 64",
    ):
        assert re.search(rf"{flag} saves \d+\.\d\d GiB", message), flag


def test_advice_names_only_what_helps_and_figures_only_what_is_known():
    args = selm.Args(
        model="llama3-8b",
        lora_rank=32,
        gradient_checkpointing=True,
        micro_batch_tokens=8192,
        dtype="bfloat16",
        device="cpu",
    )
    text = dry_run.advice(args, torch.device("cpu"))
    assert (
        "--gradient-checkpointing" not in text
        and "--lora-rank" not in text
        and "--micro-batch-tokens 4096 saves" in text
    )
    text = dry_run.advice(selm.Args(model="some/model", device="cpu"), torch.device("cpu"))
    assert "--lora-rank 32" in text and "GiB" not in text


def test_other_errors_keep_their_traceback(flags, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(common, "completion_logprobs", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        start(selm, *flags, "--run-name=x", "--num-prompts=20")


def test_a_phase_ends_when_its_body_raises():
    clock = Phases()
    with pytest.raises(ZeroDivisionError), clock.phase("outer"):
        with contextlib.suppress(KeyError), clock.phase("inner"):
            raise KeyError
        assert clock.open_phases == ["outer"]
        1 / 0  # noqa: B018
    assert clock.open_phases == [] and set(clock.phases) == {"outer", "inner"}
    assert all(phase["seconds"] > 0 for phase in clock.phases.values())


def test_memory_goes_back_before_a_new_stage_and_not_between_phases_that_take_turns(monkeypatch):
    clock, given_back = Phases(), []
    monkeypatch.setattr(phases, "give_back_freed_memory", lambda: given_back.append(opened))
    names = ["sampling", "judging", "training"] * 3 + ["training"] * 3 + ["sampling", "evaluation"]
    for name in names:
        opened = name
        with clock.phase(name), clock.phase("inner"):
            pass
    assert given_back == ["sampling", "judging", "training", "sampling", "evaluation"]
    given_back.clear()
    opened = "evaluation"
    for _ in range(3 * phases.GIVE_BACK_EVERY):
        with clock.phase("evaluation"):
            pass
    assert len(given_back) == 3  # now and then all the same


def test_nested_phases_have_their_own_seconds_and_peaks(tmp_path):
    run = Run("selm", selm.Args(run_dir=str(tmp_path)), 1)
    keep_freed_memory()  # as runs have it: a block of this size goes back when it is freed
    give_back_freed_memory()  # neither what the tests before this one left nor their peaks are the run's
    reset_peak_memory()
    with run.phase("outer"):
        outer = torch.ones(2**22)
        with run.phase("inner"):
            inner = torch.ones(2**28)
            inner.add_(1)
            del inner
        del outer
    seconds, peaks = (
        {name: phase[key] for name, phase in run.phases.items()} for key in ("seconds", "peak_memory_bytes")
    )
    assert seconds["inner"] > 0 and seconds["outer"] > 0
    assert run.peak_memory_bytes == max(peaks.values()) and peaks["inner"] >= peaks["outer"]
