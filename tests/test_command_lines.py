"""Mistakes in a command line, a config file or a template: one line that says where, and the exit code 78."""

import os
import subprocess
import sys

import pytest

from sftjax import aliases, arguments, config_file, errors
from sftjax import config as config_lib
from sftjax.errors import ConfigError
from tests.data import tiny
from tests.tiny_run import ROOT

FIELDS = config_lib.field_names(config_lib.defaults())
START = "from sftjax.config import defaults\ndef get_config(arg=''):\n    c = defaults()\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", START + "    c.train.lr = 3\n    return c\n", "a.py:4: .*no field 'train.lr'.*'train.learning_rate'"),
        ("a.py", START + "    c['train']['lr'] = 3\n    return c\n", "a.py:4: .*no field 'lr'.*'train.learning_rate'"),
        ("a.py", START + "    c.train.batch_size = 'x'\n    return c\n", "a.py:4: .*batch_size: x is of type str"),
        ("a.py", START + "    return f(c)\n\ndef f(c):\n    return 1 / 0\n", "a.py:7: ZeroDivisionError"),
        ("a.py", START + "    return default\n", "a.py:4: NameError: name 'default' is not defined"),
        ("a.py", START + "    return c.trian\n", "a.py:4: AttributeError.*train"),
        ("a.py", "def get_config(arg='')\n    pass\n", r"a.py:1: .*get_config\(arg=''\)"),
        ("a.py", "import nothing_of_that_name\n", "a.py:1: No module named 'nothing_of_that_name'"),
        ("a.py", "from sftjax.config import defalts\n", "a.py:1: cannot import name 'defalts'"),
        ("a.py", "raise SystemExit('no')\n", "a.py:1: SystemExit: no"),
        ("a.py", "open('no-such-file')\n", "a.py:1: FileNotFoundError.*no-such-file"),
        ("a.py", "x = 1\n", "no function get_config"),
        ("a.py", "def get_config(arg=''):\n    pass\n", "returns nothing"),
        ("a.py", "def get_config(arg=''):\n    return {}\n", "returns a dict"),
        ("a.py:x", START.replace("arg=''", "") + "    return c\n", "a.py: get_config has to take the text"),
        ("a.py", "\0", "a.py: .*null bytes"),
        ("a.yaml", "model:\n  path: x\n", "a configuration is a Python file.*configs/smollm2_135m.py"),
        ("config.json", "{}", "--resume=RUN_FOLDER"),
        ("folder/", None, "this is a folder"),
        ("missing.py", None, "no such file"),
        ("", None, "--config is empty"),
    ],
)
def test_a_config_file_s_mistake_is_one_line_with_its_place(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name.partition(":")[0]).write_text(text)
    elif name.endswith("/"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=message) as refusal:
        config_file.load(name)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_a_configuration_that_did_not_start_from_the_defaults_is_told_what_is_missing():
    import ml_collections

    with pytest.raises(ConfigError, match=r"must start|has to start from sftjax\.config\.defaults"):
        config_lib.check(ml_collections.ConfigDict({"train": {"learning_rate": 1.0}}), num_devices=1)
    loose = config_lib.defaults().unlock()
    loose.train.lr = 1.0
    with pytest.raises(ConfigError, match=r"'train\.lr'; did you mean 'train\.learning_rate'"):
        config_lib.check(loose, num_devices=1)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train.lr", "'train.learning_rate'"),
        ("lr", "'train.learning_rate'"),
        ("train.per_device_train_batch_size", "train.batch_size (over all"),
        ("batch_size", "'train.batch_size'"),
        ("data.batch_size", "'train.batch_size'"),
        ("train.num_epochs", "'train.num_train_epochs'"),
        ("data.max_seq_length", "'data.max_length'"),
        ("train.max_length", "'data.max_length'"),
        ("peft.lora_r", "'peft.r'"),
        ("adapter.r", "'peft.r'"),
        ("data.overlong", "'data.over_length'"),
        ("data.max_dropped", "'data.max_dropped_fraction'"),
        ("model.dtype", "model.params_dtype"),
        ("output-dir", "'run_dir'"),
        ("load_in_4bit", "peft.quantization='nf4'"),
        ("trian.learning_rate", "'train.learning_rate'"),
        ("train.zzz", ""),
    ],
)
def test_a_field_of_another_trainer_is_answered_by_ours(given, meant):
    message = config_lib.unknown_field(given, config_lib.defaults())
    assert (f"did you mean {meant}" in message) if meant else ("did you mean" not in message)


def test_the_aliases_are_no_fields_themselves():
    assert not set(aliases.ALIASES) & set(FIELDS)


def test_an_option_that_does_not_exist_is_answered_by_the_nearest(capsys):
    parser = arguments.Parser(description="A tool.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--n", type=int)
    for line, message in (
        (["--modle", "x"], "--modle is no option: did you mean --model"),
        (["--model=x", "--zzz"], "unrecognized arguments: --zzz"),
        (["--model=x", "--n=many"], "argument --n: invalid int value: 'many'"),
    ):
        with pytest.raises(ConfigError, match=message) as refusal:
            parser.parse_args(line)
        assert "\n" not in str(refusal.value)
    assert capsys.readouterr() == ("", "")


def tool(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tools/score.py", "--modle", "x"], "did you mean --model"),
        (["tools/synthesize.py", "distil"], "distill"),
        (["tools/plan.py", "--config=configs", "--topology=cpu"], "this is a folder"),
        (["tools/plan.py", "--config=configs/llama7b.py", "--topolgy=cpu"], "did you mean --topology"),
        (["tools/curate.py", "--config=pyproject.toml"], "a configuration is a Python file"),
        (["tools/curate.py", "--config=configs/curate/default.py", "--config.near.mod=1"], "'near.mode'"),
        (["-m", "sftjax.main", "--config=configs/llama7b.py", "--lr=1e-4"], "did you mean 'train.learning_rate'"),
        (["-m", "sftjax.main", "--config=configs/llama7b.py", "--config.train=3"], "group of settings"),
        (["-m", "sftjax.main", "--config.train.learning_rate=3"], "give --config=FILE.py as well"),
    ],
)
def test_every_program_says_it_in_one_line_and_leaves_with_78(arguments, message):
    done = tool(*arguments)
    assert done.returncode == 78 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if x %}", "own.jinja: line 1: Unexpected end"),
        ("\n{{ foo( }}", "own.jinja: line 2: "),
        ("{% for m in messages %}\n{{ m.content.a.b }}{% endfor %}", r"own.jinja' fails .* \(line 2\)"),
    ],
)
def test_a_broken_template_is_named_with_its_line(tmp_path, template, message):
    from sftjax.data import tokenizer

    folder = tiny.byte_level(tmp_path / "tokenizer")
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(ConfigError, match=message) as refusal:
        tokenizer.load(folder, chat_template=str(tmp_path / "own.jinja"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModuleNotFoundError("No module named 'starlette'", name="starlette"), 78, "sftjax[serve]"),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), 78, "pip install a"),
        (PermissionError(13, "Permission denied", "some/file"), 74, "some/file: Permission denied"),
    ],
)
def test_what_a_user_can_put_right_is_a_line_whoever_raises_it(capsys, error, code, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        errors.exit_with_message(main)
    said = capsys.readouterr().err
    assert end.value.code == code and message in said and len(said.splitlines()) == 1


def test_errors_of_our_own_keep_their_traceback():
    def main():
        raise ModuleNotFoundError("No module named 'sftjax.nothing'", name="sftjax.nothing")

    with pytest.raises(ModuleNotFoundError):
        errors.exit_with_message(main)
