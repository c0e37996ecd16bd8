"""One OpenAI-compatible endpoint: a question goes out, an answer comes back, whatever the server does.

Retried, with back-off: 408, 409, 429, 5xx, time-outs, broken connections and bodies that are no chat
completion. Everything else is final, and says what to mend. The API key stands in no message and no file.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import socket
import threading
import time
import urllib.request
from urllib.parse import urlsplit, urlunsplit

from cleanalign.errors import JudgeFailure, UserError, optional_import, require

DEFAULT_URL = "https://api.openai.com/v1"
REQUEST_SECONDS = 120.0  # after that a request counts as lost
ATTEMPTS = 7  # of one question, before the server counts as gone
FIRST_WAIT = 0.5  # seconds before the second attempt; doubled for each further one
LONGEST_WAIT = 30.0
LONGEST_RETRY_AFTER = 600.0  # a server that wants more than this is not waited for
# The answer's letter is looked for among the first tokens; 20 alternatives are the most that OpenAI gives.
OPTIONS = {"temperature": 0, "max_tokens": 16, "logprobs": True, "top_logprobs": 20}
# What a 400 says of a question that this server will never answer, as opposed to one it does not understand
UNANSWERABLE = ("context_length", "context length", "context window", "content_filter", "content management")


class Budget:
    """A number of requests that may be sent; None: any. Judges of one run share one."""

    def __init__(self, limit: int | None):
        self.limit, self.sent = limit, 0
        self.lock = threading.Lock()

    def take(self, what: str) -> None:
        """Count a request that is about to be sent. Raises `JudgeFailure` at the limit."""
        with self.lock:
            if self.limit is not None and self.sent >= self.limit:
                raise JudgeFailure(
                    f"{what}: --judge-max-requests {self.limit} is reached. Every answer is kept: a later "
                    "start asks only what is missing, and counts anew."
                )
            self.sent += 1


class Cancelled(Exception):
    """Another question failed for good: this one is not tried again."""


class NoCompletion(Exception):
    """The server's answer is no chat completion."""


