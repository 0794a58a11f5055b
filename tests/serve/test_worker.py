"""The worker's promises to a request: it is answered, or told that it won't be."""

import queue
import time

import pytest

from sftjax.generate.answer import Answer
from sftjax.serve.worker import Job, Worker


class Model:
    """Decodes a token a step for everybody; breaks on demand."""

    tokenizer = type("Tokenizer", (), {"stop_ids": (0,)})

    def __init__(self):
        self.answers, self.broken = [], False

    running = property(lambda self: self.answers)
    busy = property(lambda self: bool(self.answers))
    waiting = ()

    def decoding(self, stop_ids):
        assert stop_ids == (0,)
        return self

    def add(self, answers):
        self.answers += answers

    def remove(self, answer):
        self.answers.remove(answer)

    def clear(self):
        self.answers.clear()

    def step(self):
        if self.broken:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        time.sleep(0.001)
        for answer in self.answers:
            answer.tokens.append(1)
        ended = [answer for answer in self.answers if len(answer.tokens) >= answer.limit]
        self.answers = [answer for answer in self.answers if answer not in ended]
        return ended


@pytest.fixture
def started():
    models = {"a": Model(), "b": Model()}
    worker = Worker(models)
    worker.start()
    yield models, worker
    worker.stop(0.0)
    worker.join()
    assert not worker.is_alive()


def ask(worker, model, *limits):
    events = queue.Queue()
    answers = [Answer([1], key=(0, 0, number), limit=limit) for number, limit in enumerate(limits)]
    job = Job(model, answers, events.put, texts=False, tokens=False)
    worker.submit(job)
    return job, events


def test_requests_are_answered_side_by_side(started):
    _, worker = started
    slow, short = ask(worker, "a", 100_000), ask(worker, "a", 3, 1)
    other = ask(worker, "b", 2)
    assert [short[1].get(timeout=20) for _ in range(2)] == [("end", 1), ("end", 0)]
    assert other[1].get(timeout=20) == ("end", 0)
    assert worker.counts() == {"a": {"running": 1, "waiting": 0}, "b": {"running": 0, "waiting": 0}}
    worker.cancel(slow[0])
    assert ask(worker, "a", 1)[1].get(timeout=20) == ("end", 0)  # so the cancellation has been seen
    assert worker.counts()["a"]["running"] == 0 and slow[1].empty()


def test_what_fails_is_told_and_the_rest_goes_on(started):
    models, worker = started
    lost, fine = ask(worker, "a", 100_000, 100_000), ask(worker, "b", 300)
    models["a"].broken = True
    assert lost[1].get(timeout=20) == ("lost", "failed")
    assert fine[1].get(timeout=20) == ("end", 0)
    models["a"].broken = False
    assert ask(worker, "a", 2)[1].get(timeout=20) == ("end", 0)
    assert lost[1].empty()  # told once


def test_at_the_end_short_answers_are_finished_and_long_ones_told():
    worker = Worker({"a": Model()})
    worker.start()
    short, long = ask(worker, "a", 50), ask(worker, "a", 10**9)
    worker.stop(1.0)
    assert short[1].get(timeout=20) == ("end", 0)
    assert long[1].get(timeout=20) == ("lost", "stopping")
    worker.join()
    idle = Worker({"a": Model()})
    idle.start()
    begun = time.monotonic()
    idle.stop(60.0)
    idle.join()
    assert time.monotonic() - begun < 20  # with nothing to do it doesn't wait
