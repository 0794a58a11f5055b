"""The same few prompts, answered at every evaluation: what a loss doesn't tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftjax import divergence
from sftjax.data.types import RowError, Sample
from sftjax.errors import DataError
from sftjax.generate import sample

Conversation = list[dict[str, Any]]


def choose_prompts(path: str, held_out, count: int) -> list[Conversation]:
    """Conversations that end with the user's turn: from a file, or the openings of held-out rows.

    Args:
      path: .txt with a prompt a line, or .jsonl with "prompt" or "messages"; empty: take held-out rows.
      held_out: mixture of held-out data, or None.
      count: how many held-out rows (a file is taken whole).

    Raises:
      DataError: a line of the file is neither.
    """
    if path:
        return read_prompts(path)
    if held_out is None or count == 0:
        return []
    prompts: list[Conversation] = []
    for ingredient in held_out.ingredients:
        for row in range(len(ingredient.source)):
            if len(prompts) == count:
                return prompts
            opening = _opening(ingredient, row)
            if opening:
                prompts.append(opening)
    return prompts


def _opening(ingredient, row: int) -> Conversation:
    """The messages up to the first answer; empty for rows that aren't conversations."""
    encode = ingredient.encode
    try:
        example = next(iter(encode.examples(ingredient.source[row])), None)
    except RowError:
        return []
    messages = getattr(example, "messages", [])
    return next((messages[:n] for n, message in enumerate(messages) if message["role"] == "assistant"), [])


def read_prompts(path: str) -> list[Conversation]:
    """Prompts of a .txt (one a line) or .jsonl file ("prompt": text, or "messages")."""
    prompts = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith((".jsonl", ".json")):
            prompts.append([{"role": "user", "content": line}])
            continue
        try:
            row = json.loads(line)
            prompts.append(row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path}:{number}: give {{"prompt": ...}} or {{"messages": [...]}} on each line') from error
    return prompts


def first_samples(held_out, tokens: int) -> list[Sample]:
    """The first samples of held-out rows, as many as have so many trained tokens (32 of each count at most)."""
    chosen: list[Sample] = []
    for number, ingredient in enumerate(held_out.ingredients):
        for row in range(len(ingredient.source)):
            if sum(len(where) for _, where in divergence.places(chosen, tokens)) >= tokens:
                return chosen
            try:
                chosen += ingredient.encode(ingredient.source[row], row, number)
            except RowError:
                continue
    return chosen


def answer(program, variables, tokenizer, prompts: list[Conversation], settings) -> list[dict[str, Any]]:
    """Answers all prompts in one batch.

    Args:
      settings: with max_new_tokens, temperature, top_k, top_p, repetition_penalty.

    Returns:
      {"messages", "answer", "num_tokens", "finish_reason"} per prompt.
    """
    if not prompts:
        return []
    outputs = sample.generate(
        program.config,
        program.runtime.replace(remat="none"),
        variables,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=0,
    )
    return [
        {"messages": prompt, "answer": out.text, "num_tokens": len(out.tokens), "finish_reason": out.finish_reason}
        for prompt, out in zip(prompts, outputs, strict=True)
    ]
