"""The schema: locked, close misspellings answered, fields checked against each other."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sftjax import config as config_lib
from sftjax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def valid():
    config = config_lib.defaults()
    config.model.path = "model"
    config.data.train = ("a.jsonl",)
    return config


def test_defaults_are_valid_once_model_and_data_are_named():
    config_lib.check(valid(), num_devices=8)
    with pytest.raises(ConfigError, match=r"model\.path is empty.*data\.train is empty"):
        config_lib.check(config_lib.defaults(), num_devices=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.max_length", 1000, "multiple of 128: use 1024"),
        ("data.packing", "best", "choose one of first_fit"),
        ("train.batch_size", 12, "make train.batch_size a multiple of 8"),
        ("train.gradient_accumulation_steps", 3, "not divisible by train.gradient_accumulation_steps=3"),
        ("train.batch_tokens", 100, "less than one sequence"),
        ("mesh.tensor", 3, "does not cover 8 devices"),
        ("mesh.data", -1, "only one mesh axis may be -1"),
        ("eval.early_stopping_patience", 2, "needs eval.eval_steps"),
        ("peft.r", 0, "peft.r=0"),
        ("peft.quantization", "nf4", "choose a peft.method"),
        ("peft.bottleneck_activation", "swish", "choose one of relu"),
        ("train.decay_ratio", 1.5, r"train\.decay_ratio=1\.5 is not in"),
        ("data.static_lengths", 0, r"data\.static_lengths=0 is not in \[1, inf\)"),
        ("train.loss_reduction", "mean", "choose one of token, example"),
    ],
)
def test_each_mistake_names_its_field_and_the_remedy(field, value, message):
    config = valid()
    group, name = field.split(".")
    config[group][name] = value
    with pytest.raises(ConfigError, match=message):
        config_lib.check(config, num_devices=8)


def test_json_round_trip_and_an_unknown_field():
    config = valid()
    config.train.learning_rate = 1e-3
    config.data.train = ("a.jsonl", "b.jsonl")
    again = config_lib.from_json(config_lib.to_json(config))
    assert again.to_dict() == config.to_dict()
    values = json.loads(config_lib.to_json(config))
    values["train"]["lerning_rate"] = 1.0
    with pytest.raises(ConfigError, match=r"'train\.lerning_rate'; did you mean 'train\.learning_rate'"):
        config_lib.from_json(json.dumps(values))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sftjax.main", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/llama7b.py", "--config.train.lerning_rate=1"], "did you mean 'train.learning_rate'"),
        (["--config=configs/llama7b.py", "--config.train.learning_rate=fast"], "learning_rate"),
        (["--config=configs/missing.py"], "missing.py"),
        ([], "--config=configs/NAME.py"),
        (["--config=configs/llama7b.py", "--dryrun"], "dry_run"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_78(arguments, message):
    done = command(*arguments)
    assert done.returncode == 78, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_config_file_is_valid_on_one_device_and_on_eight(path):
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)  # what config_flags does with it
    for devices in (1, 8):
        config = scope["get_config"]()
        if config_lib.rows_per_step(config) // config.train.gradient_accumulation_steps % devices:
            continue  # made for one device: a sequence or a few at a time
        config_lib.check(config, num_devices=devices)


@pytest.mark.parametrize(
    "field, value",
    [
        ("run_dir", " "),
        ("train.learning_rate", math.inf),
        ("train.learning_rate", math.nan),
        ("train.learning_rate", -1e-5),
        ("train.weight_decay", math.inf),
        ("train.adam_beta2", 1.0),
        ("train.logging_steps", 0),
        ("peft.lora_alpha", math.nan),
        ("model.residual_dropout", 1.0),
        ("eval.top_p", 0.0),
        ("checkpoint.save_steps", -1),
    ],
)
def test_numbers_that_cannot_be_are_named_with_what_they_may_be(field, value):
    settings = valid()
    settings.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=re.escape(field)) as refused:
        config_lib.check(settings, num_devices=1)
    assert "is not in" in str(refused.value) or "is empty" in str(refused.value)


def test_each_range_is_of_a_field_and_holds_its_default():
    assert set(config_lib.RANGES) <= set(config_lib.field_names(config_lib.defaults()))
    config_lib.check(valid(), num_devices=1)


def test_variables_of_a_template_are_a_field_whatever_is_in_them():
    config = config_lib.defaults()
    config.model.path, config.data.train = "model", ("data.jsonl",)
    config.model.template_kwargs = {"enable_thinking": False}
    config_lib.check(config, num_devices=1)
    again = config_lib.from_json(config_lib.to_json(config))
    assert again.model.template_kwargs.to_dict() == {"enable_thinking": False}
