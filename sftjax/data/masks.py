"""Which tokens are trained, proved from the rendering of the model's own chat template.

    full   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>\\n
    head   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n        = the prompt that generation sees
    trained                                                          ^^^^^^^^^^^^^^^^

A trained span starts where generation would start (behind the rendering of everything before the turn, with generation
prompt) and ends with the first end-of-turn token. The ids are those of one tokenisation of the full text. Checked for
each row, and not taken from marks in the template or from searching for strings:

  * the head is a prefix of the rendering (else the turn becomes a sample of its own, or the row is refused);
  * the turn stands in the whole conversation as it stands when it is the last (templates that delete earlier
    `<think>` break this: one sample for each trained turn);
  * an end-of-turn token stands behind the content, inside the turn's own part of the text;
  * a token that crosses the start is trained, and the sample is flagged "straddle"; where the head alone would be
    tokenised otherwise than it is in the sample, the sample is flagged "prompt_differs".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sftjax.data.places import Encoded
from sftjax.data.rendering import Renderer
from sftjax.data.sandbox import TemplateError, TemplateLimit
from sftjax.data.tokenizer import Tokenizer
from sftjax.data.types import RowError
from sftjax.errors import DataError

MAX_PREFIX_RENDERINGS = 2_000  # messages of a conversation, for templates that are rendered prefix by prefix


class Span(NamedTuple):
    """Where a trained turn stands: characters [start, limit) hold it, its end-of-turn token, and what follows that."""

    start: int
    limit: int
    weight: float


@dataclass(frozen=True)
class Rendered:
    """Text of one sample with its trained spans; `hidden` is `text` with the data's control tokens hidden.

    A completion behind a plain prompt (no template) has no spans, and the length of its prompt.
    """

    text: str
    hidden: str
    spans: tuple[Span, ...]
    flags: tuple[str, ...] = ()
    prompt_length: int | None = None


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    *,
    tools: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    on_mask_error: str = "unroll",
) -> list[Rendered]:
    """Renders a conversation into the texts to train on.

    Args:
      messages: as the template gets them.
      weights: one number for each message; 0 = not trained.
      tools: JSON schemas, or None.
      kwargs: further variables for the template.
      on_mask_error: what becomes of a conversation whose history the template rewrites: "unroll" (one sample for each
        trained turn), "drop" (RowError) or "raise" (DataError).
    """
    tokenizer.require_template()
    renderer = tokenizer.tools_renderer if tools else tokenizer.renderer
    hidden, touched = _hide(tokenizer, messages)
    hidden_tools, touched_tools = _map_strings(tools, tokenizer.hide_control_tokens) if tools else (tools, False)
    touched |= touched_tools
    try:
        samples = _spans(renderer, hidden, weights, hidden_tools, kwargs, on_mask_error)
        if touched:
            samples = [_unhide(tokenizer, renderer, sample, messages, tools, kwargs) for sample in samples]
    except TemplateLimit as error:
        raise RowError("template_limit", str(error)) from None
    except TemplateError as error:
        raise RowError("template_refused", f"the chat template refuses the conversation: {error}") from None
    return [_flag_rewritten(sample.rendered, messages, sample.turns) for sample in samples]


@dataclass(frozen=True)
class _Part:
    """A rendering of the first `length` messages with the turns trained in it."""

    rendered: Rendered
    length: int
    turns: tuple[int, ...]


def _spans(renderer: Renderer, messages, weights, tools, kwargs, on_mask_error) -> list[_Part]:
    turns = tuple(k for k, weight in enumerate(weights) if weight)
    parts = _spans_by_pieces(renderer, messages, weights, turns, tools, kwargs)
    if parts is not None:
        return parts
    if len(messages) > MAX_PREFIX_RENDERINGS:
        raise RowError(
            "too_many_turns", f"{len(messages):,} messages; this template can take {MAX_PREFIX_RENDERINGS:,} at most"
        )

    def text_of(length: int, generation: bool = False) -> str:
        return renderer.render(messages[:length], tools=tools, generation=generation, kwargs=kwargs)

    full = text_of(len(messages))
    spans, alone, stable = [], [], True
    for k in turns:
        head = _head(text_of, k)
        upto = full if k + 1 == len(messages) else text_of(k + 1)
        if not upto.startswith(head):
            raise RowError(
                "prompt_not_prefix",
                f"message {k}: the template's prompt for generation is not how it writes the answer later "
                f"(prompt ends {head[-40:]!r}); use another model.chat_template",
            )
        span = Span(len(head), len(upto), weights[k])
        spans.append(span)
        alone.append((upto, span, k))
        # The newline that some templates put behind the end of turn may differ; the turn itself must not.
        stable = stable and full.startswith(upto.rstrip())
    if stable:
        return [_Part(Rendered(full, full, tuple(spans)), len(messages), turns)]
    if on_mask_error != "unroll":
        detail = "the chat template rewrites earlier turns, so one rendering can't hold them all as generation saw them"
        if on_mask_error == "raise":
            raise DataError(f"{detail}; set data.on_mask_error to 'unroll' for one sample a turn")
        raise RowError("history_rewritten", detail)
    return [_Part(Rendered(upto, upto, (span,), ("unrolled",)), k + 1, (k,)) for upto, span, k in alone]


def _spans_by_pieces(renderer, messages, weights, turns, tools, kwargs) -> list[_Part] | None:
    """The same in one rendering, for templates that provably only append."""
    if not renderer.append_only or (turns and turns[0] == 0):
        return None
    pieces = renderer.pieces(messages, tools=tools, kwargs=kwargs)
    if pieces is None:
        return None
    prompt = renderer.generation_prompt(kwargs)
    spans = []
    for k in turns:
        i = k - pieces.first
        begin = pieces.begin if i == 0 else pieces.ends[i - 1]
        if i < 0 or not pieces.text.startswith(prompt, begin) or begin + len(prompt) > pieces.ends[i]:
            return None  # the other way words the reason
        spans.append(Span(begin + len(prompt), pieces.ends[i], weights[k]))
    return [_Part(Rendered(pieces.text, pieces.text, tuple(spans)), len(messages), turns)]


def _head(text_of, k: int) -> str:
    if k > 0:
        return text_of(k, generation=True)
    try:
        return text_of(0, generation=True)
    except TemplateError as error:
        raise RowError(
            "assistant_first", f"the conversation starts with the assistant, which the template can't prompt ({error})"
        ) from None


# --- control tokens in data --------------------------------------------------------------------------------------


def _map_strings(value, function) -> tuple[Any, bool]:
    """`value` with `function` on every string in it, and whether that changed any. Keys stay."""
    if isinstance(value, str):
        new = function(value)
        return new, new is not value and new != value
    if isinstance(value, Mapping):
        items = {key: _map_strings(item, function) for key, item in value.items()}
        changed = any(flag for _, flag in items.values())
        return ({key: item for key, (item, _) in items.items()} if changed else value), changed
    if isinstance(value, (list, tuple)):
        results = [_map_strings(item, function) for item in value]
        changed = any(flag for _, flag in results)
        return ([item for item, _ in results] if changed else value), changed
    return value, False


def _hide(tokenizer: Tokenizer, messages) -> tuple[list, bool]:
    values = [value for message in messages for value in message.values()]
    if all(type(value) is str for value in values) and not tokenizer.control_text.possible("".join(values)):
        return list(messages), False  # nearly all rows
    results = []
    for message in messages:
        answer = message["role"] == "assistant"
        results.append(_map_strings(message, lambda text, a=answer: tokenizer.hide_control_tokens(text, answer=a)))
    return [message for message, _ in results], any(flag for _, flag in results)


def _unhide(tokenizer: Tokenizer, renderer, part: _Part, messages, tools, kwargs) -> _Part:
    """Puts the data's own text back, and checks that hiding it changed nothing else."""
    text = tokenizer.unhide_control_tokens(part.rendered.hidden)
    if text == part.rendered.hidden:
        return part
    if text != renderer.render(messages[: part.length], tools=tools, kwargs=kwargs):
        raise RowError("control_text", "the text spells a control token in a place where the chat template acts on it")
    return replace(part, rendered=replace(part.rendered, text=text, flags=(*part.rendered.flags, "control_text")))


