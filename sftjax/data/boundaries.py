"""Where an answer begins and where it ends: one idea for all chat templates.

    <user>Hi<end>\\n<assistant>\\n | Hello![<end of response>]<end> | \\n          \\n<user>Why?<end>...
    rendered before it, with      | what the model has to write    | what the template writes behind it: blanks,
    generation prompt: the head   ^ begin                      end ^ a tail behind the last turn, the next turn

Begin: generation starts behind the head, so training does.

    the rendering up to the answer starts with the head     there, and the text is the template's
    the head opens a thought that the rendering lacks       there, and the text is the head and what has to be written
                                                            from it (`thoughts`)
    the head differs further in front (templates that write the same: the head, and the rendering from where the
    the system text or tools only before an open question)  prompt of the last message ends

End: behind the first token on which generation stops, so that the model learns to stop. That is, of the tokens that
generation_config.json and the tokenizer name (and of `model.end_of_turn`), if the template writes one of them behind
each answer, inner ones too; else the template's own mark, the first control token behind an answer.

    Hello!<end of response><end>    two control tokens; only the second stops: through the second
    Hello!<end>\\n<eos>              <eos> stands behind the last turn only: through <end>, and the tail is not trained
    Hello!<return>                  behind the last answer; history has another mark: a sample for each answer
    Hello!         Hello!<user>Why  only the next turn's header tells: <user> is trained, and to the last answer the
                                    tokenizer's EOS (or `model.end_of_turn`) is appended
    Hello!         Hello!\\nUser:    nothing tells: `model.end_of_turn` is appended; refused without

`Ending` is found once for a template, by rendering a short conversation; `Finder` places the turns of a conversation,
prefix by prefix. Where a template provably only appends, `masks` reads the same off one rendering.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sftjax.data import thoughts
from sftjax.data.rendering import Renderer
from sftjax.data.sandbox import TemplateError
from sftjax.data.types import RowError

Controls = Callable[[str], list[tuple[str, int, int]]]  # text -> (name, from, to) of each control token in it

_QUESTION, _ANSWER, _NEXT = "Which?", "Paris", "Sure?"
_CALL = "Lisbon"


# --- the end of an answer ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How answers end in a template.

    Attributes:
      mark: the token behind a plain answer.
      marks: tokens that end an answer, the first of them that comes.
      tail: text from a control token on that stands behind the last turn only, and ends no answer.
      following: role -> token that the next turn begins with, where that is what ends an answer.
      appended: token put behind an answer whose rendering has none.
    """

    mark: str
    marks: tuple[str, ...]
    tail: str = ""
    following: Mapping[str, str] = field(default_factory=dict)
    appended: str = ""

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens that a trained answer may end on, the one behind a plain answer first."""
        return tuple(dict.fromkeys([self.mark, *self.marks, *self.following.values()]))

    def find(self, text: str, start: int, limit: int) -> tuple[int, int] | None:
        """The first mark in `text[start:limit]`: where it begins and ends."""
        return _first(self.marks, text, start, limit)

    def without_tail(self, text: str) -> int:
        """Length of a rendering without what stands behind its last turn only."""
        return len(text) - len(self.tail) if self.tail and text.endswith(self.tail) else len(text)


def _first(names: Collection[str], text: str, start: int, limit: int) -> tuple[int, int] | None:
    best = None
    for name in names:
        place = text.find(name, start, limit if best is None else min(limit, best[0] + len(name) - 1))
        if place >= 0:
            best = (place, place + len(name))
    return best


def probe(
    renderer: Renderer,
    controls: Controls,
    named: Sequence[str],
    *,
    bos: str | None,
    eos: str | None,
    chosen: str | None,
) -> Ending | None:
    """How a template ends its answers; None where nothing does.

    Args:
      renderer: the template.
      controls: finds control tokens in a text.
      named: tokens on which generation stops.
      bos, eos: the tokenizer's.
      chosen: the token that the user named, which counts as `named`.

    Raises:
      TemplateError: it can't write a question and an answer.
      ValueError: it doesn't write the answer.
    """
    named = tuple(dict.fromkeys([*((chosen,) if chosen else ()), *named]))
    last, inner = behind_an_answer(renderer)
    behind_last = controls(last)
    behind_inner = [] if inner is None else controls(inner)
    shared = 0
    for one, other in zip(behind_last, behind_inner, strict=False):
        if last[: one[2]] != inner[: other[2]]:
            break
        shared += 1
    calls = _behind_a_call(renderer, controls)
    if behind_last:
        marks = behind_last[:shared] if shared else behind_last
        stops = [name for name, _, _ in marks if name in named]
        mark = stops[0] if stops else marks[0][0]
        own = () if stops else (mark,)
        tail = last[behind_last[shared][1] :] if 0 < shared < len(behind_last) else ""
        extra = (calls.last,) if calls.last and calls.last not in named else ()
        return Ending(mark, tuple(dict.fromkeys([*named, *own, *extra])), tail)
    if behind_inner and behind_inner[0][0] != bos:
        following = {"user": behind_inner[0][0], **({"tool": calls.next} if calls.next else {})}
        appended = chosen or eos or following["user"]
        return Ending(appended, named, "", following, appended)
    return Ending(chosen, named, "", {}, chosen) if chosen else None


def behind_an_answer(renderer: Renderer) -> tuple[str, str | None]:
    """What a template writes behind an answer at the end, and up to the next question (None: it writes no more)."""
    said = [("user", _QUESTION), ("assistant", _ANSWER), ("user", _NEXT)]
    try:
        shape, text = str, renderer.render(_messages(said[:2], str))
        if _ANSWER not in text:
            raise TemplateError("the answer is not written")
    except TemplateError:
        try:
            shape, text = _as_parts, renderer.render(_messages(said[:2], _as_parts))
        except TemplateError:
            shape, text = str, renderer.render(_messages(said[:2], str))
    place = text.rfind(_ANSWER)
    if place < 0:
        raise ValueError("the template doesn't write the assistant's content")
    last = text[place + len(_ANSWER) :]
    try:
        longer = renderer.render(_messages(said, shape))
    except TemplateError:
        return last, None
    until = longer.rfind(_NEXT)
    place = longer.rfind(_ANSWER, 0, max(until, 0))
    return last, longer[place + len(_ANSWER) : until] if place >= 0 else None


def _messages(said: Sequence[tuple[str, str]], shape: Callable[[str], Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": shape(text)} for role, text in said]


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


class _Calls(NamedTuple):
    last: str = ""  # control token at the very end, behind a call
    next: str = ""  # first control token of the tool's turn, where the call's own has none behind its text


def _behind_a_call(renderer: Renderer, controls: Controls) -> _Calls:
    call = {"id": "call00001", "type": "function", "function": {"name": "find", "arguments": {"place": _CALL}}}
    messages = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "find", "tool_call_id": "call00001", "content": _NEXT},
    ]
    try:
        text, longer = renderer.render(messages[:2]), renderer.render(messages)
    except TemplateError:
        return _Calls()
    if _CALL not in text:
        return _Calls()
    rest = text[text.rfind(_CALL) + len(_CALL) :]
    behind = controls(rest)
    at_the_end = behind and not rest[behind[-1][2] :].strip() and not _closes_a_tag(behind[-1][0])
    last = behind[-1][0] if at_the_end else ""
    following = controls(longer[len(text.rstrip()) :]) if longer.startswith(text.rstrip()) else []
    return _Calls(last, following[0][0] if following else "")


def _closes_a_tag(name: str) -> bool:
    return name.startswith(("</", "[/"))


# --- the turns of a conversation ---------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One answer: in `text[begin:end]` the model has to write it; its last token begins at `stop`.

    `built` says that the text is no rendering of the template with these variables, so that other turns can't share it.
    """

    number: int
    text: str
    begin: int
    stop: int
    end: int
    built: bool
    flags: tuple[str, ...] = ()


