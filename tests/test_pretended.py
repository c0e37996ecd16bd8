"""Every script on a GPU that is not there (tests/pretended.py): it does what the CPU does, refuses nothing, and
how often the host waits for the device is bounded.

Seventeen faults were made by hand, one at a time, in a copy; each turned a test red, here or in test_memory.py
and test_decoding.py: prefill keeps a view of its hidden states; keeps the last part's cache; reads 65,536
tokens at once; --sample-rows 0 forgets the prefill; a blocking upload in `collate`; a loss read in every
micro-batch; a boolean index in `completion_logprobs`; an index left on the host; phases that synchronise;
logits rounded to bfloat16; a look at every token; a captured step that asks; a captured step with the host's
token number frozen in it; the optimiser's random numbers drawn on the host; a rehearsed phase without a peak;
a table that takes 64 rows for 0; stages that forget their optimiser.
"""

import json
from pathlib import Path

import blocks
import pytest
import tiny
import torch
import transformers
from pretended import Refused, cuda
from running import metrics_of, start, summary_of

import afd
import common
import evaluate
import ipo_md
import nash_md
import preference_model
import selm
import spin
from cleanalign import dry_run
from cleanalign.errors import UserError
from cleanalign.models import load_model, make_trainable, starting_model
from cleanalign.run import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
V, END = 24, 3
GOODNESS = "--judge={world}/judges.py:goodness"
STAGES = [GOODNESS, "--dataset={world}/demonstrations.jsonl", "--min-demonstration-score=None"]
AFD = [*STAGES, "--dev-prompts=4", "--reward-prompts=8", "--max-n=2", "--policy-steps=2"]
LORA = ["--lora-rank=2", "--gradient-checkpointing"]
PAIRS = "--dataset={world}/pairs.jsonl"
ALL = "--dataset={world}/all.jsonl"
LETTERS = "--model={world}/letters"
CASES = {  # every script, and every option that computes something else
    "selm": (selm, []),
    "selm offline": (selm, [PAIRS, "--offline-responses", "--offline-warmup", "--max-steps=4"]),
    "selm xpo": (selm, ["--exploration=xpo"]),
    "selm flex": (selm, ["--attention=flex", "--gradient-checkpointing"]),
    "selm lora": (selm, [*LORA, "--max-new-tokens=36", "--optimizer-states=bfloat16"]),
    "ipo": (ipo_md, ["--optimizer-states=bfloat16"]),
    "ipo online": (ipo_md, ["--beta=0", "--top-p=.9"]),
    "ipo offline": (ipo_md, [PAIRS, "--offline", "--length-normalize", "--loss=dpo"]),
    "nash": (nash_md, ["--max-new-tokens=36", "--sample-rows=12"]),
    "nash lora": (nash_md, LORA),
    "nash ema": (nash_md, ["--opponent=ema", "--ema-decay=.5"]),
    "nash self": (nash_md, ["--opponent=self", "--baseline=half", "--attention=blocks"]),
    "nash reference": (nash_md, ["--opponent=reference", "--baseline=leave-one-out"]),
    "nash rlhf": (nash_md, ["--objective=rlhf", GOODNESS]),
    "afd forward": (afd, [*AFD, "--objective=forward-kl"]),
    "afd js": (afd, [*AFD, "--objective=js", "--samples-per-prompt=2", *LORA]),
    "afd reward model": (afd, [*AFD, "--reward=reward-model", "--pairs", "init-demo", "preference", ALL]),
    "spin": (spin, [*STAGES, "--iterations=1"]),
    "reward": (preference_model, [PAIRS, "--kind=reward"]),
    "pairwise": (preference_model, [PAIRS, LETTERS, "--kind=pairwise", *LORA]),
}


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    """A short run's flags."""
    tiny.prompts_file(world / "all.jsonl", pairs=True, responses=True)
    words = tiny.tokenizer(extra=("A", "B", "[CONTEXT]", "[RESPONSE", "A]", "B]", "<turn>"))
    words.save_pretrained(world / "letters")
    tiny.model(len(words)).save_pretrained(world / "letters")
    return [
        f"--model={world}/model",
        f"--dataset={world}/prompts.jsonl",
        f"--judge={world}/judges.py:more_good",
        "--eval-judge=None",
        f"--run-dir={tmp_path_factory.mktemp('runs')}",
        "--dtype=float32",
        "--max-new-tokens=6",
        "--eval-prompts=8",
        "--batch-size=8",
        "--micro-batch-tokens=64",
        "--num-prompts=16",
        "--max-steps=2",
        "--save-every=1",
    ]


def run(script, flags, extra, name, world):
    """A run's folder. Flags in `extra` win over those in `flags`."""
    extra = [flag.format(world=world) for flag in extra]
    own = {flag.partition("=")[0] for flag in extra}
    flags = [flag for flag in flags if flag.partition("=")[0] not in own]
    known = {f"--{field}".replace("_", "-") for field in script.Args.__dataclass_fields__}
    flags = [flag for flag in flags if flag.partition("=")[0] in known]
    folder = next(flag.partition("=")[2] for flag in flags if flag.startswith("--run-dir"))
    start(script, *flags, *extra, f"--run-name={name}")
    return Path(folder) / name


