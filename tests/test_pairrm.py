"""PairRM on random weights, in both layouts of the hub: preferences recomputed apart, one pair at a time, and
every wrong folder."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import tokenizers
import torch
import transformers

from cleanalign.errors import UserError
from judges import (
    PAIRRM_LENGTHS,
    PAIRRM_TASK,
    both_orders,
    load_judge,
    pairrm,
    pairrm_ids,
    pairrm_texts,
    preference_matrix,
)

PROMPTS = ["good cat", "the sun is fine " * 6, "why", "a dog"]
A = ["yes", "very good sea", "no " * 30, "we see you " * 9]
B = ["no we see the moon", "bad", "yes now", "not good " * 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{layout: folder}; in both, PairRM with the same weights."""
    root = tmp_path_factory.mktemp("pairrm")
    return {
        "hf": tiny.pairrm_folder(root / "hf"),
        "original": tiny.pairrm_folder(root / "original", original=True),
    }


def expected_logit(folder: str, source: str, first: str, second: str, lengths: tuple[int, int]) -> float:
    """score(first) − score(second), written apart: words looked up by hand, one unpadded row, the head as two
    matrix products."""
    weights = safetensors.torch.load_file(f"{folder}/model.safetensors")
    vocabulary = json.loads(Path(folder, "tokenizer.json").read_text())
    vocabulary = vocabulary["model"]["vocab"] | {t["content"]: t["id"] for t in vocabulary["added_tokens"]}
    config = transformers.DebertaV2Config.from_pretrained(folder, vocab_size=len(vocabulary))
    encoder = transformers.DebertaV2Model(config).eval()
    encoder.load_state_dict(
        {
            key[len("pretrained_model.") :]: w
            for key, w in weights.items()
            if key.startswith("pretrained_model.")
        }
    )
    words = source.split()[: lengths[0] - 3]
    free = sum(lengths) + lengths[1] - (len(words) + 3)
    pieces = [words, first.split()[: free // 2 - 3], second.split()[: free // 2 - 3]]
    marks = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]
    row = [
        token for mark, piece in zip(marks, pieces, strict=True) for token in ["[CLS]", mark, *piece, "[SEP]"]
    ]
    with torch.no_grad():
        hidden = encoder(torch.tensor([[vocabulary[token] for token in row]])).last_hidden_state[0]
    x, y, z = (hidden[row.index(mark)] for mark in marks)
    score = lambda candidate: (  # noqa: E731
        weights["head_layer.4.weight"]
        @ torch.tanh(
            weights["head_layer.1.weight"] @ torch.cat([x, candidate]) + weights["head_layer.1.bias"]
        )
        + weights["head_layer.4.bias"]
    )
    return (score(y) - score(z)).item()


def test_preference_is_the_mean_of_both_orders_logits(folders, monkeypatch):
    monkeypatch.setattr("judges.PAIRRM_LENGTHS", (24, 12))  # short enough for these texts to be cut
    judges = {layout: load_judge(f"pairrm:{folder}") for layout, folder in folders.items()}
    p = judges["hf"].preference(PROMPTS, A, B)
    logits = [
        (expected_logit(folders["hf"], x, a, b, (24, 12)) - expected_logit(folders["hf"], x, b, a, (24, 12)))
        / 2
        for x, a, b in zip(PROMPTS, A, B, strict=True)
    ]
    torch.testing.assert_close(p, torch.sigmoid(torch.tensor(logits)), atol=1e-5, rtol=0)
    assert p.max() - p.min() > 0.1  # the weights do tell these texts apart
    torch.testing.assert_close(p + judges["hf"].preference(PROMPTS, B, A), torch.ones(4))
    # whose config names the same lengths and base
    assert torch.equal(p, judges["original"].preference(PROMPTS, A, B))


def test_both_orders_are_asked_once(folders, monkeypatch):
    """The judge averages inside, so neither `both_orders` nor `preference_matrix` doubles its cost."""
    judge = load_judge(f"pairrm:{folders['hf']}")
    calls = []
    inner = judge.preference
    monkeypatch.setattr(
        judge, "preference", lambda prompts, a, b: calls.append(len(a)) or inner(prompts, a, b)
    )
    assert torch.equal(both_orders(judge, PROMPTS, A, B), inner(PROMPTS, A, B)) and calls == [4]
    (matrix,) = preference_matrix(judge, ["why"], [["yes", "no", "good sea"]])
    torch.testing.assert_close(matrix + matrix.T, torch.ones(3, 3))
    assert calls == [4, 3] and judge.score is None


def test_batching_and_padding_change_nothing(folders):
    batched, alone = (pairrm(folders["hf"], "cpu", max_tokens=budget)(PROMPTS, A, B) for budget in (4096, 1))
    torch.testing.assert_close(batched, alone, atol=1e-5, rtol=0)


def test_weights_in_bfloat16_or_pickled_load(folders, tmp_path):
    expected = load_judge(f"pairrm:{folders['hf']}").preference(PROMPTS, A, B)
    low = load_judge(f"pairrm:{tiny.pairrm_folder(tmp_path / 'low', dtype=torch.bfloat16)}").preference(
        PROMPTS, A, B
    )
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, atol=0.1, rtol=0)
    pickled = Path(tiny.pairrm_folder(tmp_path / "pickled"))
    torch.save(safetensors.torch.load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert torch.equal(load_judge(f"pairrm:{pickled}").preference(PROMPTS, A, B), expected)


def test_truncation_and_the_places_of_the_marks(folders):
    tokenizer = tokenizers.Tokenizer.from_file(f"{folders['hf']}/tokenizer.json")
    cls, sep, *marks = (
        tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "<|source|>", "<|candidate1|>", "<|candidate2|>")
    )
    good = tokenizer.token_to_id("good")
    for source, first, second in [(5, 5, 5), (2000, 1000, 3), (10, 2000, 2000), (1221, 500, 500)]:
        row, places = pairrm_ids(tokenizer, PAIRRM_LENGTHS, ["good " * n for n in (source, first, second)])
        assert [row[place] for place in places] == marks and [row[place - 1] for place in places] == [cls] * 3
        kept = min(source, 1224 - 3)  # with [CLS], mark and [SEP] no more than 1224
        longest = (2048 - (kept + 3)) // 2 - 3  # what the source leaves, halved: at least 412
        assert row == [
            t
            for m, n in zip(marks, (kept, min(first, longest), min(second, longest)), strict=True)
            for t in (cls, m, *[good] * n, sep)
        ]
        assert len(row) <= 2048
    # texts that contain the marks and separators of the format move nothing
    row, places = pairrm_ids(tokenizer, PAIRRM_LENGTHS, ["good [SEP] good", "<|candidate2|> good", "good"])
    assert [row[place] for place in places] == marks and row.count(sep) == 3


