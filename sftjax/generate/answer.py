"""One answer in the making: its tokens, its text, and where it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sftjax.generate.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Output:
    """One answer.

    Attributes:
      prompt: index of the prompt; sample: which of its n answers.
      tokens: what was generated, the stop token included.
      logprobs: log-probability of each under the model (before temperature, filters and penalty).
      text: without the stop token, special tokens, and what a stop string cuts off.
      finish_reason: "stop" (a stop token or string) or "length".
      prompt_tokens: how many the prompt has.
      top_logprobs: where they were asked for, the likeliest (token, log-probability) at each place, descending.
    """

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    prompt_tokens: int
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


class Answer:
    """What `Decoding` fills.

    Args:
      prompt_ids: the answers to one prompt that share this very list share one prefill.
      key: (seed, prompt, sample), each in [0, 2**32): decides the draws.
      limit: tokens, at most.
      tokenizer: None: no text is made.
      stop_ids: tokens that end it. stop: strings that end it.
      top_logprobs: how many of the likeliest tokens to report at each place, at most `sampling.TOP`.
      on_text: called with new text as it comes.

    Attributes:
      tokens, logprobs, top, text: so far; see `Output`. Text is there at the end, or with `on_text` all along.
      shown: characters that `on_text` has had.
      finish_reason: empty while it runs.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        *,
        key: tuple[int, int, int],
        limit: int,
        sampling: Sampling | None = None,
        tokenizer: Any = None,
        stop_ids: Collection[int] = (),
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
        on_text: Callable[[str], None] | None = None,
    ):
        self.prompt_ids, self.key, self.limit = prompt_ids, key, limit
        self.sampling = sampling or Sampling()
        self.tokenizer, self.stop_ids, self.stop = tokenizer, stop_ids, tuple(stop)
        self.top_logprobs, self.on_text = top_logprobs, on_text
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[tuple[tuple[int, float], ...]] = []
        self.text, self.shown, self.finish_reason = "", 0, ""
        self.pause_at = 0  # total length at which the prompt has to be run again

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.tokens

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.tokens)

    @property
    def written(self) -> list[int]:
        """The tokens without the stop token."""
        ended = self.tokens and self.tokens[-1] in self.stop_ids
        return self.tokens[:-1] if ended else self.tokens

    def add(self, drawn: dict[str, Any]) -> None:
        """Takes new tokens as far as the answer goes, and sets `finish_reason` where it ends.

        Args:
          drawn: `engine.advance`'s, of this answer: leaves `[n]` and `[n, TOP]`.
        """
        before = len(self.tokens)
        for token in drawn["token"].tolist():
            self.tokens.append(token)
            if token in self.stop_ids:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.limit:
                self.finish_reason = "length"
            if self.finish_reason:
                break
        if self.tokenizer is not None and (self.stop or self.finish_reason or self.on_text):
            self._read(before)
        count = len(self.tokens) - before
        self.logprobs += drawn["logprob"][:count].tolist()
        if self.top_logprobs:
            tokens, logprobs = (drawn[name][:count, : self.top_logprobs] for name in ("top_token", "top_logprob"))
            pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
            self.top += [tuple(zip(*pair, strict=True)) for pair in pairs]
        self._show()

    def _read(self, before: int) -> None:
        """Sets the text, up to a stop string if there is one; the first `before` tokens hold none."""
        self.text = self.decode(self.written)
        if self._stop_place() < 0:
            return
        self.finish_reason = "stop"
        everything = self.tokens
        for count in range(before + 1, len(everything) + 1):
            self.tokens = everything[:count]
            self.text = self.decode(self.written)
            place = self._stop_place()
            if place >= 0:
                self.text = self.text[:place]
                return

    def _stop_place(self) -> int:
        return min((place for place in map(self.text.find, self.stop) if place >= 0), default=-1)

    def _show(self) -> None:
        if self.on_text is None:
            return
        # Half a character, or what may become a stop string, waits.
        hold = max((len(each) for each in self.stop), default=1) - 1
        upto = len(self.text) if self.finish_reason else len(self.text.rstrip("\ufffd")) - hold
        if upto > self.shown:
            piece, self.shown = self.text[self.shown : upto], upto
            self.on_text(piece)

    def told(self) -> int:
        """How many tokens the text has: without stop token, what a stop string cut off, and what waits to be shown."""
        if self.finish_reason == "length" or len(self.written) < len(self.tokens):
            return len(self.written)
        text = self.text if self.finish_reason else self.text[: self.shown]
        count = len(self.tokens)
        while count and self.decode(self.tokens[: count - 1]).startswith(text):
            count -= 1
        return count

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special=True)

    def output(self) -> Output:
        _, prompt, sample = self.key
        return Output(
            prompt,
            sample,
            tuple(self.tokens),
            tuple(self.logprobs),
            self.text,
            self.finish_reason or "length",
            len(self.prompt_ids),
            tuple(self.top),
        )
