"""Who writes: a model here, or one behind any OpenAI-compatible URL. Both answer conversations and continue texts.

A teacher has a `name` (part of what a run was asked for) and two methods:

    chat(conversations, sampling, seed, n=1)      -> n replies to each, conversation by conversation
    complete(texts, sampling, seed)               -> a reply to each; control tokens in a text are control tokens
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from sftjax.errors import ConfigError, StorageError
from sftjax.generate.sample import Generator

Message = Mapping[str, Any]
Conversation = Sequence[Message]
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # HTTP statuses that may go away


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a teacher writes. `seed` apart, one for each call."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer. finish_reason: "stop", or "length" where it was cut off; a server's own word otherwise."""

    text: str
    finish_reason: str = "stop"

    @property
    def cut(self) -> bool:
        return self.finish_reason == "length"


class Teacher(Protocol):
    name: str

    def chat(self, conversations: Sequence[Conversation], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]: ...

    def complete(self, texts: Sequence[str], sampling: Sampling, seed: int) -> list[Reply]: ...


class LocalTeacher:
    """A model of ours.

    Args:
      generator: see `chat.load`.
      name: what the model is, for example its path.
    """

    def __init__(self, generator: Generator, name: str):
        self._generator, self.name = generator, name

    @property
    def tokenizer(self) -> Any:
        return self._generator.tokenizer

    def chat(self, conversations: Sequence[Conversation], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        return self._generate(list(conversations), sampling, seed, n)

    def complete(self, texts: Sequence[str], sampling: Sampling, seed: int) -> list[Reply]:
        tokenizer = self._generator.tokenizer
        encoded = [tokenizer.encode(text) for text in texts]
        first = list(tokenizer.prefix_ids)  # a BOS, mostly; a template writes it itself
        return self._generate([ids if ids[: len(first)] == first else first + ids for ids in encoded], sampling, seed)

    def _generate(self, prompts: list[Any], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        outputs = self._generator.generate(
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=sampling.stop,
            seed=seed,
            n=n,
        )
        return [Reply(output.text, output.finish_reason) for output in outputs]


class UrlTeacher:
    """A model behind an OpenAI-compatible URL. What it gives for a seed is the server's business.

    Args:
      url: up to and with the version, "http://localhost:8000/v1".
      model: the server's name for it.
      api_key_env: environment variable that holds the key; it is sent, and written nowhere.
      concurrency: requests at once.
      retries: how often a request that failed for a while (busy, unreachable, broken off) is sent again; the wait
        doubles each time, or is what the server asks for.
      timeout: seconds for one request.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 300.0,
        wait: Callable[[float], None] = time.sleep,
    ):
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--teacher_url {url}: must start with http:// or https://")
        if "@" in urllib.parse.urlsplit(url).netloc:
            raise ConfigError("--teacher_url holds a name or password, which would be written: use --api_key_env")
        if concurrency < 1 or retries < 0:
            raise ConfigError("--concurrency must be at least 1 and --retries at least 0")
        self._url, self._model, self.name = url.rstrip("/"), model, f"{url.rstrip('/')} {model}"
        key = os.environ.get(api_key_env, "")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._concurrency, self._retries, self._timeout, self._wait = concurrency, retries, timeout, wait

    def chat(self, conversations: Sequence[Conversation], sampling: Sampling, seed: int, n: int = 1) -> list[Reply]:
        bodies = [{"messages": list(each)} for each in conversations for _ in range(n)]
        choices = self._choices("/chat/completions", bodies, sampling, seed)
        return [Reply(_text(choice.get("message"), "content"), _reason(choice)) for choice in choices]

    def complete(self, texts: Sequence[str], sampling: Sampling, seed: int) -> list[Reply]:
        choices = self._choices("/completions", [{"prompt": text} for text in texts], sampling, seed)
        return [Reply(_text(choice, "text"), _reason(choice)) for choice in choices]

    def _choices(self, path: str, bodies: list[dict], sampling: Sampling, seed: int) -> list[dict]:
        common = {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
        } | ({"stop": list(sampling.stop)} if sampling.stop else {})
        requests = [common | {"seed": seed_of(seed, number) % 2**31} | body for number, body in enumerate(bodies)]
        failed = threading.Event()
        with ThreadPoolExecutor(max_workers=self._concurrency) as pool:
            futures = [pool.submit(self._post, path, request, failed) for request in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                failed.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _post(self, path: str, body: dict, failed: threading.Event) -> dict:
        """The first choice of one request; not tried again once another one has failed for good."""
        for attempt in range(self._retries + 1):
            pause = min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)
            request = urllib.request.Request(self._url + path, json.dumps(body).encode(), self._headers)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    return _first_choice(json.loads(answer.read()), self._url + path)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_message(error)}"
                if error.code not in _AGAIN:
                    raise ConfigError(f"{self._url}{path} refuses the request, {reason}") from None
                asked = error.headers.get("Retry-After", "")
                pause = min(300.0, float(asked)) if asked.replace(".", "", 1).isdigit() else pause
            except (OSError, http.client.HTTPException, ValueError) as error:  # unreachable, broken off, not JSON
                reason = str(getattr(error, "reason", "") or error) or type(error).__name__
            if failed.is_set():
                break
            if attempt < self._retries:
                self._wait(pause)
        raise StorageError(
            f"{self._url}{path}: no answer after {self._retries + 1} attempts ({reason}); what was answered is kept, "
            "run the command again"
        )


def _first_choice(answer: Any, where: str) -> dict:
    try:
        return dict(answer["choices"][0])
    except (KeyError, IndexError, TypeError):
        raise ConfigError(f"{where} answers, but not as an OpenAI-compatible server does: no choices in it") from None


def _text(part: Any, key: str) -> str:
    return (part.get(key) or "") if isinstance(part, Mapping) else ""


def _reason(choice: Mapping[str, Any]) -> str:
    return str(choice.get("finish_reason") or "stop")


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read(2000).decode(errors="replace")
    try:
        found = json.loads(text)["error"]
        return str(found["message"] if isinstance(found, Mapping) else found)[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:300] or error.reason


def seed_of(seed: int, *parts: int | str) -> int:
    """A seed below 2^32 for one part of the work, unrelated to those of others."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()[:4], "big")


def query_prefix(tokenizer: Any) -> str:
    """What a chat template writes in front of a user's first message: with it alone, an aligned model writes one.

    <|im_start|>system\\n...<|im_end|>\\n<|im_start|>user\\n | the message<|im_end|>...
    """
    renderer = tokenizer.require_template()
    mark = "\ue000the message\ue000"
    before, found, _ = renderer.render([{"role": "user", "content": mark}]).partition(mark)
    if not found or not before:
        raise ConfigError(f"chat template {tokenizer.template.name!r} writes nothing in front of a user's message")
    return before