class Endpoint:
    """The server at OPENAI_BASE_URL, as `what` (flag and judge, for messages) asks it.

    Raises `UserError` without a key, or for what is no URL.
    """

    def __init__(self, model: str, what: str, budget: Budget):
        self.model, self.what, self.budget = model, what, budget
        self.openai = optional_import("openai", "'cleanalign[judge]'")
        url = os.environ.get("OPENAI_BASE_URL", "").strip() or DEFAULT_URL
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        require(
            bool(self.key),
            f"{what}: OPENAI_API_KEY is not set. Set it to your key, or to any word for a server of your own "
            "that wants none.",
        )
        require(
            self.key.isascii() and self.key.isprintable(), f"{what}: OPENAI_API_KEY has odd characters in it."
        )
        try:
            parts = urlsplit(url)
            self.address = (parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443))
        except ValueError as error:
            raise UserError(f"{what}: OPENAI_BASE_URL {url}: {error}.") from error
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            f"{what}: OPENAI_BASE_URL {url}: not a URL such as {DEFAULT_URL} or http://127.0.0.1:8000/v1.",
        )
        # without what may be a password: this is written to files
        place = parts.netloc.rpartition("@")[2]
        self.url = urlunsplit((parts.scheme, place, parts.path.rstrip("/"), "", ""))
        self.client = self.openai.OpenAI(
            api_key=self.key, base_url=url, max_retries=0, timeout=REQUEST_SECONDS
        )
        self.options = dict(OPTIONS)
        self.lock = threading.Lock()
        self.sent = self.answered = 0
        self.not_before = 0.0  # the server asked everybody to wait until then
        self.jitter = random.Random()  # apart from the run's own draws

    def knock(self) -> None:
        """Raise `UserError` if nothing listens there. Costs no request; left out behind a proxy."""
        scheme = urlsplit(self.url).scheme
        if scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(self.address[0]):
            return
        try:
            socket.create_connection(self.address, timeout=10).close()
        except OSError as error:
            raise UserError(
                f"{self.what}: no server at OPENAI_BASE_URL {self.url}: {error}. Start it, or mend the URL."
            ) from error

    def ask(self, messages: list[dict], stop: threading.Event) -> dict:
        """The answer to one question (see `condensed`). `stop` ends the waiting and the retries.

        Raises `JudgeFailure` when the server will not answer for good.
        """
        attempts = 0
        while True:
            self._wait(self.not_before - time.monotonic(), stop)
            self.budget.take(self.what)
            with self.lock:
                self.sent += 1
            answered, options, wait = self.answered, self.options, None
            try:
                answer = self._send(messages, options)
                with self.lock:
                    self.answered += 1
                return answer
            except self.openai.APIStatusError as error:
                if error.status_code in (400, 413, 422):
                    if self._without_what_it_refuses(error, options):
                        continue
                    return self._unanswerable(error)
                self._require_temporary(error)
                problem, wait = self._said(error), retry_after(error.response.headers)
                # a limit of requests a minute: as long as others get through, there is nothing to mend
                patient = error.status_code == 429 and self.answered > answered
                attempts = 0 if patient else attempts
            except self.openai.APITimeoutError:
                problem = f"no answer within {REQUEST_SECONDS:.0f} s"
            except self.openai.APIConnectionError as error:
                problem = self._clean(f"{error} {error.__cause__ or ''}".strip())
            except NoCompletion as error:
                problem = f"{self._clean(str(error))} Is the URL right? It usually ends in /v1"
            attempts += 1
            if attempts >= ATTEMPTS:
                raise JudgeFailure(
                    f"{self.what}: gave up after {attempts} attempts at {self.url}: {problem}. Every answer "
                    "so far is kept: a later start asks only what is missing."
                )
            self._back_off(attempts, wait, stop)

    def _send(self, messages: list[dict], options: dict) -> dict:
        raw = self.client.chat.completions.with_raw_response.create(
            model=self.model, messages=messages, **options
        )
        return condensed(raw.http_response.text)

    def _wait(self, seconds: float, stop: threading.Event) -> None:
        if stop.wait(max(0.0, seconds)):
            raise Cancelled

    def _back_off(self, attempts: int, asked: float | None, stop: threading.Event) -> None:
        """Wait before the next attempt: as long as the server asks, then with all other questions, or else
        twice as long as the last time, less a random part so that not all come back at once."""
        if asked is None:
            longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempts - 1))
            return self._wait(longest * self.jitter.uniform(0.5, 1), stop)
        if asked > LONGEST_RETRY_AFTER:
            raise JudgeFailure(
                f"{self.what}: {self.url} asks to wait {asked:.0f} s before the next request. Start "
                "again then: every answer so far is kept."
            )
        with self.lock:
            self.not_before = max(self.not_before, time.monotonic() + asked)
        return self._wait(self.not_before - time.monotonic(), stop)

    def _without_what_it_refuses(self, error, sent: dict) -> bool:
        """Whether the server refused one of our options, which is left out from now on: models that think
        first know no temperature, many servers no or fewer logprobs."""
        text = str(error.body or error.message)
        with self.lock:
            if self.options is not sent:  # another thread has already learnt it
                return True
            for name in ("top_logprobs", "logprobs", "max_tokens", "temperature"):
                if name not in sent or name not in text:
                    continue
                left = {key: value for key, value in sent.items() if key != name}
                if name == "top_logprobs" and sent[name] > 5:
                    left[name] = 5  # some servers' limit
                elif "logprobs" in name:
                    left = {key: value for key, value in left.items() if "logprobs" not in key}
                self.options = left
                return True
        return False

    def _unanswerable(self, error) -> dict:
        """A refusal as an answer, for a question that is too long or that the server's filter stops; else
        the request itself is wrong."""
        text = str(error.body or error.message).lower()
        if any(sign in text for sign in UNANSWERABLE):
            return {"text": "", "tokens": [], "refused": True, "usage": [0, 0]}
        raise JudgeFailure(f"{self.what}: {self.url} does not understand the request: {self._said(error)}.")

    def _require_temporary(self, error) -> None:
        """Raise `JudgeFailure` for what no retry mends."""
        status, said = error.status_code, self._said(error)
        if status in (401, 403):
            raise JudgeFailure(
                f"{self.what}: {self.url} refuses the key in OPENAI_API_KEY, or this use of it: {said}."
            )
        if status == 404:
            raise JudgeFailure(
                f"{self.what}: {self.url} knows no model {self.model!r}, or is not the API's address, which "
                f"usually ends in /v1: {said}."
            )
        if status == 402 or "insufficient_quota" in str(error.body):
            raise JudgeFailure(
                f"{self.what}: the account at {self.url} has no credit left: {said}. Every answer so far is "
                "kept."
            )
        if status not in (408, 409, 429) and status < 500:
            raise JudgeFailure(f"{self.what}: {self.url}: {said}.")

    def _said(self, error) -> str:
        text = error.body
        if isinstance(text, dict):  # OpenAI's "message", or FastAPI's "detail"
            text = text.get("message") or text.get("detail") or text
        return self._clean(f"{error.status_code} {text or error.message}".rstrip(". "))

    def _clean(self, text: str) -> str:
        """A server's words in one short line; servers may quote the key."""
        return " ".join(text.replace(self.key, "…").split())[:300]


def retry_after(headers) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date; None without one."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def condensed(body: str) -> dict:
    """What of a chat completion is kept: {"text", "refused", "tokens", "usage": [prompt, completion tokens]}.

    `tokens` has for each generated token [text, log P(A), log P(B), the smallest log P that was listed], as
    far as the server lists alternatives; A and B count with blanks around them, and None is one that was not
    listed. Raises `NoCompletion` for anything else than a chat completion.
    """
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        require(isinstance(text, str), "content")
        usage = completion.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        refused = bool(message.get("refusal")) or choice.get("finish_reason") == "content_filter"
        listed = (choice.get("logprobs") or {}).get("content") or []
        tokens = [letters(entry) for entry in listed]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, UserError) as error:
        raise NoCompletion(f"the answer is no chat completion, it begins with {body[:60]!r}.") from error
    return {"text": text, "refused": refused, "usage": counts, "tokens": tokens}


def letters(entry: dict) -> list:
    """[text, log P(A), log P(B), smallest log P listed] of one generated token."""
    found: dict[str, float] = {}
    least = None
    for other in entry.get("top_logprobs") or []:
        logprob, letter = float(other["logprob"]), other["token"].strip()
        if not math.isfinite(logprob):
            continue
        least = logprob if least is None else min(least, logprob)
        if letter in ("A", "B"):
            together = math.exp(found.get(letter, -math.inf)) + math.exp(logprob)
            found[letter] = math.log(together) if together > 0 else logprob
    return [str(entry["token"]), found.get("A"), found.get("B"), least]
