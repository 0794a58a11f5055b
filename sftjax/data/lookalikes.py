"""What a chat template writes that looks like a control token and is none: the tokenizer splits it into pieces.

A template from elsewhere ends its turns with <|fin|>; this tokenizer has no such token. Nothing fails, but generation
stops on single tokens, so the model could never stop. Here that is found, and said with the setting that mends it.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

from sftjax.data import boundaries
from sftjax.data.control import HTML_TAG
from sftjax.data.rendering import Renderer
from sftjax.data.sandbox import TemplateError

# What a person would take for a control token, a word in brackets of some kind: <|fin|>, <end_of_turn>, </s>, [INST].
_LOOKS_LIKE_CONTROL = re.compile(r"<[|｜][^<>|｜\n]{1,64}[|｜]>|</?[A-Za-z]\w*>|\[/?[A-Z][A-Z0-9_]+\]")
_SHOWN = 8


def split_tokens(tokenizer: Any) -> dict[str, list[str]]:
    """Name -> its pieces, of what the tokenizer's template writes around messages; HTML tags are text."""
    if tokenizer.renderer is None:
        return {}
    names = dict.fromkeys(_LOOKS_LIKE_CONTROL.findall(_written(tokenizer.renderer)))
    text = [name for name in names if HTML_TAG.fullmatch(name) and name not in ("<s>", "</s>")]
    names = [name for name in names if name not in tokenizer.control_tokens and name not in text]
    return {name: tokenizer.backend.encode(name, add_special_tokens=False).tokens for name in names}


def _written(renderer: Renderer) -> str:
    """A conversation as the template writes it, and what it writes behind an answer; its contents are plain words."""
    conversation = [{"role": role, "content": "Paris"} for role in ("system", "user", "assistant", "user")]
    behind = "".join(part or "" for part in boundaries.behind_an_answer(renderer))
    for messages in (conversation, conversation[1:]):  # some templates have no system role
        with contextlib.suppress(TemplateError):
            return renderer.render(messages, generation=True) + behind
    return behind


def explain(tokenizer: Any) -> str:
    """Names the `split_tokens` and the setting that makes tokens of them; "" where there are none."""
    found = split_tokens(tokenizer)
    if not found:
        return ""
    told = ", ".join(f"{name!r} ({len(pieces)} pieces)" for name, pieces in list(found.items())[:_SHOWN])
    return (
        f"the chat template writes {told} as ordinary text: set model.add_tokens={tuple(found)!r} to make each one "
        "token, which is then trained"
    )


def explain_missing_end(tokenizer: Any) -> str:
    """Why no token ends an answer, and what to change."""
    behind, _ = boundaries.behind_an_answer(tokenizer.renderer)
    why = (
        f"chat template {tokenizer.template.name!r} ends an answer with no control token, but with "
        f"{repr(behind) if behind else 'nothing'}, so that generation would never learn to stop"
    )
    if _LOOKS_LIKE_CONTROL.search(behind) and (told := explain(tokenizer)):
        return f"{why}; {told}"
    end = "<|end|>" if tokenizer.eos_id is None else tokenizer.backend.id_to_token(tokenizer.eos_id)
    return f"{why}; set model.end_of_turn={end!r} (or another token) to have it put behind each answer"
