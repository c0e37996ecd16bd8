"""`--judge openai:MODEL` against a server that misbehaves on purpose, and a real one where there is one."""

import math
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from misbehaving import KEY, Server, completion
from running import metrics_of, start, summary_of

import selm
from cleanalign import endpoint, openai_judge
from cleanalign.answers import Answers
from cleanalign.errors import JudgeFailure, UserError
from cleanalign.judge_templates import TEMPLATES, load_template, read_letter
from cleanalign.openai_judge import JudgeSettings, read
from judges import both_orders, load_judge

pytest.importorskip("openai")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that prefers the longer reply; the environment points to it, and to an empty cache folder."""
    made = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", made.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.02)
    yield made
    made.close()


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "template.txt"
    file.write_text("[system]\nYou judge.\n[user]\n{prompt}: A=<{a}> B=<{b}>\n")
    return str(file)


@pytest.fixture
def judge(server, template):
    """A new judge with these settings, as in a new process."""
    return lambda **settings: load_judge("openai:m", settings=JudgeSettings(template, **settings))


PROMPTS, LONG, SHORT = [f"p{i}" for i in range(12)], ["four"] * 12, ["to"] * 12


# --- preferences ---


def test_probabilities_both_orders_and_what_is_sent(server, judge):
    one = judge()
    p = one.preference(PROMPTS[:2], ["longer", "a"], ["four", "four"])
    torch.testing.assert_close(p, torch.tensor([0.6, 0.35]))  # .5 + (difference of lengths) / 20
    body = server.bodies[0]
    assert [m["role"] for m in body["messages"]] == ["system", "user"] and body["model"] == "m"
    assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 20)
    server.answer = lambda question: completion("A", {"A": math.log(0.8), "B": math.log(0.2)})  # first wins
    assert both_orders(one, ["q"], ["x"], ["y"]).tolist() == pytest.approx([0.5])
    assert one.preference(["q"], ["x"], ["y"]).item() == pytest.approx(0.8)
    assert one.score is None and not one.symmetric
    figures = one.account.figures()
    assert (figures["requests"], figures["answers"], figures["answers_from_disk"]) == (4, 4, 1)
    assert (figures["prompt_tokens"], figures["completion_tokens"]) == (400, 4)
    assert figures["answer_mass"] == pytest.approx(1, abs=0.01)


def test_dialogues_and_replies_with_braces(server, judge):
    prompt = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "{b}"},
    ]
    judge().preference([prompt], ["{a} {prompt}"], ["{unknown}"])
    asked = server.bodies[0]["messages"][-1]["content"]
    assert asked == "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: {b}: A=<{a} {prompt}> B=<{unknown}>"


@pytest.mark.parametrize(
    "answer,p",
    [
        (completion("A"), 1.0),
        (completion(" B."), 0.0),
        (completion("A good reply would be kinder"), 0.5),
        (completion("I cannot say"), 0.5),
        (completion(None, refusal="I won't"), 0.5),
        (
            completion("B", {"B": math.log(0.6), "Both": math.log(0.2), "C": math.log(0.1)}),
            1 / 7,
        ),  # A is at most .1
        (completion("The", {"The": math.log(0.7), "A": math.log(0.2), "B": math.log(0.1)}), 2 / 3),
        (
            completion("A", {"A": math.log(0.3), " A": math.log(0.3), "B": math.log(0.2)}),
            0.75,
        ),  # A in two spellings
        (completion("So", {"So": -0.1, "It": -3.0}), 0.5),
        (completion("A", {"A": 0.0, "B": -9999.0}), 1.0),  # what OpenAI writes for nearly nothing
    ],
)
def test_every_kind_of_answer(server, judge, answer, p):
    server.answer = lambda question: answer
    one = judge()
    assert one.preference(["q"], ["x"], ["y"]).item() == pytest.approx(p, abs=1e-6)
    figures = one.account.figures()
    refused = bool(answer["choices"][0]["message"].get("refusal"))
    assert (figures["refusals"], figures["unreadable"]) == (refused, p == 0.5 and not refused)


@pytest.mark.parametrize(
    "text,letter",
    [
        *[(text, "A") for text in ("A", " A\n", "(A)", "**A**", '"A"', "A. It is kinder", "A\n\nB")],
        *[(text, "A") for text in ("Answer: A", "Preferred: A")],
        *[
            (text, "B")
            for text in ("The better response is B.", "Model B", "Response B is better", "B: because")
        ],
        *[(text, None) for text in ("", "A good reply", "Both A and B", "A: no\n\nB: yes", "A is worse")],
        *[(text, None) for text in ("I prefer neither, A", "The answer is not A", "a", "AB", "A's", "C")],
        ("Model B is worse", None),
    ],
)
def test_reading_text(text, letter):
    assert read_letter(text) == letter


def test_probabilities_are_read_at_the_letter_that_the_text_names():
    tokens = [
        ["Answer", None, -8.0, -9.0],
        [":", None, None, -9.0],
        [" B", math.log(0.25), math.log(0.75), -9.0],
    ]
    reading = read({"text": "Answer: B", "refused": False, "tokens": tokens})
    assert reading.preference == pytest.approx(0.25) and reading.mass == pytest.approx(1.0)


# --- nothing is paid for twice ---


def test_every_question_is_asked_once_and_found_again(server, judge):
    first, again = judge(), judge()
    p = both_orders(first, PROMPTS + PROMPTS, LONG + LONG, SHORT + SHORT)
    assert set(server.asked.values()) == {1} and server.requests == 24
    assert torch.equal(both_orders(again, PROMPTS, LONG, SHORT), p[:12]) and server.requests == 24
    assert again.account.figures()["requests"] == 0 and again.account.figures()["answers_from_disk"] == 24


def test_another_template_model_or_endpoint_is_another_question(server, judge, template, monkeypatch):
    judge().preference(["q"], ["x"], ["y"])
    load_judge("openai:other", settings=JudgeSettings(template)).preference(["q"], ["x"], ["y"])
    assert server.requests == 2
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")  # the same place
    judge().preference(["q"], ["x"], ["y"])
    assert server.requests == 2
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("/v1", "/v2"))
    judge().preference(["q"], ["x"], ["y"])
    with open(template, "a") as file:
        file.write("Which?\n")
    judge().preference(["q"], ["x"], ["y"])
    assert server.requests == 4


def test_the_key_is_written_nowhere(server, judge, tmp_path, monkeypatch, capfd):
    server.plan = [(401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}."}})]
    with pytest.raises(
        JudgeFailure, match=r"refuses the key in OPENAI_API_KEY.*401 Incorrect API key provided: …"
    ) as stop:
        judge().preference(["q"], ["x"], ["y"])
    assert KEY not in str(stop.value)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url.replace("http://", "http://me:hush@"))
    judge().preference(["q"], ["x"], ["y"])
    judge().account.announce(10, 100)
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert written and not any(KEY.encode() in content or b"hush" in content for content in written)
    said = "".join(capfd.readouterr())
    assert KEY not in said and "hush" not in said


def _keep(folder, start):
    answers = Answers(folder / "answers.sqlite3")
    for i in range(start, start + 20):
        answers.put(str(i % 40), ("url", "model", "template"), {"by": start})


def test_processes_share_the_answers(tmp_path):
    context = multiprocessing.get_context("fork")
    Answers(tmp_path / "answers.sqlite3").put("0", ("url", "model", "template"), {"by": "first"})
    processes = [context.Process(target=_keep, args=(tmp_path, start)) for start in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    answers = Answers(tmp_path / "answers.sqlite3")
    assert answers.get("0") == {"by": "first"}  # never overwritten
    assert all(answers.get(str(i)) for i in range(40)) and answers.get("40") is None


def test_answers_that_cannot_be_kept(tmp_path, server, judge):
    file = judge().account.answers.file
    sqlite3.connect(file).close()
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(JudgeFailure, match=r"judge_answers\.sqlite3.*cannot be kept there.*not a database"):
        judge()


# --- servers that misbehave ---


def test_temporary_failures_are_retried(server, judge):
    server.plan = [429, 500, 502, 503, "hang-up", "nonsense", "html", 408, 529]
    one = judge(concurrency=3)
    p = one.preference(PROMPTS, LONG, SHORT)
    torch.testing.assert_close(p, torch.full((12,), 0.6))
    assert one.account.figures()["requests"] == server.requests == 12 + 9


def test_time_outs_are_retried(server, judge, monkeypatch):
    monkeypatch.setattr(endpoint, "REQUEST_SECONDS", 0.3)
    server.plan = ["slow"]
    assert judge().preference(["q"], ["four"], ["to"]).item() == pytest.approx(0.6)
    assert server.requests == 2


@pytest.mark.parametrize("headers", [{"Retry-After": "0.4"}, {"Retry-After": "date"}])
def test_retry_after_is_honoured_by_all(server, judge, headers):
    if headers["Retry-After"] == "date":  # whole seconds
        headers = {"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))}
    server.plan = [(429, headers, {"error": {"message": "slow down"}})]
    begun = time.monotonic()
    judge(concurrency=1).preference(PROMPTS[:3], LONG[:3], SHORT[:3])
    assert time.monotonic() - begun > 0.35 and server.requests == 4
    server.plan = [(429, {"Retry-After": "100000"}, {})]
    with pytest.raises(JudgeFailure, match="asks to wait 100000 s"):
        judge().preference(["another"], ["x"], ["y"])


def test_rate_limits_are_waited_out_while_others_get_through(server, judge):
    """A question meets more 429s than it has attempts: no reason to give up while others get through."""
    server.seconds = 0.03
    server.meets = lambda question: 429 if "p0:" in question and server.asked[question] < 10 else None
    judge(concurrency=2).preference(PROMPTS, LONG, SHORT)
    assert server.requests == 11 + 10
    server.meets = lambda question: 429  # but when nobody gets through, somebody has to be told
    with pytest.raises(JudgeFailure, match="gave up after 7 attempts.*429"):
        judge(concurrency=1).preference(["new"], ["x"], ["y"])


def test_a_server_that_is_gone(server, judge):
    one = judge(concurrency=2)
    one.preference(PROMPTS[:3], LONG[:3], SHORT[:3])
    server.plan = [500] * 100
    with pytest.raises(
        JudgeFailure, match=r"gave up after 7 attempts at http://127.0.0.1:\d+/v1: 500 status 500 on purpose"
    ):
        one.preference(PROMPTS, LONG, SHORT)
    server.plan = []
    asked = server.requests
    assert judge().preference(PROMPTS, LONG, SHORT).shape == (12,)
    assert server.requests == asked + 9  # the three from before are on disk
    server.close()
    with pytest.raises(JudgeFailure, match=r"gave up after 7 attempts.*refused"):
        one.preference(["new"], ["x"], ["y"])
    with pytest.raises(
        UserError, match=r"no server at OPENAI_BASE_URL http://127.*refused.*Start it, or mend the URL"
    ):
        one.account.announce(1, 1)


@pytest.mark.parametrize(
    "act,message",
    [
        (404, r"knows no model 'm', or is not the API's address, which usually ends in /v1: 404"),
        (403, "refuses the key"),
        (400, "does not understand the request: 400 status 400 on purpose"),
        (
            (422, {}, {"detail": [{"loc": ["body"]}]}),
            r"does not understand the request: 422 \[\{'loc': \['body'\]\}\]",
        ),
        (402, "no credit left"),
        (418, "418 status 418"),
        (
            (429, {}, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}),
            "no credit left",
        ),
    ],
)
def test_what_no_retry_mends(server, judge, act, message):
    server.plan = [act]
    with pytest.raises(JudgeFailure, match=message):
        judge().preference(["q"], ["x"], ["y"])
    assert server.requests == 1


@pytest.mark.parametrize("act", ["nonsense", "html"])
def test_a_url_that_is_something_else(server, judge, act):
    server.plan = [act] * 7
    with pytest.raises(
        JudgeFailure,
        match=r"is no chat completion, it begins with.*Is the URL right\? It usually ends in /v1",
    ):
        judge().preference(["q"], ["x"], ["y"])


def test_options_that_a_server_refuses_are_left_out(server, judge):
    refuse = [
        (400, {}, {"error": {"message": "top_logprobs must be at most 5"}}),
        (400, {}, {"error": {"message": "You are not allowed to request logprobs from this model"}}),
        (400, {}, {"error": {"message": "Unsupported parameter: 'max_tokens'", "param": "max_tokens"}}),
        (400, {}, {"error": {"message": "Unsupported value: 'temperature' does not support 0"}}),
    ]
    server.plan = refuse
    judge(concurrency=1).preference(PROMPTS[:2], LONG[:2], SHORT[:2])
    sent = [sorted(set(body) & set(endpoint.OPTIONS)) for body in server.bodies]
    both = ["logprobs", "max_tokens", "temperature", "top_logprobs"]
    assert sent == [both, both, ["max_tokens", "temperature"], ["temperature"], [], []]
    assert server.bodies[1]["top_logprobs"] == 5


@pytest.mark.parametrize(
    "error",
    [
        {"message": "maximum context length is 512 tokens", "code": "context_length_exceeded"},
        {"message": "filtered", "code": "content_filter"},
    ],
)
def test_questions_that_a_server_will_never_answer_count_as_refusals(server, judge, error):
    server.plan = [(400, {}, {"error": error})]
    one = judge(concurrency=1)
    assert one.preference(PROMPTS[:2], LONG[:2], SHORT[:2]).tolist() == pytest.approx([0.5, 0.6])
    assert one.account.figures()["refusals"] == 1
    assert judge().preference(PROMPTS[:2], LONG[:2], SHORT[:2])[0] == 0.5 and server.requests == 2


def test_a_model_without_an_answer_among_a_and_b(server, judge):
    server.answer = lambda question: completion("Sure! Let me think")
    with pytest.raises(
        JudgeFailure, match=r"none of its first 20 answers is A or B, the last one is 'Sure! Let me think'"
    ):
        both_orders(judge(concurrency=1), PROMPTS, LONG, SHORT)
    asked = server.requests
    assert 20 <= asked <= 22  # one or two were under way
    with pytest.raises(JudgeFailure, match=r"none of its first"):  # nor when started again
        both_orders(judge(concurrency=1), PROMPTS, LONG, SHORT)
    assert server.requests == asked


def test_a_judge_that_often_gives_no_answer_is_said_to(server, judge, capsys):
    server.answer = lambda question: completion("A" if "p1" in question else "Well")  # p1, p10, p11
    both_orders(judge(concurrency=1), PROMPTS[1:] + PROMPTS[:1], LONG, SHORT)
    assert "18 of 24 answers name neither A nor B and count as ½" in capsys.readouterr().out


# --- limits and estimates ---


def test_at_most_so_many_requests_and_so_many_at_once(server, judge):
    server.seconds = 0.05
    with pytest.raises(JudgeFailure, match=r"--judge-max-requests 5 is reached.*asks only what is missing"):
        judge(max_requests=5, concurrency=2).preference(PROMPTS, LONG, SHORT)
    assert server.requests == 5 and server.most_together == 2
    with pytest.raises(JudgeFailure):  # every start gets further
        judge(max_requests=5, concurrency=4).preference(PROMPTS, LONG, SHORT)
    judge(max_requests=5, concurrency=4).preference(PROMPTS, LONG, SHORT)
    assert server.requests == 12 and set(server.asked.values()) == {1}


def test_two_judges_of_a_run_share_the_limit(server, template):
    settings = JudgeSettings(template, max_requests=3)
    one, two = (load_judge(f"openai:{name}", settings=settings) for name in "mn")
    one.preference(["q", "r"], ["x"] * 2, ["y"] * 2)
    with pytest.raises(JudgeFailure, match="--judge-max-requests 3 is reached"):
        two.preference(["q", "r"], ["x"] * 2, ["y"] * 2)
    assert (one.account.figures()["requests"], two.account.figures()["requests"]) == (2, 1)


def test_estimates(server, judge, capsys, monkeypatch):
    one = judge(max_requests=100)
    one.account.announce(1000, 4000.0)
    said = capsys.readouterr().out
    assert "at most 2,000 requests (1,000 comparisons in both orders), about 2,000,000 tokens" in said
    assert "--judge-max-requests 100 may end the run before that" in said
    assert server.requests == 0
    monkeypatch.setattr(openai_judge, "WORTH_SAYING", 10)
    one.preference(PROMPTS[:2], LONG[:2], SHORT[:2])
    one.preference(PROMPTS, LONG, SHORT)
    assert (
        "12 questions, 2 of them answered on disk; asks the other 10, about 73 tokens"
        in capsys.readouterr().out
    )


# --- bad input ---


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "{prompt} {a} {b} {c}",
            r"unknown field \{c\}\. A template's fields are \{prompt\}, \{a\} and \{b\}",
        ),
        ("{prompt} {a}", r"the field \{b\} is missing"),
        ("{a} {b}", r"the field \{prompt\} is missing"),
        ("{prompt} {a} {b} {a}", r"\{a\} stands in it 2 times and \{b\} 1 times. A template must treat both"),
        ("[user]\n{prompt} {a} {b}\n[user]\nx", r"begin a message each, once, in this order"),
    ],
)
def test_templates_that_cannot_be(tmp_path, server, text, message):
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"--judge-template .*mine\.txt: .*{message}"):
        load_judge("openai:m", settings=JudgeSettings(str(file)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_that_come_along(name):
    message = load_template(name).ask("THE PROMPT", "REPLY 1", "REPLY 2")[-1]
    places = [message["content"].index(value) for value in ("THE PROMPT", "REPLY 1", "REPLY 2")]
    assert message["role"] == "user" and places == sorted(places) and "{a}" not in message["content"]


def test_bad_input(server, monkeypatch, template):
    with pytest.raises(UserError, match="needs the model's name after 'openai:'"):
        load_judge("openai:")
    with pytest.raises(UserError, match="no such template, and no such file. Did you mean alpaca-eval"):
        load_judge("openai:m", settings=JudgeSettings("alpaca_eval"))
    for name in ("max_requests", "concurrency"):
        with pytest.raises(UserError, match=f"--judge-{name.replace('_', '-')} must be at least 1, got 0"):
            JudgeSettings(template, **{name: 0})
    for url in ("127.0.0.1:80/v1", "ftp://x/v1", "http://", "http://x:99999/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(UserError, match=f"--eval-judge openai:m: OPENAI_BASE_URL {url}"):
            load_judge("openai:m", "cpu", "--eval-judge")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="--judge openai:m: OPENAI_API_KEY is not set"):
        load_judge("openai:m")
    with pytest.raises(UserError, match="Did you mean openai:MODEL"):
        load_judge("openai-MODEL")


# --- whole runs ---


@pytest.fixture
def run_flags(flags, template):
    kept = [flag for flag in flags if not flag.startswith("--judge")]
    return [
        *kept,
        "--judge=openai:m",
        f"--judge-template={template}",
        "--num-prompts=16",
        "--samples-per-prompt=3",
        "--iterations=2",
        "--save-every=1",
    ]


def test_a_run_stops_at_the_limit_and_goes_on_asking_only_what_is_missing(
    server, run_flags, tmp_path, capsys
):
    start(selm, *run_flags, "--run-name=whole")
    said = capsys.readouterr().out
    whole, summary = metrics_of(tmp_path / "whole"), summary_of(tmp_path / "whole")
    asked, account = server.requests, summary["judge_account"]
    assert account["requests"] == asked and account["answers_from_disk"] + asked >= 2 * 16
    # three pairs of three samples to each of 16 prompts, and the final comparison; equal texts are asked once
    assert f"at most {2 * (16 * 3 + 16)} requests" in said and asked <= 2 * (16 * 3 + 16)
    assert summary["judge"] == "openai:m"

    (tmp_path / "cache" / "judge_answers.sqlite3").unlink()
    server.asked.clear()
    limit = asked * 2 // 3
    with pytest.raises(SystemExit) as stop:
        start(selm, *run_flags, "--run-name=stopped", f"--judge-max-requests={limit}")
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and f"--judge-max-requests {limit} is reached" in said
        and "Traceback" not in said
    )
    start(selm, f"--resume={tmp_path}/stopped")
    assert set(server.asked.values()) == {1} and sum(server.asked.values()) == asked
    assert metrics_of(tmp_path / "stopped") == whole
    assert summary_of(tmp_path / "stopped")["win_rate"] == summary["win_rate"]

    before = server.requests
    start(selm, *run_flags, "--run-name=again")
    assert server.requests == before and metrics_of(tmp_path / "again") == whole


def test_a_run_without_its_server_starts_nothing(server, run_flags, tmp_path, capsys):
    server.close()
    with pytest.raises(SystemExit) as stop:
        start(selm, *run_flags, "--run-name=x")
    assert stop.value.code == 2 and "no server at OPENAI_BASE_URL" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# --- a server that nobody here wrote ---

SERVER_PYTHON = os.environ.get("CLEANALIGN_SERVER_PYTHON", sys.executable)  # where transformers[serving] is


@pytest.fixture
def real_server(world, tmp_path, monkeypatch):
    """`transformers serve` with the tiny model, which answers with words of its own."""
    command = [SERVER_PYTHON, "-c", "import fastapi, uvicorn, openai"]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("pip install 'transformers[serving]', or name its python in CLEANALIGN_SERVER_PYTHON")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    serve = [Path(SERVER_PYTHON).parent / "transformers", "serve", "model"]
    words = [SERVER_PYTHON, *map(str, serve), "--host", "127.0.0.1", "--port", port]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, cwd=world, stdout=log, stderr=log)
    try:
        deadline = time.time() + 120
        while "Uvicorn running" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "cache"))
        yield tmp_path / "log"
    finally:
        process.kill()
        process.wait()


def test_a_real_server(real_server, template):
    settings = JudgeSettings(template, concurrency=4)
    one = load_judge("openai:model", settings=settings)
    p = one.preference(["good cat", "the sun", "good cat"], ["fine", "yes", "fine"], ["bad", "no", "bad"])
    assert p.tolist() == [0.5, 0.5, 0.5]  # the tiny model has no word A
    figures = one.account.figures()
    assert (figures["answers"], figures["unreadable"]) == (2, 2) and figures["prompt_tokens"] > 10
    again = load_judge("openai:model", settings=settings)
    again.preference(["good cat", "the sun"], ["fine", "yes"], ["bad", "no"])
    assert again.account.figures()["requests"] == 0
    assert real_server.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200') == 2
