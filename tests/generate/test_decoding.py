"""Answers that join and leave between steps, and what the whole way from prompt to token draws."""

import jax
import numpy as np
import pytest

from sftjax.generate import sample
from sftjax.generate.answer import Answer
from sftjax.generate.sampling import TOP, Sampling
from tests.generate.test_sample import CONFIG, RUNTIME, Letters, next_logits, variables  # noqa: F401

PROMPTS = [[5, 9, 11], [7] * 30, [3, 1, 4, 1, 5]]
SETTINGS = [Sampling(1.0), Sampling(1.0, top_p=0.8), Sampling(repetition_penalty=1.5)]


@pytest.fixture(scope="module")
def decoding(variables):  # noqa: F811
    return sample.Generator(CONFIG, RUNTIME, variables, Letters(), batch_size=4, steps=4).decoding(stop_ids=())


def answer(number, **changes):
    fields = {"key": (3, 0, number), "limit": 14, "sampling": SETTINGS[number], "tokenizer": Letters()} | changes
    return Answer(list(PROMPTS[number]), **fields)


def run(decoding, *answers):
    decoding.add(answers)
    ended = []
    while decoding.busy:
        ended += decoding.step()
    return ended


def test_whoever_joins_or_leaves_changes_nobody_elses_answer(decoding):
    alone = [run(decoding, answer(number))[0].tokens for number in range(3)]
    first, second, third = together = [answer(number) for number in range(3)]
    decoding.add([first])
    assert not decoding.step()
    decoding.add([second])  # brings filters
    decoding.step()
    gone = answer(0, key=(4, 0, 0), limit=10_000)
    decoding.add([gone, third])  # brings a penalty, while two are half-way
    decoding.step()
    decoding.remove(gone)
    ended = run(decoding)
    assert set(ended) == set(together)
    assert [each.tokens for each in together] == alone
    assert gone not in ended and not gone.finish_reason and 0 < len(gone.tokens) < 20
    assert decoding.state is None  # nothing is kept for nobody


def test_slots_and_cache_are_as_large_as_need_be(decoding):
    answers = [answer(0, key=(0, 0, number), limit=6) for number in range(6)]
    decoding.add(answers)
    decoding.step()
    assert len(decoding.slots) == 4 == len(decoding.running) and len(decoding.waiting) == 2
    decoding.remove(answers[5])  # waits still
    decoding.step()
    long = answer(0, limit=300)
    run(decoding, long)
    assert len(long.tokens) == 300 and decoding.length >= 303
    assert all(len(each.tokens) == 6 for each in answers[:5]) and not answers[5].tokens
    run(decoding, answer(0, limit=2))
    assert len(decoding.slots) == 1 and decoding.length < 303


def test_the_likeliest_are_reported(decoding, variables):  # noqa: F811
    told, untold = answer(0, top_logprobs=5, limit=6), answer(1, limit=6)
    run(decoding, told, untold)
    assert len(told.top) == 6 and untold.top == []
    ids = list(PROMPTS[0])
    for token, logprob, top in zip(told.tokens, told.logprobs, told.top, strict=True):
        exact = np.asarray(jax.nn.log_softmax(next_logits(variables, ids)))
        order = np.argsort(-exact)[:5]
        assert [number for number, _ in top] == order.tolist()
        np.testing.assert_allclose([value for _, value in top], exact[order], atol=2e-5)
        assert logprob == pytest.approx(exact[token], abs=2e-5)
        ids.append(token)
    assert TOP >= 20  # what the OpenAI protocol allows


def test_tokens_that_the_text_doesnt_have_arent_told():
    def drawn(*tokens):
        return {"token": np.array(tokens), "logprob": np.zeros(len(tokens))}

    pieces = []
    running = answer(0, stop=["CDE"], on_text=pieces.append)
    running.add(drawn(1, 2, 3, 4))
    assert pieces == ["AB"] and running.told() == 2  # C and D may be the beginning of the stop string
    running.add(drawn(5, 6))
    assert running.finish_reason == "stop" and running.text == "AB" and running.told() == 2
    assert running.tokens == [1, 2, 3, 4, 5]
    stopped = answer(0, stop_ids=(9,))
    stopped.add(drawn(1, 2, 9, 3))
    assert stopped.finish_reason == "stop" and stopped.text == "AB" and stopped.told() == 2
    full = answer(0, limit=3)
    full.add(drawn(1, 2, 9, 3))
    assert full.finish_reason == "length" and full.told() == 3


def test_whole_answers_have_the_models_distribution(variables):  # noqa: F811
    """Two tokens each: the first, and the second given the first, chi-squared against plain forward passes."""
    generator = sample.Generator(CONFIG, RUNTIME, variables, Letters(), batch_size=512, steps=2)
    draws, heat = 4096, 0.8
    outputs = generator.generate([PROMPTS[0]], n=draws, max_new_tokens=2, temperature=heat, stop_ids=(), seed=11)
    pairs = np.array([output.tokens for output in outputs])
    commonest = int(np.bincount(pairs[:, 0]).argmax())
    behind = pairs[pairs[:, 0] == commonest, 1]
    for drawn, prompt in ((pairs[:, 0], PROMPTS[0]), (behind, [*PROMPTS[0], commonest])):
        shares = np.asarray(jax.nn.softmax(next_logits(variables, prompt) / heat), np.float64)
        expected = shares * len(drawn)
        counts = np.bincount(drawn, minlength=CONFIG.vocab_size)
        seen = expected > 5
        freedom = seen.sum() - 1
        chi_squared = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
        assert freedom > 3
        assert chi_squared < freedom + 4 * np.sqrt(2 * freedom) + 8  # four standard deviations
