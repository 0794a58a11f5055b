"""`--config=FILE.py[:ARG] --config.FIELD=VALUE`: flags, and the file behind them, with mistakes told in one line."""

from __future__ import annotations

import difflib
import importlib.util
import linecache
import os
import re
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from sftjax import config as config_lib
from sftjax import paths
from sftjax.errors import ConfigError, exit_with_message

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg): FILE.py[:ARG].")

_WRONG_TYPE = (  # as ml_collections says it
    r"Could not override field '(\w+)' \(reference\)\. (.*) is of original type <class '(\w+)'> "
    r"and cannot be casted to type <class '(\w+)'>"
)
Fields = Callable[[], Sequence[str]]  # asked for only where something is wrong


def training_fields() -> list[str]:
    """The names of all settings of a training run."""
    return config_lib.field_names(config_lib.defaults())


def parser(fields: Fields = training_fields) -> Callable[[Sequence[str]], list[str]]:
    """Absl's flags parser, with a config field or flag that doesn't exist answered by the nearest that does.

    Args:
      fields: names of the settings that there are.

    The parser raises:
      ConfigError: a flag, a field, a value's type or the config file itself is wrong.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        argv = paths.with_home(argv)
        if (named := _named(argv)) is not None:
            load(named, fields)  # absl's own reading of it loses what went wrong, and where
        try:
            return flags.FLAGS(argv)
        except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError, flags.Error) as error:
            raise ConfigError(_explain(argv, error, fields)) from error

    return parse


def run(main: Callable[[Sequence[str]], int], fields: Fields = training_fields) -> None:
    """Runs a program's `main(argv)` with its flags parsed; ends with its exit code."""
    app.run(lambda argv: exit_with_message(lambda: main(argv)), flags_parser=parser(fields))


def read() -> ml_collections.ConfigDict | None:
    """The configuration with its overrides; None without --config."""
    return None if _CONFIG.value is None else _CONFIG.value.lock()


def load(named: str, fields: Fields = training_fields) -> ml_collections.ConfigDict:
    """What `get_config` of a file gives.

    Args:
      named: FILE.py or FILE.py:ARG.

    Raises:
      ConfigError: the file isn't there, isn't Python, fails when it is run, or gives no configuration.
    """
    path, *arguments = named.split(":", 1)
    module = _run(path, fields)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"--config={path}: it has no function get_config(arg), which gives the configuration")
    try:
        config = module.get_config(*arguments)
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        raise ConfigError(_where(path, error, fields)) from error
    if not isinstance(config, ml_collections.ConfigDict):
        kind = "nothing" if config is None else f"a {type(config).__name__}"
        raise ConfigError(f"--config={path}: get_config returns {kind}, and not the configuration (a ConfigDict)")
    return config


def _run(path: str, fields: Fields) -> ModuleType:
    if not path:
        raise ConfigError("--config is empty: give FILE.py")
    if os.path.isdir(path):
        raise ConfigError(f"--config={path}: this is a folder; give a file of Python in it, {path.rstrip('/')}/NAME.py")
    if not os.path.exists(path):
        raise ConfigError(f"--config={path}: there is no such file")
    if not path.endswith(".py"):
        hint = "--resume=RUN_FOLDER continues a run with its own; " if os.path.basename(path) == "config.json" else ""
        raise ConfigError(
            f"--config={path}: a configuration is a Python file (NAME.py) with get_config(arg), not "
            f"{os.path.splitext(path)[1] or 'this'}: {hint}start from a copy of configs/smollm2_135m.py"
        )
    spec = importlib.util.spec_from_file_location("config_of_a_run", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(_where(path, error, fields)) from error
    return module


def _where(path: str, error: BaseException, fields: Fields) -> str:
    """FILE:LINE and what is wrong there, in one line."""
    if isinstance(error, OSError) and not _lines(path, error):
        return f"{path}: can't be read ({error.strerror})"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {error.msg}: {(error.text or '').strip()[:100]}"
    numbers = _lines(path, error)
    place = f"{path}:{numbers[-1]}" if numbers else path
    missing = re.match(r"""["']?Key ["'](\w+)["'] does not exist""", str(error).strip("'\" "))
    if missing:
        source = linecache.getline(os.path.abspath(path), numbers[-1]) if numbers else ""
        dotted = re.search(rf"\w+\.((?:\w+\.)*{missing[1]})\b", source)
        return f"{place}: {config_lib.no_field(dotted[1] if dotted else missing[1], fields())}"
    if isinstance(error, ImportError):
        return f"{place}: {error}: install it, or leave it out of the configuration"
    if isinstance(error, TypeError) and not numbers:
        return f"{path}: get_config has to take the text behind the colon, get_config(arg): {_short(error)}"
    return f"{place}: {type(error).__name__}: {_short(error)}"


def _lines(path: str, error: BaseException) -> list[int]:
    """Line numbers of the file that led to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = re.sub(_WRONG_TYPE, r"\1: \2 is of type \3, and has to be of type \4", text)
    return text if len(text) <= 200 else text[:197] + "..."


def _named(argv: Sequence[str]) -> str | None:
    """The value of --config, of several the last, which counts; None without one."""
    found = None
    for position, argument in enumerate(argv[1:], 1):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            found = value if equals else next(iter(argv[position + 1 : position + 2]), "")
    return found


def _explain(argv: Sequence[str], error: Exception, fields: Fields) -> str:
    names = fields()
    start = "--config."
    settings = [argument.removeprefix(start).partition("=") for argument in argv if argument.startswith(start)]
    if settings and _named(argv) is None:
        return f"--config.{settings[0][0]}: give --config=FILE.py as well, which it changes"
    for path, _, value in settings:
        if any(name.startswith(f"{path}.") for name in names):
            return f"--config.{path}={value}: that is a group of settings; set one in it, --config.{path}.NAME=VALUE"
        if path.partition("[")[0] not in names:
            return config_lib.no_field(path, names)
        if f"config.{path}" in str(error) or f"'{path.rpartition('.')[2]}'" in str(error):
            return f"--config.{path}={value}: {_short(error).removeprefix(f'flag --config.{path}={value}: ')}"
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        if close := difflib.get_close_matches(name.replace("-", "_"), list(flags.FLAGS), n=1, cutoff=0.75):
            return f"there is no flag --{name}; did you mean --{close[0]}?"
        nearest = config_lib.nearest_field(name.removeprefix("config."), names)
        return f"there is no flag --{name}; settings are given as --config.NAME=VALUE" + (
            f": did you mean {nearest}?" if nearest else ""
        )
    return _short(error)
