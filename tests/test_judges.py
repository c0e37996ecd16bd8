"""Judges: lexicons, a reward model with its own tokenizer, your own function, and every way that goes wrong."""

import pytest
import tiny
import torch
import transformers

from common import UserError
from judges import load_judge, preference_matrix

UP, DOWN = "I love this, what a wonderful day!", "This is horrible and I hate it."


@pytest.mark.parametrize("name,score", [("sentiment", "compound"), ("polarity", None)])
def test_lexicons(name, score):
    judge = load_judge(name)
    p = judge.preference(["x"] * 3, [UP, DOWN, UP], [DOWN, UP, UP])
    assert p[0] > 0.9 and p[1] < 0.1 and p[2] == 0.5
    scores = judge.score(["x"] * 2, [UP, DOWN])
    assert p[0].item() == pytest.approx(torch.sigmoid(4 * (scores[0] - scores[1])).item())


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A sequence-classification model whose tokenizer is not the policy's (another vocabulary, no chat template)."""
    path = tmp_path_factory.mktemp("reward")
    words = tiny.tokenizer(chat=False, extra=("extra", "words", "!"))
    words.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=1, pad_token_id=words.pad_token_id
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(path)
    return path, words


def test_reward_model_through_its_own_tokenizer(reward_folder):
    path, words = reward_folder
    judge = load_judge(f"hf:{path}")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    prompts, replies = (
        ["good cat", [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]],
        ["fine", "the dog"],
    )
    texts = ["\n\nHuman: good cat\n\nAssistant: fine", "\n\nHuman: sun\n\nAssistant: yes\n\nHuman: why\n\nAssistant: the dog"]
    with torch.no_grad():
        expected = [model(torch.tensor([words(text).input_ids])).logits[0, 0].item() for text in texts]
    assert judge.score(prompts, replies).tolist() == pytest.approx(expected, abs=1e-5)  # batched and padded = one by one
    p = judge.preference(prompts[:1], ["fine"], ["dog"])
    assert p.item() == pytest.approx(1 - judge.preference(prompts[:1], ["dog"], ["fine"]).item())


def test_long_replies_keep_their_end(reward_folder):
    judge = load_judge(f"hf:{reward_folder[0]}")
    long = "cat " * 60
    a, b = judge.score(["x", "x"], [long + "good", long + "bad"])
    assert a != b


def test_own_function(world):
    judge = load_judge(f"{world}/judges.py:more_good")
    assert judge.score is None
    p = judge.preference(["x", "x"], ["good good", "bad"], ["bad", "bad"])
    assert p[0] > 0.9 and p[1] == 0.5


@pytest.mark.parametrize(
    "function,message",
    [
        ("wrong_length", r"wrong_length: returned 1 values for 2 pairs"),
        ("outside", r"outside: value 0 is 1\.5; a preference lies in \[0, 1\]"),
        ("not_a_number", r"not_a_number: value 0 is nan"),
        ("raises", r"raises: raised ZeroDivisionError: division by zero \(.*judges\.py:\d+\)"),
    ],
)
def test_functions_that_misbehave(world, function, message):
    with pytest.raises(UserError, match=message):
        load_judge(f"{world}/judges.py:{function}").preference(["x", "x"], ["a", "b"], ["c", "d"])


def test_judges_that_are_not_there(world):
    with pytest.raises(UserError, match="Did you mean sentiment"):
        load_judge("sentimant")
    with pytest.raises(UserError, match="no function 'missing'.*more_good"):
        load_judge(f"{world}/judges.py:missing")
    with pytest.raises(UserError, match="no file"):
        load_judge("nowhere.py:f")
    for spec in ("pairrm", "pairwise:org/model"):
        with pytest.raises(UserError, match="not there yet. Use --judge hf:ID"):
            load_judge(spec)


def test_preference_matrix(world):
    lexicon, function, biased = (
        load_judge("sentiment"),
        load_judge(f"{world}/judges.py:more_good"),
        load_judge(f"{world}/judges.py:first_wins"),
    )
    candidates = [[UP, DOWN, "ok"], ["good", "bad"]]
    for judge in (lexicon, function):
        three, two = preference_matrix(judge, ["x", "y"], candidates)
        assert three.shape == (3, 3) and two.shape == (2, 2)
        torch.testing.assert_close(three + three.T, torch.ones(3, 3))
        assert three[0, 1].item() == pytest.approx(judge.preference(["x"], [UP], [DOWN]).item())
    assert (preference_matrix(biased, ["x", "y"], candidates)[0] == 0.5).all()  # position bias cancels in both orders
