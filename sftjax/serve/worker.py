"""One thread that decodes for everybody: requests join its batches as they come, and leave when they are answered."""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sftjax.generate.answer import Answer
from sftjax.generate.sample import Generator

_log = logging.getLogger(__name__)


class Job:
    """One request's answers.

    Args:
      model: name of the model.
      answers: waiting ones.
      report: called on the worker's thread with ("text", number of the answer, new text, first new token, token behind
        the last), ("end", number), and ("lost", reason), which is the last where it comes: "stopping" or "failed".
      texts: whether text is wanted as it comes; tokens: whether with its tokens.
    """

    def __init__(
        self,
        model: str,
        answers: Sequence[Answer],
        report: Callable[[tuple], None],
        *,
        texts: bool,
        tokens: bool,
    ):
        self.model, self.answers, self.report, self.tokens = model, answers, report, tokens
        self.told = [0] * len(answers)  # tokens reported
        if texts:
            for number, answer in enumerate(answers):
                answer.on_text = functools.partial(self._text, number)

    def _text(self, number: int, piece: str) -> None:
        start = self.told[number]
        if self.tokens:
            self.told[number] = max(start, self.answers[number].told())
        self.report(("text", number, piece, start, self.told[number]))


class Worker:
    """Decodes on a thread of its own, from `start` to `stop`.

    Args:
      generators: by the model's name.
    """

    def __init__(self, generators: Mapping[str, Generator]):
        self._decodings = {
            name: generator.decoding(generator.tokenizer.stop_ids) for name, generator in generators.items()
        }
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[Answer, tuple[Job, int]] = {}
        self._deadline: float | None = None
        self.stopping = False
        self._thread = threading.Thread(target=self._run, name="decode")

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Takes a request; not after `stop`."""
        self._orders.put(functools.partial(self._add, job))

    def cancel(self, job: Job) -> None:
        """Nobody waits for these answers any longer."""
        self._orders.put(functools.partial(self._drop, job))

    def stop(self, grace: float) -> None:
        """Ends when all is answered, or after `grace` seconds: what is in the making then is lost. May be called from
        a signal handler."""
        self.stopping = True
        self._orders.put(functools.partial(self._set_deadline, time.monotonic() + grace))

    def join(self) -> None:
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def counts(self) -> dict[str, dict[str, int]]:
        """How many answers each model has in the making, and how many wait."""
        return {
            name: {"running": len(decoding.running), "waiting": len(decoding.waiting)}
            for name, decoding in self._decodings.items()
        }

    # --- on the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._obey()
            if self._deadline is not None and (not self._jobs or time.monotonic() >= self._deadline):
                for decoding in self._decodings.values():
                    decoding.clear()
                self._lose(list(self._jobs), "stopping")
                return
            for name, decoding in self._decodings.items():
                if decoding.busy:
                    self._step(name, decoding)

    def _obey(self) -> None:
        """Does what was ordered; waits for an order where there is nothing else to do."""
        idle = not self._jobs and self._deadline is None
        while True:
            try:
                order = self._orders.get(block=idle)
            except queue.Empty:
                return
            order()
            idle = False

    def _step(self, name: str, decoding: Any) -> None:
        try:
            ended = decoding.step()
        except Exception:  # the device is out of memory, mostly: these answers are lost, the server goes on
            _log.exception("decoding failed")
            decoding.clear()
            self._lose([answer for answer, (job, _) in self._jobs.items() if job.model == name], "failed")
            return
        for answer in ended:
            job, number = self._jobs.pop(answer)
            job.report(("end", number))

    def _lose(self, answers: list[Answer], reason: str) -> None:
        for job in {self._jobs.pop(answer)[0] for answer in answers}:
            job.report(("lost", reason))

    def _add(self, job: Job) -> None:
        self._jobs |= {answer: (job, number) for number, answer in enumerate(job.answers)}
        self._decodings[job.model].add(job.answers)

    def _drop(self, job: Job) -> None:
        for answer in job.answers:
            if self._jobs.pop(answer, None) is not None:
                self._decodings[job.model].remove(answer)

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