def _flag_rewritten(rendered: Rendered, messages, turns: Sequence[int]) -> Rendered:
    """Flags a sample in which the template left out part of a trained answer (some delete its `<think>` part)."""
    for span, k in zip(rendered.spans, turns, strict=True):
        content = messages[k].get("content")
        if isinstance(content, str) and rendered.text.find(content.strip(), span.start, span.limit) < 0:
            written = "".join(rendered.text[span.start : span.limit].split())
            if "".join(content.split()) not in written:
                return replace(rendered, flags=(*rendered.flags, "content_rewritten"))
    return rendered


# --- from characters to tokens -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """Weights of one sample, and the prompts to compare: (first token, token behind) of each head's last stretch."""

    weights: np.ndarray
    flags: tuple[str, ...]
    heads: tuple[tuple[int, int, str, str], ...]


def mask(tokenizer: Tokenizer, rendered: Rendered, encoded: Encoded) -> Masked:
    """Trained spans in tokens.

    Returns the weights, and for each span the stretch of the prompt in front of it that begins at the last control
    token: (number of its first token, number behind its last, text, hidden text). Control tokens cut the tokenizer's
    work into independent stretches, so the prompt alone is tokenised alike if this stretch alone is.
    """
    weights = np.zeros(len(encoded.ids), np.float32)
    stops = np.flatnonzero(tokenizer.is_turn_end[encoded.ids])
    controls = np.flatnonzero(tokenizer.is_control[encoded.ids])
    firsts = first_tokens(encoded, [span.start for span in rendered.spans])
    begins = encoded.starts[firsts[firsts < len(encoded.ids)]].tolist()  # behind the last token: an error below
    stop_ends, control_starts = encoded.ends[stops].tolist(), encoded.starts[controls].tolist()
    firsts, stops, controls = firsts.tolist(), stops.tolist(), controls.tolist()
    straddle, heads = False, []
    for i, (span, first) in enumerate(zip(rendered.spans, firsts, strict=True)):
        end, last = bisect_left(stops, first), bisect_left(controls, first) - 1
        if end == len(stops) or stop_ends[end] > span.limit:
            around = rendered.text[max(span.limit - 40, span.start) : span.limit]
            raise RowError("no_end_of_turn", f"no end-of-turn token behind an answer (its text ends {around!r})")
        weights[first : stops[end] + 1] = span.weight
        straddle |= begins[i] < span.start
        begin, at = (controls[last], control_starts[last]) if last >= 0 else (0, 0)
        heads.append((begin, first, rendered.text[at : span.start], rendered.hidden[at : span.start]))
    flags = (*rendered.flags, *(("straddle",) if straddle else ()))
    return Masked(weights, flags, tuple(heads))


def first_tokens(encoded: Encoded, starts: Sequence[int]) -> np.ndarray:
    """For each of some characters, the first token that has text at or behind it, or stands there without text.

    text     a s s i s t a n t \\n | Y e s          start = |
    tokens   [   assistant   ][\\n][ Yes ]          -> Yes
    tokens   [   assistant   ][ \\n   Yes ]          -> the last, which straddles
    """
    wanted = np.array(starts, np.int32)  # of the array's own type: another would be converted for each search
    firsts = np.searchsorted(encoded.ends, wanted, side="right")
    if len(encoded.ids) and not encoded.no_blanks:
        while (made_up := (firsts > 0) & (encoded.starts[firsts - 1] >= wanted)).any():  # SentencePiece's prefix blank
            firsts -= made_up
    return firsts
