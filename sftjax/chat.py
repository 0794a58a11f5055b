"""Talking to a model: a file of prompts, or a person at the terminal. What `tools/generate.py` calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sftjax import loading
from sftjax.errors import ConfigError, DataError, StorageError
from sftjax.generate.sample import Generator

Message = dict[str, Any]
HELP = "Type a message; /reset forgets the conversation, /quit (or end of input) leaves."


def load(
    model: str, *, adapter: str | None = None, dtype: str = "auto", batch_size: int = 32, steps: int = 16
) -> Generator:
    """A model ready to answer. dtype "auto": float32 on a CPU, bfloat16 elsewhere."""
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    loaded = loading.load_model(model, adapter=adapter, dtype=dtype)
    return Generator(
        loaded.config, loaded.runtime, loaded.variables, loaded.tokenizer, batch_size=batch_size, steps=steps
    )


def answer_file(generator: Generator, prompts: str, out: str, *, system: str = "", **settings: Any) -> int:
    """Answers every prompt of a file; returns how many.

    Args:
      prompts: .txt with a prompt a line, or JSONL with "prompt" (a user message) or "messages".
      out: JSONL, a line per answer: {"index", "prompt" | "messages", "text", "num_tokens", "finish_reason"}, and
        "sample" where there are several to a prompt. "index" counts prompts, blank lines apart.
      system: put in front of conversations that have no system message.
      settings: see `Generator.generate`.

    Raises:
      DataError: a line is neither. StorageError: a file can't be read or written.
    """
    rows = read_prompts(prompts)
    try:
        with open(out, "w", encoding="utf-8") as file:  # before the work, so that a bad path costs nothing
            conversations = [with_system(messages_of(row), system) for row in rows]
            for output in generator.generate(conversations, **settings):
                line = {"index": output.prompt} | rows[output.prompt] | {"text": output.text}
                line |= {"num_tokens": len(output.tokens), "finish_reason": output.finish_reason}
                if settings.get("n", 1) > 1:
                    line["sample"] = output.sample
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(f"can't write {out}: {error.strerror or error}") from None
    return len(rows)


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The rows of a prompt file: `{"prompt": text}` or `{"messages": [...]}`, nothing else in them."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it") from None
    structured = path.endswith((".jsonl", ".json"))
    return [
        _prompt_row(line, f"{path}:{number}") if structured else {"prompt": line}
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _prompt_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row.get("prompt"), str):
            return {"prompt": row["prompt"]}
        if row["messages"] and all(isinstance(message["role"], str) for message in row["messages"]):
            return {"messages": row["messages"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(f'{where}: give {{"prompt": "..."}} or {{"messages": [{{"role", "content"}}, ...]}} on each line')


def messages_of(row: dict[str, Any]) -> list[Message]:
    return row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]


def with_system(messages: list[Message], system: str) -> list[Message]:
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]


def interactive(
    generator: Generator, *, system: str = "", ask: Callable[[str], str] = input, seed: int = 0, **settings: Any
) -> int:
    """A conversation at the terminal; answers come as they are made. Returns the number of answers."""
    if generator.tokenizer is None:
        raise ConfigError("a conversation needs a tokenizer")
    print(HELP, file=sys.stderr)
    messages: list[Message] = []
    answers = 0
    while True:
        try:
            text = ask("> ").strip()
        except EOFError:
            return answers
        if text in ("/quit", "/exit"):
            return answers
        if text == "/reset":
            messages = []
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        (output,) = generator.generate(
            [with_system(messages, system)],
            seed=seed + answers,
            on_text=lambda _, piece: print(piece, end="", flush=True),
            **settings,
        )
        print(flush=True)
        messages.append({"role": "assistant", "content": output.text})
        answers += 1
