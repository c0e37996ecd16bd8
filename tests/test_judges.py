"""Judges: lexicons, a reward model with its own tokenizer, your own function, and how each goes wrong."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

from cleanalign.errors import UserError
from experiment import Experiment
from judges import both_orders, load_judge, pairwise_model, pairwise_question, preference_matrix

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
    """A sequence-classification model whose tokenizer is not the policy's (another vocabulary, no chat
    template)."""
    path = tmp_path_factory.mktemp("reward")
    words = tiny.tokenizer(chat=False, extra=("extra", "words", "!"))
    words.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        num_labels=1,
        pad_token_id=words.pad_token_id,
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(path)
    return path, words


def test_reward_model_through_its_own_tokenizer(reward_folder):
    path, words = reward_folder
    judge = load_judge(f"hf:{path}")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    prompts, replies = (
        [
            "good cat",
            [
                {"role": "user", "content": "sun"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "why"},
            ],
        ],
        ["fine", "the dog"],
    )
    texts = ["good cat fine", "\n\nHuman: sun\n\nAssistant: yes\n\nHuman: why\n\nAssistant: the dog"]
    with torch.no_grad():
        expected = [model(torch.tensor([words(text).input_ids])).logits[0, 0].item() for text in texts]
    # batched and padded = one by one
    assert judge.score(prompts, replies).tolist() == pytest.approx(expected, abs=1e-5)
    p = judge.preference(prompts[:1], ["fine"], ["dog"])
    assert p.item() == pytest.approx(1 - judge.preference(prompts[:1], ["dog"], ["fine"]).item())


@pytest.mark.parametrize("pad", ["<pad>", "<|endoftext|>"])
def test_a_reward_read_at_the_end_token(pad, tmp_path):
    """TL;DR's reward model waits for <|endoftext|>: a finished summary has it and a cut one has not, also
    where the tokenizer pads with that very token."""
    words = tiny.tokenizer(chat=False)
    words.add_special_tokens({"eos_token": "<|endoftext|>"})
    words.pad_token = pad
    path = tmp_path / "EleutherAI_pythia-1b-deduped__reward__tldr"
    words.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "num_labels": 1}
    config = transformers.GPT2Config(vocab_size=len(words), pad_token_id=words.pad_token_id, **sizes)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(path)

    judge = load_judge(f"hf:{path}")
    ends = words.eos_token_id
    fine, dog = (words.convert_tokens_to_ids(word) for word in ("fine", "dog"))
    run = SimpleNamespace(tokenizer=words, ends=[ends])
    finished, cut = Experiment.texts(run, [[[fine, ends], [fine, dog]]], judge)[0]
    assert (finished, cut) == ("fine<|endoftext|>", "fine dog")
    assert Experiment.texts(run, [[[fine, ends]]]) == [["fine"]]
    with torch.no_grad():
        rows = words("cat fine").input_ids + [ends], words("cat fine dog sun").input_ids
        hidden = [model.transformer(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        expected = [model.score(state).item() for state in hidden]
    longer = cut + " sun"
    assert judge.score(["cat", "cat"], [finished, longer]).tolist() == pytest.approx(expected, abs=1e-5)


def test_long_replies_keep_their_end(reward_folder):
    judge = load_judge(f"hf:{reward_folder[0]}")
    long = "cat " * 60
    a, b = judge.score(["x", "x"], [long + "good", long + "bad"])
    assert a != b


# The format as the card of RLHFlow/pair-preference-model-LLaMA3-8B renders it: a chat template for the
# context, then the question.
CARD_CONTEXT = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
    "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)
CARD_QUESTION = "[CONTEXT] {context} [RESPONSE A] {response_A} [RESPONSE B] {response_B} \n"
DIALOGUE = [
    {"role": "user", "content": "sun"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why"},
]


@pytest.fixture(scope="module")
def pairwise_folder(tmp_path_factory):
    """A causal model with a chat template, single tokens A and B, and absolute positions, which padding must
    not shift."""
    path = tmp_path_factory.mktemp("pairwise")
    words = tiny.tokenizer(extra=("A", "B", "[CONTEXT]", "[RESPONSE", "A]", "B]", "<turn>"))
    words.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path, words


def test_pairwise_model_asks_as_its_card_does(pairwise_folder):
    path, words = pairwise_folder
    judge = load_judge(f"pairwise:{path}")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    prompts, a, b = (
        ["good cat", DIALOGUE, "the moon"],
        ["fine", "the dog " * 8, "yes"],
        ["bad " * 5, "no", "not very good"],
    )
    expected = []
    for prompt, x, y in zip(prompts, a, b, strict=True):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        context = words.apply_chat_template(messages, chat_template=CARD_CONTEXT, tokenize=False)
        question = CARD_QUESTION.format(context=context, response_A=x, response_B=y)
        assert pairwise_question(prompt, x, y) == question
        text = words.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = words.encode(text.replace(words.bos_token, ""), add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits = model(ids).logits[0, -1, words.convert_tokens_to_ids(["A", "B"])]
        expected.append(logits.softmax(0)[0].item())
    p = judge.preference(prompts, a, b)
    assert p.tolist() == pytest.approx(expected, abs=1e-5)  # batched and padded = one by one
    torch.testing.assert_close(pairwise_model(str(path), "cpu", max_tokens=1)(prompts, a, b), p)
    swapped = judge.preference(prompts, b, a)
    assert (p + swapped - 1).abs().max() > 1e-3  # one order alone has position bias
    torch.testing.assert_close(both_orders(judge, prompts, a, b), (p + 1 - swapped) / 2)
    (matrix,) = preference_matrix(judge, [DIALOGUE], [["yes", "no", "good"]])
    torch.testing.assert_close(matrix + matrix.T, torch.ones(3, 3))
    assert judge.score is None


def test_pairwise_questions_that_are_too_long_lose_their_beginning(pairwise_folder):
    judge = load_judge(f"pairwise:{pairwise_folder[0]}")  # 256 positions
    long = "cat " * 400
    first, second, third = judge.preference([long, "dog " + long, "cat"], ["good"] * 3, ["bad"] * 3)
    assert first == second and first != third


def test_pairwise_models_that_cannot_answer(world, tmp_path):
    with pytest.raises(
        UserError, match=r"--judge pairwise:.*A and B must be one token each, and not the same"
    ):
        load_judge(f"pairwise:{world}/model")
    with pytest.raises(UserError, match="has no chat template"):
        load_judge(f"pairwise:{world}/plain")
    with pytest.raises(UserError, match="needs a hub id or folder"):
        load_judge("pairwise:")
    with pytest.raises(UserError, match="--judge org/model: could not be loaded from the hub"):
        load_judge("pairwise:org/model")
    with pytest.raises(UserError, match="the folder could not be loaded"):
        load_judge(f"pairwise:{tmp_path}")


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
    with pytest.raises(UserError, match="Did you mean pairrm"):
        load_judge("pairm")


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
    # position bias cancels in both orders
    assert (preference_matrix(biased, ["x", "y"], candidates)[0] == 0.5).all()


def test_a_function_of_two_arguments_is_a_reward(world):
    judge = load_judge(f"{world}/judges.py:goodness")
    assert judge.score(["x", "x"], ["good sun", "bad"]).tolist() == [2.0, 0.0]
    assert judge.preference(["x"], ["good sun"], ["bad"]).item() == pytest.approx(
        1 / (1 + 2.718281828**-2), rel=1e-6
    )


@pytest.mark.parametrize(
    "name,message",
    [
        ("one_reward", "returned 1 values for 2 replies; one reward"),
        ("endless", "value 0 is inf; a reward is a number"),
    ],
)
def test_rewards_that_misbehave(world, name, message):
    judge = load_judge(f"{world}/judges.py:{name}")
    with pytest.raises(UserError, match=message):
        judge.score(["x", "x"], ["good", "bad"])


def test_a_functions_own_measure(tmp_path):
    file = tmp_path / "mine.py"
    lines = [
        "def f(prompts, a, b):",
        "    return [0.5] * len(a)",
        "f.measure = lambda replies: {'count': len(replies)}",
    ]
    lines += [
        "def g(prompts, a, b):",
        "    return [0.5] * len(a)",
        "g.measure = lambda replies: {'share': 1 / 0}",
    ]
    file.write_text("\n".join(lines))
    assert load_judge(f"{file}:f").measure(["x", "y"]) == {"count": 2.0}
    with pytest.raises(
        UserError, match=r"mine.py:g: its measure raised ZeroDivisionError: division by zero \(.*mine.py:6\)"
    ):
        load_judge(f"{file}:g").measure(["x"])
