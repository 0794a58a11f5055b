"""The doctor names what is wrong first, in runs broken on purpose, and is silent on healthy ones.

Every fault is produced by the product itself on a tiny model (tests/faulty_runs.py), a few by default, the others among
the nightly tests; what can't wait for a run is tested on a folder written by hand.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sftjax import doctor, held_out, report
from sftjax.doctor.figures import Figures, words
from sftjax.errors import ConfigError
from tests import faulty_runs, tiny_run

QUICK = ("healthy_lora", "learning_rate_too_low", "template_mismatch", "length_too_short", "stop_token_missing")
NAMES = [rule.__name__ for rule in doctor.RULES]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    base = faulty_runs.make_base(folder)
    return folder, faulty_runs.settings(folder, base)


@pytest.fixture(scope="module")
def quick(place):
    folder, settings = place
    faulty_runs.train(folder, [settings[name] for name in QUICK])
    return folder


@pytest.fixture(scope="module")
def others(place):
    folder, settings = place
    return folder, faulty_runs.train(folder, [fields for name, fields in settings.items() if name not in QUICK])


def check(folder, name):
    found = doctor.diagnose(folder / name)
    assert [finding.rule for finding in found][:1] == ([] if name.startswith("healthy") else [name]), found
    known = set(field_names())
    for finding in found:
        fields = set(re.findall(r"\b(?:train|data|model|peft|eval|export)\.\w+(?==)", finding.remedy))
        assert fields <= known and (fields or finding.rule in ("slow_device",)), finding
    return found


def field_names():
    from sftjax import config

    return config.field_names(config.defaults())


@pytest.mark.parametrize("name", QUICK)
def test_the_right_fault_comes_first(quick, name):
    check(quick, name)


def test_a_working_run_at_an_unusual_learning_rate_is_told_so(quick):
    assert [finding.rule for finding in check(quick, "learning_rate_unusual")] == ["learning_rate_unusual"]


OTHERS = [
    "healthy_full", "healthy_two_sources", "learning_rate_too_high", "steps_not_finite", "mask_leaves_little",
    "dead_adapters", "loss_not_falling", "stop_token_untrained", "duplicates", "validation_rising", "forgetting",
    "adapter_too_small", "empty_answers", "garbled_answers", "refusals", "loops", "style_collapse", "endless_answers",
    "gradient_spikes", "padding_waste", "data_bound", "slow_device",
]  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("name", OTHERS)
def test_the_right_fault_comes_first_in_the_others(others, name):
    check(others[0], name)


@pytest.mark.nightly
def test_full_tuning_for_a_small_change_is_named_behind_what_it_did(others):
    rules = [finding.rule for finding in doctor.diagnose(others[0] / "full_for_a_small_change")]
    assert rules[:2] == ["forgetting", "full_for_a_small_change"], rules
    assert "full_for_a_small_change" not in [finding.rule for finding in doctor.diagnose(others[0] / "forgetting")]


@pytest.mark.nightly
def test_only_the_runs_that_were_to_fail_did(others):
    assert {path.rsplit("/", 1)[-1]: text.split(":")[0] for path, text in others[1].items()} == {
        "steps_not_finite": "Diverged",
        "slow_device": "StopRequested",
    }


def test_every_rule_is_tried_and_explained():
    tried = {*QUICK, *OTHERS, "learning_rate_unusual", "full_for_a_small_change"}
    assert {name for name in tried if not name.startswith("healthy")} == set(NAMES)
    assert len([name for name in tried if name.startswith("healthy")]) == 3
    page = (tiny_run.ROOT / "docs" / "troubleshooting.md").read_text()
    assert re.findall(r"^\| (\w+) \|", page, re.M)[1:] == NAMES  # in the same order, below the heading


def test_the_end_of_a_run_tells_what_the_doctor_says(quick):
    output = (quick / f"{QUICK[0]}.txt").read_text()
    assert "doctor:  learning rate too low: training loss" in output
    page = Path(report.write(str(quick / "template_mismatch"))).read_text()
    assert 'id="doctor"' in page and "model.chat_template=&#39;&#39;" in page
    assert 'id="doctor"' not in (quick / "healthy_lora" / "report.html").read_text()
    saved = json.loads((quick / "template_mismatch" / "doctor.json").read_text())["findings"]
    assert saved == [finding._asdict() for finding in doctor.diagnose(quick / "template_mismatch")]


def test_the_tool_prints_a_list_or_words(quick, tmp_path):
    def tool(*arguments, code=0):
        command = [sys.executable, "tools/doctor.py", *map(str, arguments)]
        done = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    listed = json.loads(tool(quick / "length_too_short", "--json").stdout)
    assert listed[0].keys() == {"rule", "evidence", "remedy"} and listed[0]["rule"] == "length_too_short"
    assert json.loads(tool(quick / "healthy_lora", "--json").stdout) == []
    assert tool(quick / "healthy_lora").stdout == "doctor: nothing found\n"
    assert "config.json" in tool(tmp_path, code=78).stderr


# --- each rule on figures at hand: what it takes, and what is not enough ----------------------------------------------


def write_run(folder, *, losses=(), evals=(), answers=(), before=(), train=None, **files):
    """A run folder with these figures; files: config, preflight, model, summary, environment, timing."""
    folder.mkdir(exist_ok=True)
    config = {
        "model": {"path": "/nowhere", "chat_template": "", "end_of_turn": ""},
        "data": {"train_on": "all", "packing": "best_fit", "max_segments": 32, "workers": 0},
        "train": {"learning_rate": 2e-4, "batch_size": 4, "max_grad_norm": 1.0, "max_steps": 0},
        "peft": {"method": "lora", "r": 16, "loraplus_lr_ratio": 1.0},
        "export": {"checkpoint": "best"},
    }
    for field, value in files.pop("config", {}).items():
        section, key = field.split(".")
        config[section][key] = value
    preflight = {
        "trained_share": 0.4,
        "trained_tokens": 40_000,
        "samples": 1000,
        "stop_trained": 1.0,
        "max_length": 512,
    }
    files["preflight"] = preflight | files.get("preflight", {})
    timing = files.pop("timing", [])
    for name, value in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    lines = [{"step": n, "loss": loss, "learning_rate": 2e-4, "epoch": n / 50, **(train or {})}
             for n, loss in enumerate(losses, 1)]  # fmt: skip
    for position, line in enumerate(lines):
        line |= {key: value[position] for key, value in line.items() if isinstance(value, list)}
    lines += [{"step": step, "eval_loss": loss, **more} for step, loss, more in evals]
    samples = [
        {"step": step, "messages": [{"role": "user", "content": str(n)}], "num_tokens": 64, "finish_reason": "stop",
         **({"answer": text} if isinstance(text, str) else text)}
        for step, texts in ((0, before), (9, answers)) for n, text in enumerate(texts)
    ]  # fmt: skip
    for name, values in (("metrics", lines), ("samples", samples), ("timing", timing)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return folder


FLAT, FALLING = [3.0, 3.1, 2.9] * 10, [4 - 0.05 * step for step in range(30)]
RISING = [(0, 3, {}), (10, 2, {}), (30, 2.5, {})]
SPEEDS = [
    [{"step": n, "step_seconds": 1.0, "padded_tokens_per_second": 100 if n < 50 else late} for n in range(90)]
    for late in (40, 80)
]
BEGUN_HIGH = [50.0] + [1.0] * 99
SPIKED = [1.0] * 50 + [30.0] + [1.0] * 20 + [40.0] + [1.0] * 28
PROSE = "It was late when the old man came home, and nobody asked him where he had been all day."
CASES = {
    "learning_rate_too_high": (
        {"losses": [3.0, 3.5, 5.0, *[6.0] * 20]},
        {"losses": [3.0, 3.5, *[2.8] * 20]},  # a bump
    ),
    "steps_not_finite": (
        {"losses": FALLING, "train": {"skipped_steps": 1}},
        {"losses": FALLING, "train": {"skipped_steps": 0}},
    ),
    "learning_rate_too_low": (
        {"losses": FLAT, "train": {"learning_rate": 1e-7}},
        {"losses": FALLING, "train": {"learning_rate": 1e-7}},
    ),
    "template_mismatch": (
        {"model": {"around_an_answer": {"in_training": [" [/INST] ", "</s>"], "in_the_base": ["<|a|>", "<|b|>"]}}},
        {"model": {"around_an_answer": {"in_training": ["<|a|>\n", "<|b|>\n"], "in_the_base": ["<|a|>", "<|b|>"]}}},
    ),
    "mask_leaves_little": (
        {"preflight": {"trained_share": 0.01}, "config": {"data.train_on": "last"}, "losses": FALLING},
        {"preflight": {"trained_share": 0.01}, "losses": FALLING},  # short answers to long texts
    ),
    "dead_adapters": (
        {"summary": {"adapters": {"count": 14, "zero": 7}}},
        {"summary": {"adapters": {"count": 14, "zero": 0}}},
    ),
    "loss_not_falling": (
        {"losses": FLAT},
        {"losses": FLAT, "evals": [(0, 3.0, {}), (30, 2.8, {})]},  # noise hides it
    ),
    "length_too_short": (
        {"preflight": {"lost_trained_tokens": 4000, "proposed_length": 768, "coverage": 0.8}},
        {"preflight": {"lost_trained_tokens": 400, "proposed_length": 768, "coverage": 0.1}},  # split, not lost
    ),
    "stop_token_untrained": ({"preflight": {"stop_trained": 0.3}}, {"preflight": {"stop_trained": None}}),
    "stop_token_missing": (
        {"model": {"stop_ids": [7, 2]}, "export/generation_config": {"eos_token_id": 2}},
        {"model": {"stop_ids": [7, 2]}, "export/generation_config": {"eos_token_id": [2, 7]}},
    ),
    "duplicates": (
        {"losses": FALLING, "evals": RISING, "preflight": {"duplicates": 300}},
        {"losses": FALLING, "evals": [(0, 3, {}), (10, 2, {}), (30, 1.9, {})], "preflight": {"duplicates": 300}},
    ),
    "validation_rising": (
        {"losses": FALLING, "evals": RISING},
        {"losses": FALLING, "evals": [(0, 3, {}), (10, 2, {}), (30, 2.02, {})]},
    ),
    "forgetting": (
        {"losses": FALLING, "evals": [(0, 3, {"plain_text_loss": 2.0}), (30, 2, {"plain_text_loss": 2.5})]},
        {"losses": FALLING, "evals": [(0, 3, {"plain_text_loss": 2.0}), (30, 2, {"plain_text_loss": 2.03})]},
    ),
    "full_for_a_small_change": (
        {"losses": FALLING, "evals": RISING, "model": {"parameters": {"trainable": 10**9}},
         "config": {"peft.method": "none", "train.learning_rate": 2e-5}},
        {"losses": FALLING, "evals": [(0, 3, {}), (30, 2, {})], "model": {"parameters": {"trainable": 10**9}},
         "config": {"peft.method": "none", "train.learning_rate": 2e-5}},
    ),
    "adapter_too_small": (
        {"losses": FALLING, "train": {"num_trained_tokens": 40_000}, "model": {"parameters": {"trainable": 10_000}}},
        {"losses": FALLING, "train": {"num_trained_tokens": 4_000}, "model": {"parameters": {"trainable": 10_000}}},
    ),
    "empty_answers": ({"answers": ["", " \n", PROSE], "before": [PROSE] * 3}, {"answers": ["", PROSE, PROSE]}),
    "garbled_answers": (
        {"answers": ["\ufffd\ufffdq\x00", "Yes.<|im_start|>user", PROSE], "before": [PROSE] * 3},
        {"answers": ["Write [INST] there.", PROSE, PROSE], "before": ["<|im_start|>x", PROSE, PROSE]},  # no worse
    ),
    "refusals": (
        {"answers": ["I'm sorry, but I can't help with that.", PROSE, PROSE], "before": [PROSE] * 3},
        {"answers": ["I'm sorry you can't come.", PROSE, "I can help with that."], "before": [PROSE] * 3},
    ),
    "loops": (
        {"answers": ["and so it goes on " * 8, "红猫看" * 8, PROSE], "before": [PROSE] * 3},
        {"answers": ["no no no", PROSE + " " + PROSE[:30], PROSE], "before": [PROSE] * 3},
    ),
    "style_collapse": (
        {"answers": ["Great question, my friend! " + str(n) for n in range(4)], "before": [PROSE, "a", "b", "c"]},
        {"answers": ["Great question, my friend!", "Great question. No.", PROSE, "Hm."], "before": [PROSE] * 4},
    ),
    "endless_answers": (
        {"answers": [{"answer": PROSE, "finish_reason": "length", "num_tokens": 100}] * 3},
        {"answers": [{"answer": PROSE, "finish_reason": "length", "num_tokens": 64}] * 3},  # room for no longer ones
    ),
    "gradient_spikes": (
        {"losses": FALLING[:1] * 100, "train": {"grad_norm": SPIKED}, "evals": [(0, 3, {}), (100, 2, {})]},
        {"losses": FALLING[:1] * 100, "train": {"grad_norm": BEGUN_HIGH}, "evals": [(0, 3, {}), (100, 2, {})]},
    ),
    "learning_rate_unusual": ({"config": {"train.learning_rate": 1e-3}}, {"config": {"train.learning_rate": 3e-4}}),
    "padding_waste": (
        {"preflight": {"packing_efficiency": 0.4, "length": {"mean": 200}}, "config": {"data.packing": "none"}},
        {"preflight": {"packing_efficiency": 0.9, "length": {"mean": 200}}, "config": {"data.packing": "none"}},
    ),
    "data_bound": ({"timing": [{"step": 1, "waiting_share": 0.6}]}, {"timing": [{"step": 1, "waiting_share": 0.1}]}),
    "slow_device": ({"timing": SPEEDS[0]}, {"timing": SPEEDS[1]}),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_sees_its_fault_and_nothing_else(tmp_path, name):
    for broken, figures in zip((True, False), CASES[name], strict=True):
        folder = tmp_path / str(broken)
        (folder / "export").mkdir(parents=True)
        found = [finding.rule for finding in doctor.diagnose(write_run(folder, **figures))]
        assert (name in found) == broken, found
        assert broken or found == [], found


def test_the_quickstart_as_the_readme_shows_it_is_healthy(tmp_path):
    folder = write_run(
        tmp_path / "quickstart",
        losses=[3.883, *[3.9 - 0.003 * step for step in range(59)]],
        evals=[(0, 4.1339, {}), (30, 3.7613, {}), (60, 3.7363, {})],
        config={"train.learning_rate": 3e-4, "train.max_steps": 60},
        preflight={
            "trained_share": 0.407, "trained_tokens": 1_422_000, "samples": 3082, "coverage": 0.43, "max_length": 1024,
            "lost_trained_tokens": 0, "packing_efficiency": 0.984, "proposed_length": 3072, "steps": 60,
        },
        model={"parameters": {"base": 134_515_008, "trainable": 4_884_480}, "stop_ids": [2]},
        summary={"eval_loss_before": 4.1339, "eval_loss_after": 3.7363, "difference_95": [-0.4383, -0.3536],
                 "adapters": {"count": 210, "zero": 0}},
        environment={"backend": "cpu"},
        timing=[{"step_seconds": 4.3, "padded_tokens_per_second": 480, "waiting_share": 0.0}] * 60,
        answers=[{"answer": PROSE, "finish_reason": "length", "num_tokens": 64}] * 3,
        before=[PROSE] * 3,
    )  # fmt: skip
    assert doctor.diagnose(folder) == []


def test_a_folder_with_little_in_it_is_no_trouble(tmp_path):
    with pytest.raises(ConfigError, match="no run's folder"):
        doctor.diagnose(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError):
        doctor.diagnose(tmp_path)
    (tmp_path / "config.json").write_text('{"train": {"learning_rate": 2e-05}, "peft": {"method": "none"}}')
    assert doctor.diagnose(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 1.0}\n{"torn')
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "answer": null}\n{"answer": "x"}\n')
    (tmp_path / "preflight.json").write_text("[]")
    assert doctor.diagnose(tmp_path) == []


def test_the_course_of_a_noisy_loss(tmp_path):
    noisy = [3 + (0.5 if step % 2 else -0.5) for step in range(100)]
    assert not Figures(str(write_run(tmp_path / "a", losses=noisy))).training.fell
    drifting = [loss - 0.02 * step for step, loss in enumerate(noisy)]
    assert Figures(str(write_run(tmp_path / "b", losses=drifting))).training.fell
    assert Figures(str(write_run(tmp_path / "c", losses=noisy[:9]))).falling is None
    assert words("红猫 sees it.") == ["红", "猫", "sees", "it."]


# --- one test of significance for the doctor and the report --------------------------------------------------------


def evaluation(losses, source=None):
    keys = np.array([[0 if source is None else source[n], n, 0] for n in range(len(losses))])
    ones = np.ones(len(losses))
    return held_out.Evaluation(keys, np.array(losses, float), ones, ones.astype(int), ones.astype(int), ("a", "b"))


def tile(folder):
    return next(tile for tile in report.page(str(folder))["tiles"] if tile["label"] == "held-out loss")


@pytest.mark.parametrize("saved", [True, False], ids=["with the sums", "with the summary alone"])
@pytest.mark.parametrize("change, says", [(-0.1, "good"), (-1.2, "good"), (0.0, ""), (0.1, "bad"), (2.0, "bad")])
@pytest.mark.parametrize("spread", [0.01, 2.0])
def test_the_doctor_says_what_the_report_says(tmp_path, change, says, spread, saved):
    """A skewed interval, as of few conversations: one of them changes much more than the others."""
    draws = np.random.default_rng(3).standard_exponential(40) - 1
    draws -= draws.mean()
    first = evaluation(np.full(40, 3.0))
    last = evaluation(3.0 + change + spread * draws)
    found = held_out.compare(first, last)
    says = says if found.low * found.high > 0 else ""
    summary = {"exported_step": 30, "eval_loss_before": 3.0, "eval_loss_after": found.after,
               "difference_95": [found.low, found.high]}  # fmt: skip
    evals = [(0, 3.0, {}), (30, found.after, {})]
    folder = write_run(tmp_path / "run", losses=FLAT, evals=evals, summary=summary)
    if saved:
        first.save(folder / "evaluation-0.npz")
        last.save(folder / "evaluation-30.npz")
    shown = tile(folder)
    assert shown["class"] == says and (f"{found.low:+.4f} to {found.high:+.4f}" in shown["note"])
    assert ("chance" in shown["note"]) == (says == "")
    verdicts = {finding.rule: finding.evidence for finding in doctor.diagnose(folder)}
    assert ("loss_not_falling" in verdicts) == (says != "good"), verdicts
    assert ("validation_rising" in verdicts) == (says == "bad"), verdicts
    if says != "good":
        assert str(found) in verdicts["loss_not_falling"]


def test_a_rise_that_chance_explains_is_no_rise(tmp_path):
    """The last loss is 10 % above the lowest, of two conversations that pull apart; and so of one source."""
    summary = {"exported_step": 10}
    sources = {"eval_loss/a": 2.0, "eval_loss/b": 2.0}, {"eval_loss/a": 2.4, "eval_loss/b": 1.0}
    evals = [(0, 3, sources[0]), (10, 2.0, sources[0]), (30, 2.2, sources[1])]
    folder = write_run(tmp_path / "run", losses=FALLING, evals=evals, summary=summary)
    assert {"validation_rising"} == {finding.rule for finding in doctor.diagnose(folder)}
    noise = np.tile([-1.0, 1.0], 10)
    source = np.repeat([0, 1], 10)
    evaluation(np.full(20, 2.0), source).save(folder / "evaluation-10.npz")
    evaluation(2.2 + noise, source).save(folder / "evaluation-30.npz")
    assert doctor.diagnose(folder) == []
    evaluation(2.2 + 0.1 * noise, source).save(folder / "evaluation-30.npz")
    assert [finding.rule for finding in doctor.diagnose(folder)] == ["validation_rising"]
    (folder / "evaluation-30.npz").write_bytes(b"torn")
    assert [finding.rule for finding in doctor.diagnose(folder)] == ["validation_rising"]


def test_plain_text_is_forgotten_where_the_summary_says_so(tmp_path):
    plain = [(0, 3, {"plain_text_loss": 2.0}), (30, 2, {"plain_text_loss": 2.5})]
    folder = write_run(tmp_path / "run", losses=FALLING, evals=plain, summary={"exported_step": 30})
    assert "forgetting" in {finding.rule for finding in doctor.diagnose(folder)}
    evaluation(np.full(20, 2.0)).save(folder / "plain-text-0.npz")
    evaluation(2.5 + np.tile([-3.0, 3.0], 10)).save(folder / "plain-text-30.npz")
    assert doctor.diagnose(folder) == []


def test_one_low_first_step_is_no_rise_of_the_training_loss(tmp_path):
    noisy = [2.0, *(3 + (1.0 if step % 2 else -1.0) for step in range(99))]
    folder = write_run(tmp_path / "run", losses=noisy)
    assert "learning_rate_too_high" not in {finding.rule for finding in doctor.diagnose(folder)}