def near(a, b) -> None:
    """Two runs' rows of metrics agree but for rounding."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_the_cpu(flags, world, monkeypatch, case):
    """Same replies, same metrics; nobody waits in a micro-batch; every captured step is free of waits."""
    script, extra = CASES[case]
    name = case.replace(" ", "-")
    monkeypatch.setattr(blocks.KERNEL, blocks.attention)
    of_cpu = [flag for flag in extra if flag != "--attention=flex"]  # which a CPU does not have
    ours = run(script, flags, [*of_cpu, "--device=cpu"], f"{name}-cpu", world)
    with cuda() as gpu:
        gpu.doing = lambda: "training" if Run.current and "training" in Run.current.open_phases else None
        theirs = run(script, flags, [*extra, "--device=cuda"], f"{name}-gpu", world)
    rows = metrics_of(theirs)
    near(rows, metrics_of(ours))
    if (ours / "samples.jsonl").exists():
        assert (theirs / "samples.jsonl").read_text() == (ours / "samples.jsonl").read_text()
    # A step waits for its metrics and, where its update is within, for the gradient's norm.
    waits = gpu.waits_while("training")
    if "flex" in case:  # torch's own code makes the indices of a mask's blocks where the mask really lies
        waits = {what: n for what, n in waits.items() if not what.endswith("index from the host")}
    # A step of "js" trains a discriminator and a policy, and reads its rewards in between.
    steps = len(rows) + (1.5 * sum("adversarial/reward" in row for row in rows))
    assert sum(waits.values()) <= 2 * steps, waits
    if "offline" not in case and script is not preference_model:
        assert gpu.graphs


def test_a_resumed_run_is_the_uninterrupted_one(flags, world, monkeypatch):
    """State, random numbers and order are restored on the device they came from."""
    log = Run.log

    def stop(self, step, *more, **named):
        if step == 2 and self.folder.name == "stopped":
            raise KeyboardInterrupt
        return log(self, step, *more, **named)

    with cuda():
        whole = run(nash_md, flags, ["--device=cuda", "--optimizer-states=bfloat16"], "whole", world)
        monkeypatch.setattr(Run, "log", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(nash_md, flags, ["--device=cuda", "--optimizer-states=bfloat16"], "stopped", world)
        monkeypatch.setattr(Run, "log", log)
        start(nash_md, f"--resume={whole.parent}/stopped")
    assert metrics_of(whole.parent / "stopped") == metrics_of(whole)
    assert summary_of(whole.parent / "stopped")["kl"] == summary_of(whole)["kl"]


@pytest.mark.parametrize("script", [selm, nash_md, afd], ids=lambda s: s.__name__)
def test_a_rehearsal(flags, world, monkeypatch, script):
    """--dry-run, where the decoder's warm-up is a phase of its own."""
    monkeypatch.setattr(dry_run, "matmul_peak", lambda *_: 1e12)
    extra = ["--dry-run", "--device=cuda", "--max-prompt-length=12", "--sample-rows=16", "--max-steps=1"]
    extra += STAGES if script is afd else []
    with cuda():
        folder = run(script, flags, extra, f"rehearsal-{script.__name__}", world)
    phases = json.loads((folder / "dry_run.json").read_text())["phases"]
    assert phases["decoder warm-up"]["seconds"] > 0 and phases["training"]["seconds"] > 0


def test_evaluate(flags, world, tmp_path):
    """The comparison of models is the CPU's."""
    models = [f"{world}/model", f"{world}/plain"]
    results = []
    for device in ("cpu", "cuda"):
        more = ["--eval-prompts=8", "--max-new-tokens=20", f"--run-name={device}", f"--device={device}"]
        argv = [*models, f"--judge={world}/judges.py:more_good", f"--dataset={world}/prompts.jsonl", *more]
        argv += ["--dtype=float32", f"--run-dir={tmp_path}"]
        with cuda() if device == "cuda" else torch.no_grad():
            evaluate.command_line(argv)
        results.append(json.loads((tmp_path / device / "comparison.json").read_text()))
    assert results[0]["preference"] == results[1]["preference"]


