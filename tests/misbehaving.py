"""A chat-completions server on this machine that misbehaves on purpose, by a script of what to do next."""

import json
import math
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789-secret"


def completion(text="A", top=None, **message) -> dict:
    """A chat completion; `top` = {token: log-prob} of its first token."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text, **message},
    }
    if top is not None:
        listed = [{"token": token, "logprob": logprob} for token, logprob in top.items()]
        choice["logprobs"] = {
            "content": [{"token": text, "logprob": listed[0]["logprob"], "top_logprobs": listed}]
        }
    usage = {"prompt_tokens": 100, "completion_tokens": 1}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}


def replies(question: str) -> tuple[str, str]:
    """The replies in a question in the template of these tests."""
    return re.search(r"A=<(.*?)> B=<(.*?)>", question, re.S).groups()


def longer(question: str) -> dict:
    """An honest judge: the longer reply, with logprobs."""
    a, b = map(len, replies(question))
    p = min(max(0.5 + (a - b) / 20, 0.1), 0.9)
    return completion("A" if a >= b else "B", {"A": math.log(p), " B": math.log(1 - p), "The": -9.0})


class Server:
    """`plan` holds what the next requests meet: a status, "hang-up", "slow", "nonsense", "html", a body as a
    dict, or (status, headers, body); when it is empty, what `meets(question)` says, or `answer(question)`."""

    def __init__(self, answer=longer):
        self.answer, self.plan, self.asked, self.bodies = answer, [], Counter(), []
        self.meets = lambda question: None  # what a question meets while the plan is empty
        self.lock, self.together, self.most_together, self.seconds = threading.Lock(), 0, 0, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.serve(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def requests(self) -> int:
        return len(self.bodies)

    def serve(self, handler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.lock:
            self.bodies.append(body)
            self.asked[question] += 1
            act = self.plan.pop(0) if self.plan else self.meets(question)
            self.together += 1
            self.most_together = max(self.together, self.most_together)
        try:
            time.sleep(self.seconds)
            if act == "slow":
                time.sleep(1.0)
                act = None
            if act == "hang-up":
                handler.connection.shutdown(2)
                handler.close_connection = True
                return
            status, headers, answer = 200, {}, None
            if isinstance(act, int):
                status, answer = act, {"error": {"message": f"status {act} on purpose"}}
            elif isinstance(act, tuple):
                status, headers, answer = act
            elif act == "nonsense":
                answer = {"hello": ["world"]}
            elif act == "html":
                answer = "<html><body>Welcome to nginx!</body></html>"
            elif act is None:
                answer = self.answer(question)
            else:
                answer = act
            text = answer if isinstance(answer, str) else json.dumps(answer)
            handler.send_response(status)
            kind = "text/html" if isinstance(answer, str) else "application/json"
            for name, value in {
                "Content-Type": kind,
                "Content-Length": len(text.encode()),
                **headers,
            }.items():
                handler.send_header(name, str(value))
            handler.end_headers()
            handler.wfile.write(text.encode())
        except OSError:
            pass  # the client has gone
        finally:
            with self.lock:
                self.together -= 1

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
