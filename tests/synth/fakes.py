"""Teachers for the tests: a function of the prompt, in this process or behind a local HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sftjax.synth.asking import Asker
from sftjax.synth.memory import Memory
from sftjax.synth.teacher import Reply


class Scripted:
    """Answers with `answer(last message or text, number of the sample, seed)`: a text or a Reply."""

    name = "scripted"

    def __init__(self, answer: Callable[[str, int, int], str | Reply]):
        self._answer, self.asked = answer, []

    def chat(self, conversations, sampling, seed, n=1):
        prompts = [conversation[-1]["content"] for conversation in conversations]
        return [self._reply(prompt, sample, seed) for prompt in prompts for sample in range(n)]

    def complete(self, texts, sampling, seed):
        return [self._reply(text, number, seed) for number, text in enumerate(texts)]

    def _reply(self, prompt: str, sample: int, seed: int) -> Reply:
        self.asked.append(prompt)
        found = self._answer(prompt, sample, seed)
        return found if isinstance(found, Reply) else Reply(found)


@contextmanager
def asker(folder, answer, *, seed: int = 0, chunk: int = 4):
    """An Asker of a Scripted teacher with its memory in `folder`."""
    with Memory(folder, {"seed": seed}) as memory:
        yield Asker(Scripted(answer), memory, seed=seed, chunk=chunk)


@contextmanager
def server(respond: Callable[[str, dict], tuple[int, dict, dict]]):
    """Yields the URL of a server that answers POSTs with `respond(path, body)` -> (status, headers, JSON)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["_authorization"] = self.headers.get("Authorization")
            status, headers, content = respond(self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            with suppress(BrokenPipeError):  # who asked may have been killed
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
    finally:
        httpd.shutdown()
        httpd.server_close()


def completion(body: dict, text: str, reason: str = "stop") -> tuple[int, dict, dict]:
    """What an OpenAI-compatible server says."""
    choice = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
    return 200, {}, {"choices": [{"index": 0, "finish_reason": reason, **choice}]}