def test_tokenizer_json_is_read_as_it_stands(folders):
    """transformers 5 rebuilds DeBERTa's tokenizer without the file's normaliser (here NFKC): full-width words
    would be unknown."""
    judge = load_judge(f"pairrm:{folders['hf']}")
    assert torch.equal(
        judge.preference(["why"], ["ｇｏｏｄ"], ["bad"]), judge.preference(["why"], ["good"], ["bad"])
    )
    assert not torch.equal(
        judge.preference(["why"], ["unknown"], ["bad"]), judge.preference(["why"], ["good"], ["bad"])
    )


def test_dialogues_in_the_packages_words():
    user = lambda text: {"role": "user", "content": text}  # noqa: E731
    assert (
        pairrm_texts("why", "yes", "no") == pairrm_texts([user("why")], "yes", "no") == ["why", "yes", "no"]
    )
    dialogue = [user("why"), {"role": "assistant", "content": "how"}, user("what")]
    assert pairrm_texts(dialogue, "yes", "no") == [
        f"{PAIRRM_TASK}USER: why\nAssistant: <Response 1>\nUSER: what\nAssistant: <Response 2>",
        "<Response 1>: how\n<Response 2>: yes",
        "<Response 1>: how\n<Response 2>: no",
    ]
    assert pairrm_texts([{"role": "system", "content": "be good"}, user("why")], "yes")[0] == "be good\n\nwhy"


def broken(folder: Path, how: str) -> None:
    """Break a good PairRM folder."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if how.endswith((".json", ".safetensors")):
        (folder / how).unlink()
    elif how == "another model":
        config["model_type"] = "llama"
    elif how == "no head":
        weights = {key: w for key, w in weights.items() if "head" not in key}
    elif how == "a layer less":
        weights = {key: w for key, w in weights.items() if "layer.1." not in key or "head" in key}
    elif how == "a smaller vocabulary":
        key = "pretrained_model.embeddings.word_embeddings.weight"
        weights[key] = weights[key][:-2].contiguous()
    elif how == "another width":
        config["intermediate_size"] = 64
    elif how == "no marks":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace("<|candidate2|>", "<|candidate3|>"))
    if not how.endswith((".json", ".safetensors")):
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how,message",
    [
        ("config.json", "no config.json there"),
        ("model.safetensors", "no model.safetensors there"),
        ("tokenizer.json", "no tokenizer.json there. Copy that of llm-blender/PairRM-hf"),
        ("another model", "config.json is neither PairRM's"),
        ("no head", "its weights are not PairRM's"),
        ("a layer less", "weights are missing, such as pretrained_model.encoder.layer.1"),
        ("another width", "its weights do not fit the config of .*size mismatch for pretrained_model"),
        ("a smaller vocabulary", r"its tokenizer has no <\|candidate2\|> that its weights know"),
        ("no marks", r"its tokenizer has no <\|candidate2\|>"),
    ],
)
def test_wrong_folders_say_what_is_wrong(tmp_path, how, message):
    folder = Path(tiny.pairrm_folder(tmp_path / "x"))
    broken(folder, how)
    with pytest.raises(UserError, match=f"--eval-judge pairrm:.*{message}"):
        load_judge(f"pairrm:{folder}", flag="--eval-judge")


def test_without_the_hub_there_is_one_clear_message(world):
    with pytest.raises(
        UserError,
        match="--judge llm-blender/PairRM-hf: could not be loaded from the hub .*give a local folder",
    ):
        load_judge("pairrm")
    with pytest.raises(UserError, match="needs a hub id or folder"):
        load_judge("pairrm:")
    with pytest.raises(UserError, match="config.json is neither PairRM's"):
        load_judge(f"pairrm:{world}/model")