@pytest.mark.parametrize("tokens", [33, 65])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_host_looks_once_in_sixteen_tokens(tokens, mixed):
    """While replies are drawn it looks who has finished, and reads them when all have; beyond that it waits to
    time a new shape's first run and its capture."""
    models = tiny.model(V, seed=1), tiny.model(V, seed=2)
    prompts = [[5, 6, 7], [8, 9], [10]]
    with cuda() as gpu:
        moved = [model.to(GPU) for model in models]
        settings = {"mixture": (moved[1], 0.3), "unmixed": 1} if mixed else {}
        gpu.waits.clear()
        replies = common.sample(
            moved[0], prompts, [-1], completions=2, max_new_tokens=tokens, seed=1, **settings
        )
        waits = {f"{where.partition(':')[0]} {what}": 0 for where, what, _ in gpu.waits}
        for (where, what, _), n in gpu.waits.items():
            waits[f"{where.partition(':')[0]} {what}"] += n
        shapes = len(gpu.graphs)
    assert all(len(reply) == tokens for group in replies for reply in group)
    looks, last = (tokens - 1) // 16, 1
    assert waits["decoding.py tolist"] == looks + last
    assert waits["decoding.py synchronize"] <= 3 * shapes
    # who ends a reply, once a call; transformers asks whether a prompt's mask is all ones
    assert set(waits) <= {
        "decoding.py tolist",
        "decoding.py synchronize",
        "decoding.py upload",
        "decoding.py is_nonzero",
        "common.py tolist",
    }
    assert waits.get("decoding.py is_nonzero", 0) + waits["decoding.py upload"] <= 8 * (1 + mixed)


def test_bfloat16_weights_give_float32_logits():
    """Drawn and scored from the sums of the matrix product, not from their bfloat16 roundings."""
    policy = tiny.model(V, seed=1).bfloat16()
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(20)  # logits of some tens
    prompts, replies = [[5, 6, 7], [8]], [[[9, 10, 3]], [[11, 12]]]
    errors = {}
    for device in (CPU, GPU):
        with cuda() if device is GPU else torch.no_grad() as gpu:
            policy.to(device)
            batch = common.collate(prompts, replies, device)
            logprobs = common.completion_logprobs(policy, batch).cpu()
            hidden = common.completion_hidden(policy, batch).cpu().double()  # (G, K, T, D)
            weight = policy.get_output_embeddings().weight.cpu().double()
            exact = (hidden @ weight.T).log_softmax(-1).gather(-1, batch.targets.cpu()[..., None])[..., 0]
            errors[device.type] = ((logprobs - exact) * batch.mask.cpu()).abs().max().item()
            if device is GPU:
                assert gpu.products > 0
                common.sample(policy, prompts, [END], max_new_tokens=4, seed=0)
    assert errors["cuda"] < 1e-3 < errors["cpu"]


def test_what_a_gpu_refuses(monkeypatch):
    """Two devices in one kernel; a number asked for while a graph is captured; a host's array of its memory."""
    with cuda() as gpu:
        x = torch.ones(3, device=GPU)
        with pytest.raises(Refused, match="two devices"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x + 1).device.type == "cuda" and (x.sum() + torch.tensor(1.0)).item() == 4
        assert sum(gpu.waits.values()) == 1
        graph = torch.cuda.CUDAGraph()
        for ask in (torch.Tensor.item, bool, torch.Tensor.tolist, torch.nonzero, lambda x: x[x > 0]):
            with pytest.raises(Refused, match="capturing"), torch.cuda.graph(graph):
                ask(x[:1])
        model = tiny.model(V).to(GPU)
        choose = common.Decoder._choose
        monkeypatch.setattr(common.Decoder, "_choose", lambda self, *a: (choose(self, *a), self.t.item())[0])
        with pytest.raises(UserError, match="cannot be captured as a CUDA graph"):
            common.sample(model, [[5, 6]], [END], max_new_tokens=8, seed=0)


def test_a_replay_reads_what_is_there_now():
    """Capturing runs nothing; a replay computes from what its tensors hold then."""
    with cuda():
        x, y = torch.ones(2, device=GPU), torch.zeros(2, device=GPU)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y.copy_(x * 2)
        assert y.tolist() == [0, 0]
        x.fill_(3)
        graph.replay()
        assert y.tolist() == [6, 6]


def test_weights_go_straight_to_the_gpu(world, monkeypatch):
    """Tensor by tensor from the file, and the reference is copied where the policy is, not read again."""
    calls = []
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **named: calls.append(named.get("device_map")) or load(*a, **named),
    )
    plain = load_model(f"{world}/model", torch.float32, CPU)
    with cuda():
        policy = make_trainable(load_model(f"{world}/model", torch.float32, GPU), 0, 0, True)
        reference = starting_model(policy)
        for model in (policy, reference):
            tensors = [*model.parameters(), *model.buffers()]
            assert all(x.device.type == "cuda" for x in tensors)
            for ours, theirs in zip(tensors, [*plain.parameters(), *plain.buffers()], strict=True):
                torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)
        assert not reference.is_gradient_checkpointing and policy.is_gradient_checkpointing
        assert not any(weight.requires_grad for weight in reference.parameters())
        # accelerate, which reads so, is missing: by way of the host
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        by_host = load_model(f"{world}/model", torch.float32, GPU)
        for ours, theirs in zip(by_host.parameters(), plain.parameters(), strict=True):
            assert ours.device.type == "cuda"
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)
    assert calls == [None, {"": GPU}, None]
