"""What OpenAI's protocol says, read and written: requests, answers, pieces of answers, errors.

Source: the API reference for /v1/chat/completions, /v1/completions and /v1/models. Settings that this server has no
counterpart for are refused by name instead of being left out in silence.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import Any

import sftjax
from sftjax.errors import ConfigError
from sftjax.generate.answer import Answer
from sftjax.generate.sampling import TOP, Sampling

FINGERPRINT = f"sftjax-{sftjax.__version__}"
MAX_ANSWERS = 128  # of one request
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Without meaning here, whatever their value:
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Fine as long as they ask for nothing:
_UNSUPPORTED = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
}
_SHARED = {"model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "stop", "seed"}
_SHARED |= {"stream", "stream_options", "logprobs"}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
_TEXT = _SHARED | {"prompt", "best_of"}


class ApiError(Exception):
    """An error as the protocol has it: becomes `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, checked.

    Attributes:
      chat: whether it came to /v1/chat/completions.
      prompts: conversations, texts or ids; one where `chat`.
      max_tokens: None: not said.
      seed: in [0, 2**32); drawn where the request has none.
      logprobs: whether tokens are reported; top_logprobs: how many alternatives to each.
    """

    chat: bool
    model: str
    prompts: tuple[Any, ...]
    sampling: Sampling
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    seed: int
    stream: bool
    include_usage: bool
    logprobs: bool
    top_logprobs: int


def read(body: Any, *, chat: bool) -> Asked:
    """Checks the body of a request to /v1/chat/completions, or else to /v1/completions.

    Raises:
      ApiError: 400, with the field's name.
    """
    fields = _Fields(body)
    fields.refuse_unknown(_CHAT if chat else _TEXT)
    prompts = (_messages(fields),) if chat else _texts(fields)
    n = fields.whole("n", 1, 1, MAX_ANSWERS)
    if n * len(prompts) > MAX_ANSWERS:
        raise fields.wrong("n", f"at most {MAX_ANSWERS} answers in one request, not {n * len(prompts)}")
    if not chat and fields.whole("best_of", n, 1, MAX_ANSWERS) != n:
        raise fields.wrong("best_of", "isn't supported here unless it equals n", code="unsupported_parameter")
    logprobs, top = _logprobs(fields, chat)
    stream = fields.flag("stream")
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    return Asked(
        chat=chat,
        model=fields.text("model"),
        prompts=prompts,
        sampling=_sampling(fields),
        max_tokens=_max_tokens(fields, chat),
        n=n,
        stop=_stop(fields),
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        logprobs=logprobs,
        top_logprobs=top,
    )


class _Fields:
    """The body's fields, each read with its type; null is the same as absent."""

    def __init__(self, body: Any):
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        self.body = body

    def wrong(self, name: str, problem: str, *, code: str | None = "invalid_value") -> ApiError:
        return ApiError(400, f"{name}: {problem}", param=name, code=code)

    def refuse_unknown(self, known: set[str]) -> None:
        for name, value in self.body.items():
            if name in known or name in _IGNORED:
                continue
            if name not in _UNSUPPORTED:
                raise self.wrong(name, "is no argument of this endpoint", code="unknown_parameter")
            if value not in _UNSUPPORTED[name]:
                raise self.wrong(name, "isn't supported here", code="unsupported_parameter")

    def get(self, name: str) -> Any:
        return self.body.get(name)

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not value:
            raise self.wrong(
                name, "give a text", code="missing_required_parameter" if value is None else "invalid_type"
            )
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, f"true or false, not {value!r}", code="invalid_type")
        return bool(value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, f"a number, not {value!r}", code="invalid_type")
        if not low <= value <= high:
            raise self.wrong(name, f"between {low:g} and {high:g}, not {value!r}")
        return float(value)

    def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, f"a whole number, not {value!r}", code="invalid_type")
        if not low <= value <= high:
            raise self.wrong(name, f"between {low} and {high}, not {value}")
        return value


def _messages(fields: _Fields) -> list[dict[str, str]]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.wrong("messages", "give a list with at least one message", code="missing_required_parameter")
    return [_message(fields, f"messages[{number}]", message) for number, message in enumerate(messages)]


def _message(fields: _Fields, where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise fields.wrong(f"{where}.role", f"one of {', '.join(_ROLES)}")
    if message.get("tool_calls"):
        raise fields.wrong(f"{where}.tool_calls", "isn't supported here", code="unsupported_parameter")
    content = message.get("content")
    if isinstance(content, list) and content:
        parts = [part if isinstance(part, dict) else {} for part in content]
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            raise fields.wrong(f"{where}.content", 'only parts of {"type": "text", "text"} are supported here')
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise fields.wrong(f"{where}.content", "give a text", code="invalid_type")
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": content}


def _texts(fields: _Fields) -> tuple[Any, ...]:
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if _is_ids(prompt):
        return (prompt,)
    if isinstance(prompt, list) and prompt and all(isinstance(each, str) or _is_ids(each) for each in prompt):
        return tuple(prompt)
    raise fields.wrong("prompt", "give a text, token ids, or a list of either", code="missing_required_parameter")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)


def _sampling(fields: _Fields) -> Sampling:
    try:
        return Sampling(
            temperature=fields.number("temperature", 1.0, 0.0, 2.0),
            top_k=fields.whole("top_k", 0, 0, 2**31 - 1),
            top_p=max(fields.number("top_p", 1.0, 0.0, 1.0), 1e-9),  # 0: the likeliest alone
            min_p=fields.number("min_p", 0.0, 0.0, 1.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0, 1e-3, 1e3),
        )
    except ConfigError as error:
        raise ApiError(400, str(error)) from None


def _max_tokens(fields: _Fields, chat: bool) -> int | None:
    limit = fields.whole("max_tokens", None, 1, 2**31 - 1)
    newer = fields.whole("max_completion_tokens", None, 1, 2**31 - 1) if chat else None
    if limit is None and newer is None:
        return None if chat else 16  # the protocol's default for texts
    return newer if limit is None else limit if newer is None else min(limit, newer)


def _stop(fields: _Fields) -> tuple[str, ...]:
    stop = fields.get("stop")
    if stop is None:
        return ()
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(each, str) and each for each in stop):
        raise fields.wrong("stop", "a text, or at most 16 of them, none empty", code="invalid_type")
    return tuple(stop)


def _logprobs(fields: _Fields, chat: bool) -> tuple[bool, int]:
    if not chat:
        count = fields.whole("logprobs", None, 0, TOP)
        return count is not None, count or 0
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, 0, TOP)
    if top and not wanted:
        raise fields.wrong("top_logprobs", "needs logprobs: true")
    return wanted, top


def _include_usage(fields: _Fields, stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise fields.wrong("stream_options", "an object, and only with stream: true")
    return _Fields(options).flag("include_usage")


# ------------------------------------------------------------------------------------------------------------ answers


class Writer:
    """Writes one request's answers.

    Args:
      asked: the request.
      token_text: the text of a token.
      created: seconds since 1970.
    """

    def __init__(self, asked: Asked, token_text, created: int):
        self.asked, self.token_text, self.created = asked, token_text, created
        self.id = ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body that has everything."""
        choices = []
        for index, answer in enumerate(answers):
            content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choice = {"index": index} | (content if self.asked.chat else {"text": answer.text})
            choice["logprobs"] = self._logprobs(answer, 0, answer.told())
            choices.append(choice | {"finish_reason": answer.finish_reason})
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return self._body(kind, choices) | {"usage": usage(answers)}

    def opening(self, index: int) -> dict[str, Any]:
        """The piece that says whose turn it is."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def piece(self, index: int, answer: Answer, text: str, start: int, stop: int, reason: str | None) -> dict[str, Any]:
        """New text; tokens [start, stop) of the answer belong to it."""
        content = {"delta": {"content": text} if text else {}} if self.asked.chat else {"text": text}
        logprobs = self._logprobs(answer, start, stop) if stop > start else None
        return self._chunk({"index": index, **content, "logprobs": logprobs, "finish_reason": reason})

    def closing(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The piece with the usage."""
        return self._chunk(None) | {"usage": usage(answers)}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        body = self._body(kind, [] if choice is None else [choice])
        return body | {"usage": None} if self.asked.include_usage else body

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}
        return body | {"system_fingerprint": FINGERPRINT, "choices": choices}

    def _logprobs(self, answer: Answer, start: int, stop: int) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        tokens, logprobs = answer.tokens[start:stop], answer.logprobs[start:stop]
        tops = answer.top[start:stop] or [()] * len(tokens)
        if self.asked.chat:
            rows = zip(tokens, logprobs, tops, strict=True)
            content = [
                self._entry(token, logprob) | {"top_logprobs": [self._entry(*each) for each in top]}
                for token, logprob, top in rows
            ]
            return {"content": content, "refusal": None}
        texts = [self.token_text(token) for token in tokens]
        before = len("".join(map(self.token_text, answer.tokens[:start])))
        offsets = [before + len("".join(texts[:number])) for number in range(len(texts))]
        found = {"tokens": texts, "token_logprobs": [_finite(each) for each in logprobs], "text_offset": offsets}
        named = [{self.token_text(token): _finite(logprob) for token, logprob in top} for top in tops]
        return found | {"top_logprobs": named if self.asked.top_logprobs else None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        part = "\ufffd" in text  # of a character
        return {"token": text, "logprob": _finite(logprob), "bytes": None if part else list(text.encode())}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens read (each prompt once) and written."""
    read_ = sum(len(ids) for ids in {id(answer.prompt_ids): answer.prompt_ids for answer in answers}.values())
    written = sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": read_, "completion_tokens": written, "total_tokens": read_ + written}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else -9999.0  # JSON knows no infinity; the protocol's stand-in
