"""How a language model is asked which of two replies is better, and how its answer is read.

A template is text with the fields {prompt}, {a} and {b}; it must end in a question that A or B answers. A
line `[system]` begins a system message, a line `[user]` the user's; without them all of it is the user's. Any
other word in braces is an error, for it is a field that nobody fills; braces around anything else are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cleanalign.errors import UserError, near, require

# In the manner of AlpacaEval's classifier template (alpaca_eval_clf): the same framing, but A and B for its m
# and M, and words of our own. Win rates by it are not AlpacaEval's.
ALPACA_EVAL = '''[system]
You compare the answers of language models and pick the one that people would prefer. Your verdicts make a
leaderboard.
[user]
Below are an instruction that was given to two language models and the answer of each. Judge by the quality of
the answers, as a person who gave the instruction would; their order means nothing.

## Instruction

{
    "instruction": """{prompt}""",
}

## Answers

{
    {
        "model": "A",
        "answer": """{a}"""
    },
    {
        "model": "B",
        "answer": """{b}"""
    }
}

## Task

Which model gave the better answer? Reply with its letter, A or B, and nothing else: no quotes, no spaces, no
explanation.

## Better model
'''

# The question of DPO's evaluation by GPT-4 (arXiv 2305.18290, appendix C.2, prompt C). There the judge
# explains itself before it answers; here it answers at once: its first token's probabilities are the verdict.
TLDR = """Which of the following summaries does a better job of summarizing the most important points in the \
given forum post, without including unimportant or irrelevant details? A good summary is both precise and \
concise.

Post:
{prompt}

Summary A:
{a}

Summary B:
{b}

State only "A" or "B" to indicate your choice.
Preferred:"""

TEMPLATES = {"alpaca-eval": ALPACA_EVAL, "tldr": TLDR}
FIELDS = ("prompt", "a", "b")
FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Template:
    """Messages with fields in them."""

    name: str
    messages: tuple[tuple[str, str], ...]  # (role, text)

    def ask(self, prompt: str, a: str, b: str) -> list[dict]:
        """The question as chat messages. What stands in braces in a reply stays as it is."""
        values = {"prompt": prompt, "a": a, "b": b}
        filled = []
        for role, text in self.messages:
            content = FIELD.sub(lambda field: values[field[1]], text)
            filled.append({"role": role, "content": content})
        return filled

    def characters(self) -> int:
        """Its length without the fields' values."""
        return sum(len(FIELD.sub("", text)) for _, text in self.messages)


def load_template(spec: str, flag: str = "--judge-template") -> Template:
    """The template that `spec` names, or the one in the file `spec`. Raises `UserError` if it is not there,
    or a field is missing, unknown or not as frequent as its counterpart."""
    if spec in TEMPLATES:
        text = TEMPLATES[spec]
    elif Path(spec).is_file():
        try:
            text = Path(spec).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {spec}: cannot be read: {error}") from error
    else:
        raise UserError(f"{flag} {spec}: no such template, and no such file. {near(spec, TEMPLATES)}")
    found = FIELD.findall(text)
    for name in found:
        require(
            name in FIELDS,
            f"{flag} {spec}: unknown field {{{name}}}. A template's fields are {{prompt}}, {{a}} and {{b}}.",
        )
    for name in FIELDS:
        require(name in found, f"{flag} {spec}: the field {{{name}}} is missing.")
    count_a, count_b = found.count("a"), found.count("b")
    require(
        count_a == count_b,
        f"{flag} {spec}: {{a}} stands in it {count_a} times and {{b}} {count_b} times. "
        "A template must treat both replies alike.",
    )
    return Template(spec, split_messages(text, f"{flag} {spec}"))


def split_messages(text: str, what: str) -> tuple[tuple[str, str], ...]:
    """(role, text) of each message. The system's, where there is one, stands first, the user's last."""
    parts = re.split(r"^\[(system|user)\][ \t]*\n", text, flags=re.M)
    if len(parts) == 1:
        return (("user", text.strip()),)
    roles = parts[1::2]
    fine = not parts[0].strip() and roles in (["user"], ["system", "user"])
    require(fine, f"{what}: the lines [system] and [user] begin a message each, once, in this order.")
    return tuple((role, body.strip()) for role, body in zip(roles, parts[2::2], strict=True))


# --- answers --------------------------------------------------------------------------------

# the first line is a letter and nothing else: "A", "(B).", "**A**"
ALONE = re.compile(r"^\W*([AB])[^\w\s:]*[ \t]*(?:\n|$)")
# a letter begins it, and punctuation follows: "A. It is kinder", "B: because"; not "A good reply"
FIRST = re.compile(r"^\W*([AB])[^\w\s'’]+(?:\s|$)")
# "Answer: B", "Preferred: A", "The better response is B", "Model A", "Response B is better"
NAMED = re.compile(
    r"\b(?:answer|verdict|choice|better|best|preferred|prefer|choose|model|response|reply"
    r"|summary|output|option)(?:\s+(?:model|response|reply|summary|output|option))?(?:\s+is)?"
    r"\W{1,4}([AB])(?![\w'’])(?=\W*$|\s+is better)",
    re.I,
)
# a sentence with one of these may mean the other letter, or neither
DOUBT = re.compile(r"\b(?:not|neither|nor|cannot|can't|tie|tied|both|equal|equally|worse)\b", re.I)


def read_letter(text: str) -> str | None:
    """ "A" or "B" where an answer names one plainly; None where it has to be guessed."""
    alone = ALONE.search(text)
    if alone:
        return alone[1]
    for pattern in (FIRST, NAMED):
        found = pattern.search(text)
        if found and found[1] in "AB" and not DOUBT.search(text):
            other = "B" if found[1] == "A" else "A"
            return None if re.search(rf"\b{other}\b", text) else found[1]
    return None
