"""`--judge openai:MODEL`: a language model behind an OpenAI-compatible endpoint compares two replies.

    answer to a question = probabilities of "A" and "B" as its next word, or else the letter that it wrote
    p(a ≻ b) = P("A") / (P("A") + P("B")), 1 or 0 without logprobs, ½ for a refusal or what cannot be read

One order; `judges.both_orders` asks the other. Every answer is kept in the user's cache folder, by endpoint,
model and the words of the question (so by template, prompt, replies and order), and is asked for once.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from tqdm import tqdm

from cleanalign.answers import Answers
from cleanalign.data import Prompt, prompt_text
from cleanalign.embedded import cache_folder
from cleanalign.endpoint import OPTIONS, Budget, Cancelled, Endpoint
from cleanalign.errors import JudgeFailure, require
from cleanalign.judge_templates import load_template, read_letter

CHARACTERS_PER_TOKEN = 4  # of English text, roughly: for estimates
FIRST_ANSWERS = 20  # a model none of whose first so many answers can be read is no judge
WORTH_SAYING = 100  # questions at once that are announced before they are asked


@dataclass
class JudgeSettings:
    """How a judge behind a network is asked. Judges that are loaded with one object share its limit."""

    template: str = "alpaca-eval"
    max_requests: int | None = None
    concurrency: int = 8

    def __post_init__(self):
        for name, value in (("max-requests", self.max_requests), ("concurrency", self.concurrency)):
            require(value is None or value >= 1, f"--judge-{name} must be at least 1, got {value}.")
        self.budget = Budget(self.max_requests)


@dataclass
class Tally:
    """What was asked since the process began; tokens are those that the server counts."""

    answers: int = 0
    answers_from_disk: int = 0
    refusals: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class OpenAIJudge:
    """The model `model` at OPENAI_BASE_URL. Raises `UserError`
    for a missing key or package, a wrong URL or template."""

    def __init__(self, model: str, flag: str, settings: JudgeSettings):
        self.what = f"{flag} openai:{model}"
        require(bool(model.strip()), f"{flag} openai:MODEL needs the model's name after 'openai:'.")
        self.template = load_template(settings.template)
        self.settings = settings
        self.endpoint = Endpoint(model, self.what, settings.budget)
        self.answers = Answers(cache_folder() / "judge_answers.sqlite3")
        self.tally = Tally()
        self.lock = threading.Lock()
        self.masses: list[float] = []  # of A and B together, where the server gives logprobs
        self.warned = False

    # --- before and after a run ---

    def announce(self, comparisons: int, characters: float) -> None:
        """Say what a run will ask at most: `comparisons` in both orders, with `characters` of prompt and
        replies each. Raises `UserError` if no server is there."""
        self.endpoint.knock()
        requests = 2 * comparisons
        tokens = requests * (characters + self.template.characters()) / CHARACTERS_PER_TOKEN
        lines = [
            f"{self.what} at {self.endpoint.url}: at most {requests:,} requests ({comparisons:,} "
            f"comparisons in both orders), about {_rounded(tokens)} tokens; "
            f"answers are kept in {self.answers.file}"
        ]
        limit = self.settings.max_requests
        if limit is not None and limit < requests:
            lines.append(f"--judge-max-requests {limit:,} may end the run before that; --resume goes on")
        print("\n".join(lines), flush=True)

    def figures(self) -> dict:
        """What was asked since the process began. `requests` counts every attempt; `answer_mass` is the mean
        probability of A and B together."""
        mass = sum(self.masses) / len(self.masses) if self.masses else None
        requests = {"requests": self.endpoint.sent, **vars(self.tally)}
        return {**requests, "answer_mass": mass, "endpoint": self.endpoint.url}

    # --- judging ---

    def preference(self, prompts: list[Prompt], a: list[str], b: list[str]) -> torch.Tensor:
        """(B,) p(a ≻ b), `a` shown first. Raises `JudgeFailure` when the judge stops for good."""
        questions = [
            self.template.ask(prompt_text(prompt), x, y) for prompt, x, y in zip(prompts, a, b, strict=True)
        ]
        keys = [self.key(question) for question in questions]
        by_key = dict(zip(keys, questions, strict=True))
        answers = {}
        for key in by_key:
            kept = self.answers.get(key)
            if kept is not None:
                answers[key] = kept
        missing = {key: question for key, question in by_key.items() if key not in answers}
        for answer in answers.values():
            self._count(answer, paid=False)
            self._require_a_judge(answer)
        if missing:
            self._say(len(by_key), missing)
            answers |= self._ask(missing)
        self._warn()
        return torch.tensor([preference_of(answers[key]) for key in keys])

    def key(self, question: list[dict]) -> str:
        """What an answer is kept under."""
        asked = [self.endpoint.url, self.endpoint.model, question, OPTIONS]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _ask(self, missing: dict[str, list[dict]]) -> dict[str, dict]:
        """The answers to questions, many at a time. The first failure ends it; what is under way is kept."""
        stop, answers = threading.Event(), {}
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="judge")
        futures = {pool.submit(self._answer, key, question, stop): key for key, question in missing.items()}
        bar = tqdm(total=len(futures), desc="judge", leave=False, disable=len(futures) < WORTH_SAYING)
        try:
            for future in as_completed(futures):
                answers[futures[future]] = answer = future.result()
                bar.update(1)
                self._require_a_judge(answer)
        except BaseException as error:
            stop.set()
            # an answer under way is paid for, so it is waited for; unless somebody wants the program to end
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise
        finally:
            bar.close()
        pool.shutdown()
        return answers

    def _answer(self, key: str, question: list[dict], stop: threading.Event) -> dict:
        """Ask one question, and keep the answer before anybody reads it."""
        if stop.is_set():
            raise Cancelled
        answer = self.answers.get(key)  # another process may have been faster
        if answer is None:
            answer = self.endpoint.ask(question, stop)
            self.answers.put(key, (self.endpoint.url, self.endpoint.model, self.template.name), answer)
            self._count(answer, paid=True)
        else:
            self._count(answer, paid=False)
        return answer

    # --- what is said of it ---

    def _count(self, answer: dict, paid: bool) -> None:
        reading, tally = read(answer), self.tally
        with self.lock:
            tally.answers += paid
            tally.answers_from_disk += not paid
            tally.refusals += answer["refused"]
            tally.unreadable += reading is None and not answer["refused"]
            if paid:
                tally.prompt_tokens += answer["usage"][0]
                tally.completion_tokens += answer["usage"][1]
            if reading and reading.mass is not None:
                self.masses.append(reading.mass)

    def _require_a_judge(self, answer: dict) -> None:
        """Raise `JudgeFailure` if no answer so far could be read: it would cost money and say ½ for ever."""
        tally = self.tally
        seen = tally.answers + tally.answers_from_disk
        if seen >= FIRST_ANSWERS and tally.refusals + tally.unreadable == seen:
            raise JudgeFailure(
                f"{self.what}: none of its first {seen} answers is A or B, the last one is "
                f"{answer['text'][:80]!r}. Take a model that follows the question, or another "
                "--judge-template."
            )

    def _say(self, asked: int, missing: dict[str, list[dict]]) -> None:
        """Before many questions: how many they are, and about how many tokens."""
        if len(missing) < WORTH_SAYING:
            return
        characters = sum(len(message["content"]) for question in missing.values() for message in question)
        tokens = _rounded(characters / CHARACTERS_PER_TOKEN)
        print(
            f"{self.what}: {asked:,} questions, {asked - len(missing):,} of them answered on disk; asks the "
            f"other {len(missing):,}, about {tokens} tokens",
            flush=True,
        )

    def _warn(self) -> None:
        """Say once that a tenth of the answers is no answer: such a judge is noise, drawn towards ½."""
        tally = self.tally
        seen, bad = tally.answers + tally.answers_from_disk, tally.refusals + tally.unreadable
        if not self.warned and seen >= FIRST_ANSWERS and bad > seen / 10:
            self.warned = True
            print(f"{self.what}: {bad} of {seen} answers name neither A nor B and count as ½", flush=True)


# --- from an answer to a preference ---------------------------------------------------------


@dataclass
class Reading:
    """What an answer says: p(the reply shown first is better), and its probability of A and B together."""

    preference: float
    mass: float | None = None


def preference_of(answer: dict) -> float:
    """p(the reply shown first is better); ½ for a refusal or an answer that cannot be read."""
    reading = read(answer)
    return 0.5 if reading is None else reading.preference


def read(answer: dict) -> Reading | None:
    """An answer's meaning; None for a refusal, or where neither text nor probabilities name A or B.

    The probabilities are read at the letter that the text names, or where it names none at its first word. A
    letter that the server did not list among the likeliest gets the least probability listed, its upper
    bound: AlpacaEval's parser takes 0, which makes certainties of a model that meant neither.
    """
    if answer["refused"]:
        return None
    letter = read_letter(answer["text"])
    words = [token for token in answer["tokens"] if token[0].strip()]
    if letter:
        words = [token for token in words if token[0].strip() == letter]
    for _, log_a, log_b, least in words[:1]:
        if log_a is None and log_b is None:
            continue
        a, b = (math.exp(least if logprob is None else logprob) for logprob in (log_a, log_b))
        listed = sum(math.exp(logprob) for logprob in (log_a, log_b) if logprob is not None)
        if a + b > 0:
            return Reading(a / (a + b), min(listed, 1.0))
    return Reading(float(letter == "A")) if letter else None


def _rounded(number: float) -> str:
    """A number to two digits, for an estimate."""
    digits = max(0, len(str(int(number))) - 2)
    return f"{round(number, -digits):,.0f}"