class Finder:
    """Finds the turns of one conversation, each by rendering what stands before it.

    Args:
      render: (number of messages, with generation prompt, further variables, whether the last loses its thought)
        -> text.
      messages: the conversation, control tokens hidden.
      ending: the template's.
      switches: variables that turn thoughts on and off, which nobody has set.
      close_thoughts: whether a thought that the prompt opens and the message lacks is closed at once.
    """

    def __init__(
        self,
        render: Callable[..., str],
        messages: Sequence[Mapping[str, Any]],
        ending: Ending,
        *,
        switches: Sequence[str] = (),
        close_thoughts: bool = False,
    ):
        self.render, self.messages, self.ending = render, messages, ending
        self.switches, self.close_thoughts = tuple(switches), close_thoughts

    def turn(self, k: int) -> Turn:
        """Message k, an answer. Raises RowError."""
        thought = thoughts.split(self.messages[k])[0]
        refused, found = None, None
        tries = [({}, False), *(({name: bool(thought)}, False) for name in self.switches)]
        tries += [({}, True)] if self.close_thoughts else []
        for variables, close in tries:
            try:
                turn = self._turn(k, thought, variables, close)
            except (RowError, TemplateError) as error:
                refused = refused or error
                continue
            if not thought or holds(turn.text, thought, turn.begin, turn.end):
                return turn
            found = found or turn
        if found is None:
            raise refused
        return found

    def _turn(self, k: int, thought: str, variables: Mapping[str, Any], close: bool) -> Turn:
        head, alone = self._head(k, variables), self.render(k + 1, variables=variables)
        text, flags = alone, ()
        if not alone.startswith(head):
            text, flags = self._continue(k, head, alone, thought, variables, close), ("continued",)
        built = text is not alone or bool(variables)
        flags += tuple("thinking_on" if value else "thinking_off" for value in variables.values())
        return self._ended(Turn(k, text, len(head), 0, 0, built, flags), variables)

    def _head(self, k: int, variables: Mapping[str, Any]) -> str:
        if k > 0:
            return self.render(k, generation=True, variables=variables)
        try:
            return self.render(0, generation=True, variables=variables)
        except TemplateError as error:
            raise RowError(
                "assistant_first",
                f"the conversation starts with the assistant, which the template can't prompt ({error})",
            ) from None

    def _continue(self, k: int, head: str, alone: str, thought: str, variables, close: bool) -> str:
        """The head with what has to be written behind it, where the rendering doesn't start with the head."""
        text = thoughts.continued(
            head,
            alone,
            thought,
            answer_only=lambda: self.render(k + 1, variables=variables, answer_only=True),
            close=close,
        )
        text = text if text is not None else self._rest_behind_the_last_message(k, head, alone)
        if text is None:
            raise self._refusal(k, head, thought)
        return text

    def _rest_behind_the_last_message(self, k: int, head: str, alone: str) -> str | None:
        content = thoughts.content_of(self.messages[k - 1]).strip() if k else ""
        place = head.rfind(content) if content else -1
        if place < 0:
            return None
        answer = thoughts.split(self.messages[k])[1]
        until = alone.rfind(answer) if answer and answer in alone else len(alone)
        found = alone.rfind(head[place:], 0, until)
        return None if found < 0 else head + alone[found + len(head) - place :]

    def _refusal(self, k: int, head: str, thought: str) -> RowError:
        opened = thoughts.opened(head)
        if opened is not None and not opened.closed and not thought:
            return RowError(
                "prompt_not_prefix",
                f"message {k}: the template's generation prompt opens a thought (it ends {head[-40:]!r}), and the "
                "message has none: give it in reasoning_content, or set data.close_thoughts=True, which trains to "
                "close it at once",
            )
        if opened is not None and thought:
            return RowError(
                "prompt_not_prefix",
                f"message {k} has a thought, and the template's generation prompt says that there is none (it ends "
                f"{head[-40:]!r}): take reasoning_content out, or use another model.chat_template",
            )
        return RowError(
            "prompt_not_prefix",
            f"message {k}: the template's prompt for generation is not how it writes the answer later "
            f"(prompt ends {head[-40:]!r}); use another model.chat_template",
        )

    def _ended(self, turn: Turn, variables: Mapping[str, Any]) -> Turn:
        """The turn with its end, appended where the template writes none."""
        ending, text, k = self.ending, turn.text, turn.number
        found = ending.find(text, turn.begin, ending.without_tail(text))
        if found is None and ending.following and k + 1 < len(self.messages):
            name = ending.following.get(self.messages[k + 1]["role"]) or ending.following["user"]
            base = text.rstrip()
            longer = "" if turn.built else self.render(k + 2, variables=variables)
            found = _first((name, *ending.marks), longer, len(base), len(longer)) if longer.startswith(base) else None
            if found is not None:
                text = longer[: found[1]]
            else:
                text = text[: self._end_of_content(turn)] + name
                found = (len(text) - len(name), len(text))
        elif found is None and ending.appended:
            text = text[: self._end_of_content(turn)] + ending.appended
            found = (len(text) - len(ending.appended), len(text))
        if found is None:
            around = text[max(len(text) - 40, turn.begin) :]
            raise RowError(
                "no_end_of_turn",
                f"message {k}: none of the tokens {', '.join(ending.marks)} stands behind the answer (its text ends "
                f"{around!r}): add the one that ends it to eos_token_id in the model's generation_config.json",
            )
        return turn._replace(text=text, stop=found[0], end=found[1])

    def _end_of_content(self, turn: Turn) -> int:
        """Where the answer's own text ends, in a rendering without a mark behind it."""
        message = self.messages[turn.number]
        content = thoughts.content_of(message)
        if content.strip() and not message.get("tool_calls"):
            for words in (content, content.strip(), thoughts.split(message)[1]):
                if words and (place := turn.text.rfind(words, turn.begin)) >= 0:
                    return place + len(words)
        return len(turn.text)


def holds(text: str, words: str, start: int = 0, end: int | None = None) -> bool:
    """Whether words stand in a stretch of text, blanks apart."""
    end = len(text) if end is None else end
    if text.find(words.strip(), start, end) >= 0:
        return True
    return "".join(words.split()) in "".join(text[start:end].split())
