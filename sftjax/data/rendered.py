"""Rows that hold a chat template's text already, read back into the turns that it was made of.

    {"text": "<|im_start|>user\\nQ<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>\\n"}   ->   user Q, assistant A

As text, their control tokens would be letters, and the prompts would be trained. What stands between two turns is
learnt from the model's own template, and a row is taken only where the template writes its turns as the very same
text; so that nothing depends on what a template looks like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from sftjax.data import conversations, formats
from sftjax.data.conversations import Conversation
from sftjax.data.formats import Text
from sftjax.data.rendering import Renderer
from sftjax.data.sandbox import TemplateError
from sftjax.data.tokenizer import Tokenizer
from sftjax.data.types import RowError

_PROBED_ROWS = 64
_SHARE = 0.9  # of a source's rows that hold control tokens, from which on they are taken for renderings
_PROBES = (
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("user", "assistant", "tool", "tool", "assistant", "user", "assistant"),
    ("user", "assistant", "tool", "assistant", "user"),
)
_REMEDY = "to train it as it is, prompts too, give its source format='raw_text'"


def recognised(source: Any, tokenizer: Tokenizer, format: str, fields: Mapping[str, str] | None = None) -> str:
    """ "rendered" for a source whose rows (nearly all) are texts with control tokens of the model; else `format`."""
    if format != "auto" or tokenizer.template is None:
        return format
    texts = holding = 0
    for row in sorted({i * len(source) // _PROBED_ROWS for i in range(_PROBED_ROWS)}):
        try:
            example = next(formats.parse(source[row], format, fields), None)
        except RowError:
            continue
        if not isinstance(example, Text):
            return format
        texts += 1
        text = example.prompt + example.completion
        holding += tokenizer.hide_control_tokens(text, answer=True) != text
    return "rendered" if texts and holding >= _SHARE * texts else format


class Reader:
    """Reads renderings of one template back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._starts, self._between, self._ends = _learn(tokenizer.renderer)

    def read(self, example: Text) -> Conversation:
        """The conversation that was rendered; answers that lie in the prompt aren't trained. Raises RowError."""
        text = example.prompt + example.completion
        reasons = []
        for start in sorted(self._starts, key=len, reverse=True):
            padded = text if text.startswith(start) else self._with_bos(text)
            turns = self._turns(padded, start) if padded.startswith(start) else None
            if turns is None:
                continue
            messages = [{"role": role, "content": padded[begin:end]} for role, begin, end in turns]
            reason = self._difference(messages, padded)
            if reason is None:
                return self._trained(messages, turns, len(example.prompt) + len(padded) - len(text), example)
            reasons.append(reason)
        reason = reasons[0] if reasons else "it doesn't begin or end as the model's chat template does"
        raise RowError("rendered_text", f"the text holds control tokens of the model, but {reason}; {_REMEDY}")

    def _with_bos(self, text: str) -> str:
        """Many leave it to the tokenizer to put BOS in front."""
        bos = str(self._tokenizer.renderer.special_tokens.get("bos_token") or "")
        return text if text.startswith(bos) else bos + text

    def _turns(self, text: str, start: str) -> list[tuple[str, int, int]] | None:
        """(role, begin, end) of each turn; None where the text doesn't end as a turn does."""
        role, begin, found = self._starts[start], len(start), []
        while True:
            ahead = [
                (place, -len(between), after)
                for (before, after, between) in self._between
                if before == role and (place := text.find(between, begin)) >= 0
            ]
            if not ahead:
                break
            place, minus, after = min(ahead)
            found.append((role, begin, place))
            role, begin = after, place - minus
        for end in self._ends.get(role, ()):
            for written in (end, end.rstrip()):  # text is often stripped
                if written and text.endswith(written) and len(text) - len(written) >= begin:
                    return [*found, (role, begin, len(text) - len(written))]
        return None

    def _difference(self, messages: Sequence[Mapping[str, str]], text: str) -> str | None:
        """Why the turns aren't those of the text, in words; None where they are."""
        for message in messages:
            content = message["content"]
            if self._tokenizer.hide_control_tokens(content, answer=message["role"] == "assistant") != content:
                return f"one stands inside of a {message['role']} turn"
        try:
            again = self._tokenizer.renderer.render(messages)
        except TemplateError as error:
            return f"the chat template refuses its turns ({error})"
        if again.rstrip() == text.rstrip():
            return None
        at = next((i for i, (a, b) in enumerate(zip(again, text, strict=False)) if a != b), min(len(again), len(text)))
        return f"the chat template would write {again[at : at + 20]!r} where it has {text[at : at + 20]!r}"

    def _trained(self, messages, turns, prompt: int, example: Text) -> Conversation:
        found = conversations.conversation(messages)
        cut = next((begin for role, begin, end in turns if begin < prompt < end), None)
        if example.prompt and cut is not None:
            raise RowError("rendered_text", f"the prompt ends in the middle of a turn; {_REMEDY}")
        weights = [
            weight if begin >= prompt or not example.prompt else 0.0
            for weight, (_, begin, _) in zip(found.weights, turns, strict=True)
        ]
        return Conversation(found.messages, weights, notes=(*example.notes, "rendered_text"))


def _learn(renderer: Renderer) -> tuple[dict[str, str], list[tuple[str, str, str]], dict[str, list[str]]]:
    """What a template writes in front of the first turn, between two, and behind the last.

    Returns {text in front: role}, [(role, next role, text between)], {role: texts behind}.
    """
    starts: dict[str, str] = {}
    between: dict[tuple[str, str, str], None] = {}
    ends: dict[str, dict[str, None]] = {}
    for roles in _PROBES:
        said = [f"Word{number}said" for number in range(len(roles))]
        try:
            text = renderer.render([{"role": role, "content": word} for role, word in zip(roles, said, strict=True)])
        except TemplateError:
            continue
        places = [text.find(word) for word in said]
        if any(place < 0 for place in places) or places != sorted(places) or any(text.count(w) > 1 for w in said):
            continue
        behind = [place + len(word) for place, word in zip(places, said, strict=True)]
        starts.setdefault(text[: places[0]], roles[0])
        for (before, after), begin, end in zip(pairwise(roles), behind, places[1:], strict=False):
            if begin < end:
                between[before, after, text[begin:end]] = None
        ends.setdefault(roles[-1], {})[text[behind[-1] :]] = None
    return starts, list(between), {role: list(texts) for role, texts in ends.items()}
