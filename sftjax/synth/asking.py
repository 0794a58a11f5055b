"""Asks a teacher in chunks, each remembered on disk; and counts what filters take."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sftjax.synth.memory import Memory, Progress, in_chunks
from sftjax.synth.teacher import Conversation, Reply, Sampling, Teacher, seed_of

Row = dict[str, Any]


class Asker:
    """A teacher with a memory.

    Args:
      seed: of everything drawn; each chunk gets its own from it.
      chunk: prompts asked for at once; what a kill loses at most.
    """

    def __init__(self, teacher: Teacher, memory: Memory, *, seed: int, chunk: int = 64):
        self.teacher, self.memory, self.seed, self._chunk = teacher, memory, seed, chunk
        self._calls = 0

    def chat(
        self, conversations: Sequence[Conversation], sampling: Sampling, *, n: int = 1, what: str = "answers"
    ) -> list[Reply]:
        """n replies to each conversation, conversation by conversation."""
        return self._ask("chat", list(map(list, conversations)), sampling, n, what)

    def complete(self, texts: Sequence[str], sampling: Sampling, *, what: str = "texts") -> list[Reply]:
        return self._ask("complete", list(texts), sampling, 1, what)

    def _ask(self, kind: str, prompts: list[Any], sampling: Sampling, n: int, what: str) -> list[Reply]:
        progress = Progress(what, len(prompts) * n, memory=self.memory)
        replies: list[Reply] = []
        for part in in_chunks(prompts, self._chunk):
            seed = seed_of(self.seed, self._calls)
            self._calls += 1
            request = [kind, self.teacher.name, dataclasses.asdict(sampling), n, seed, part]
            found = self.memory.call(request, lambda part=part, seed=seed: self._now(kind, part, sampling, seed, n))
            replies += [Reply(*each) for each in found]
            progress.add(len(part) * n)
        return replies

    def _now(self, kind: str, prompts: Sequence[Any], sampling: Sampling, seed: int, n: int) -> list[tuple[str, str]]:
        if kind == "chat":
            found = self.teacher.chat(prompts, sampling, seed, n)
        else:
            found = self.teacher.complete(prompts, sampling, seed)
        return [(reply.text, reply.finish_reason) for reply in found]

    def remember(self, what: str, request: Sequence[Any], do: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """`do(chunk)` for each chunk of `request`, joined; for work other than the teacher's that is worth keeping."""
        progress = Progress(what, len(request), memory=self.memory)
        found: list[Any] = []
        for part in in_chunks(request, self._chunk):
            found += self.memory.call([what, part], lambda part=part: do(part))
            progress.add(len(part))
        return found


class Filters:
    """Counts what each filter took, in the order in which they are first met.

    `filters.take("empty", text == "")` is True, and counted, where the filter strikes.
    """

    def __init__(self):
        self._counts: Counter[str] = Counter()

    def take(self, name: str, strikes: bool) -> bool:
        self._counts[name] += strikes
        return strikes

    def first(self, checks: Sequence[tuple[str, bool]]) -> str | None:
        """The name of the first that strikes, counted; None where none does."""
        return next((name for name, strikes in checks if self.take(name, strikes)), None)

    def as_dict(self) -> dict[str, int]:
        return dict(self._counts)
