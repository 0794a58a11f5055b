"""Figures that a run's report shows."""

import json

import pytest

from sftjax.assess import recorded
from sftjax.errors import ConfigError
from tests import tiny_run

SUMMARY = {
    "model": {
        "loss": {"all": {"loss": 1.5}},
        "scores": {"numeric": {"mean": 0.4, "low": 0.3, "high": 0.5}},
        "answers": {"stop_rate": 1.0, "mean_tokens": 9.0, "repeated_4grams": 0.0, "commonest_opening_share": 0.2},
    },
    "base": {
        "loss": {"all": {"loss": 2.5}},
        "scores": {"numeric": {"mean": 0.1, "low": 0.0, "high": 0.2}},
        "answers": {"stop_rate": 0.5, "mean_tokens": 40.0, "repeated_4grams": 0.3, "commonest_opening_share": 0.9},
    },
    "difference": {
        "loss": {"mean": -1.0, "low": -1.2, "high": -0.8},
        "scores": {"numeric": {"mean": 0.3, "low": 0.2, "high": 0.4}},
    },
    "kl_to_base": 0.25,
}


def a_run(folder, adapter=False):
    (folder / "export").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": {"path": "the/base"}}))
    (folder / "export" / ("adapter_config.json" if adapter else "config.json")).write_text("{}")
    return str(folder)


def test_models_of_a_run(tmp_path):
    full, lora = a_run(tmp_path / "full"), a_run(tmp_path / "lora", adapter=True)
    assert recorded.models_of(full) == (f"{full}/export", None, "the/base")
    assert recorded.models_of(lora) == ("the/base", f"{lora}/export", "the/base")
    (tmp_path / "full" / "export" / "config.json").unlink()
    with pytest.raises(ConfigError, match="nothing was exported"):
        recorded.models_of(full)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        recorded.models_of(str(tmp_path))


def test_figures_are_kept_by_name_and_shown(tmp_path):
    run = a_run(tmp_path / "run")
    rows = recorded.of_summary(SUMMARY)
    assert rows[0] == {"metric": "response loss", "before": 2.5, "after": 1.5, "low": -1.2, "high": -0.8}
    assert rows[1] == {"metric": "numeric", "before": 0.1, "after": 0.4, "low": 0.2, "high": 0.4}
    assert rows[-1]["metric"] == "KL to the base" and rows[-1]["after"] == 0.25
    recorded.record(run, "first", rows)
    recorded.record(run, "second <set>", rows[:1])
    recorded.record(run, "first", rows[1:2])
    kept = tiny_run.lines(tmp_path / "run" / "evaluations.jsonl")
    assert [(row["name"], row["metric"]) for row in kept] == [("second <set>", "response loss"), ("first", "numeric")]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "second &lt;set&gt;" in page and "numeric" in page and "+0.3" in page


def test_without_a_base_there_is_no_before(tmp_path):
    alone = {"model": SUMMARY["model"]}
    assert all(row["before"] is None and row["low"] is None for row in recorded.of_summary(alone))


def test_the_harness_figures():
    before = {"task": {"alias": "task", "acc,none": 0.5, "acc_stderr,none": 0.03, "sample_len": 100}}
    after = {"task": {"alias": "task", "acc,none": 0.7, "acc_stderr,none": 0.04, "sample_len": 100}}
    (row,) = recorded.of_harness(before, after)
    assert (row["metric"], row["before"], row["after"]) == ("task: acc", 0.5, 0.7)
    assert row["low"] == pytest.approx(0.2 - 1.96 * 0.05) and row["high"] == pytest.approx(0.2 + 1.96 * 0.05)
    assert recorded.of_harness(None, after)[0]["low"] is None
