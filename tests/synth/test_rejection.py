import numpy as np
import pytest

from sftjax.synth import rejection
from sftjax.synth.rewards import Reward
from sftjax.synth.teacher import Reply, Sampling
from tests.synth.fakes import asker

ROWS = [{"prompt": f"q{number}", "answer": str(number)} for number in range(5)]
ANSWERS = {  # to each question, sample by sample
    "q0": ["bad", "good one", "good too"],
    "q1": ["bad", "bad", "bad"],
    "q2": ["", Reply("good but cut", "length"), "good"],
    "q3": ["good", "good", "good"],
    "q4": ["nothing", "", ""],
}


def by_word(name="by_word", words=None):
    values = words or {"bad": 0.0, "good": 1.0, "nothing": float("nan")}

    def score(pairs):
        found = [values[answer.split()[0]] for _, answer in pairs]
        return [None if np.isnan(value) else value for value in found]

    return Reward(name, score)


def best(folder, **options):
    with asker(folder, lambda prompt, sample, seed: ANSWERS[prompt][sample], chunk=2) as asking:
        return rejection.best_of_n(ROWS, asking, options.pop("reward", by_word()), Sampling(), n=3, **options)


def test_the_best_answer_of_each_prompt_is_kept_if_it_is_good_enough(tmp_path):
    made = best(tmp_path)
    assert made.rows == [
        {
            "messages": [{"role": "user", "content": f"q{index}"}, {"role": "assistant", "content": text}],
            "method": "rejection",
            "index": index,
            "sample": sample,
            "score": 1.0,
            "scores": scores,
        }
        for index, text, sample, scores in ((0, "good one", 1, [0, 1, 1]), (2, "good", 2, [1]), (3, "good", 0, [1] * 3))
    ]
    assert made.report["filters"] == {
        "empty": 3, "cut_off": 1, "no_reward": 1, "no_answer_left": 1, "below_threshold": 1,
    }  # fmt: skip
    counts = made.report["answers"], made.report["rows"], made.report["pairs"]
    assert counts == (15, 3, 0)


def test_every_answer_is_accounted_for(tmp_path):
    report = best(tmp_path)
    lost = sum(report.report["filters"][name] for name in ("empty", "cut_off", "no_reward"))
    assert report.report["reward"]["answers"]["count"] == 15 - lost
    assert sum(report.report["reward"]["answers"]["histogram"]["counts"]) == 15 - lost


def test_pairs_need_a_worse_answer(tmp_path):
    made = best(tmp_path, pairs=True)
    assert made.pairs == [
        {
            "prompt": [{"role": "user", "content": "q0"}],
            "chosen": [{"role": "assistant", "content": "good one"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
            "index": 0,
            "chosen_score": 1.0,
            "rejected_score": 0.0,
        }
    ]
    assert made.report["filters"]["no_worse_answer"] == 2


def test_a_second_reward_is_reported_and_decides_nothing(tmp_path):
    inverse = by_word("inverse", {"bad": 1.0, "good": 0.0, "nothing": 0.0})
    made = best(tmp_path, second=inverse)
    assert [row["index"] for row in made.rows] == [0, 2, 3]
    assert made.rows[0]["second_score"] == 0
    second = made.report["second"]
    assert second["correlation"] == pytest.approx(-1) and second["chosen"]["mean"] == 0
    assert second["first_answers"]["mean"] == pytest.approx(1 / 3)  # of q0, q2, q3 sampled once
    assert any("over-optimisation" in warning for warning in made.report["warnings"])


def test_length_that_is_rewarded_shows(tmp_path):
    def wordy(prompt, sample, seed):
        return "word " * (2 + 3 * sample) + f"{prompt} {sample} end"

    by_length = Reward("by_length", lambda pairs: [float(len(answer)) for _, answer in pairs])
    with asker(tmp_path, wordy) as asking:
        report = rejection.best_of_n(ROWS, asking, by_length, Sampling(), n=4, threshold=0).report
    assert report["reward_length_correlation"]["within_prompts"] == pytest.approx(1, abs=1e-3)
    assert report["words"] == {"first_answers": 5.0, "chosen": 14.0}
    assert any("long answers" in warning for warning in report["warnings"])


def test_variety_is_measured_on_the_same_prompts(tmp_path):
    def answer(prompt, sample, seed):
        return f"{prompt} alone says it" if sample == 0 else "good the same words always"

    reward = Reward("same", lambda pairs: [float(answer.startswith("good")) for _, answer in pairs])
    with asker(tmp_path, answer) as asking:
        report = rejection.best_of_n(ROWS, asking, reward, Sampling(), n=2).report
    assert report["distinct"]["before"]["1"] == pytest.approx(8 / 20)
    assert report["distinct"]["after"]["1"] == pytest.approx(5 / 25)
    assert any("less varied" in warning for warning in report["warnings"])


def test_nothing_kept_is_said(tmp_path):
    made = best(tmp_path, threshold=2.0)
    assert made.rows == [] and "nothing was kept" in made.report["warnings"][0]


def test_the_correlation_within_prompts_is_not_that_between_them():
    """Between prompts the score falls with length; within each it rises."""
    values, groups = np.array([10, 11, 0, 1.0]), [0, 0, 1, 1]
    lengths = np.array([1, 2, 11, 12.0])
    assert rejection.correlation(values, lengths) < -0.9
    centred = (rejection._centred(each, groups) for each in (values, lengths))
    assert rejection.correlation(*centred) == pytest.approx(1)
    assert rejection.correlation([1, 1], [1, 2]) is None and rejection.correlation([1], [1]) is None
