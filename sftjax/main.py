"""The command line: `python -m sftjax.main --config=configs/llama7b.py [--config.train.learning_rate=1e-5]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from sftjax import config as config_lib
from sftjax.errors import ConfigError, exit_with_message

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg): FILE.py[:ARG].")
_RESUME = flags.DEFINE_string("resume", None, "Continue this run folder, with the configuration saved in it.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Do everything up to the first step, report it, and exit.")
_SWEEP = flags.DEFINE_string(
    "sweep", "", 'One run for each combination: "train.learning_rate=1e-5|2e-5;peft.r=8|16", compared in sweep.html.'
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where no cluster tells it.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "With --coordinator: how many processes there are.")
_PROCESS = flags.DEFINE_integer("process", -1, "With --coordinator: which of them this is, from 0.")
_ALLOW = flags.DEFINE_list("allow", [], "Differences to accept on resume, by the names that the refusal gives.")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Absl's parser, with a config field that doesn't exist answered by the nearest that does.

    Raises:
      ConfigError: a flag, a field, a value's type or the config file itself is wrong.
    """
    try:
        return flags.FLAGS(list(argv))
    except (AttributeError, KeyError, flags.Error, TypeError, ValueError) as error:
        raise ConfigError(_explain(argv, error)) from error
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"--config: {error}") from error


def _explain(argv: Sequence[str], error: Exception) -> str:
    known = config_lib.defaults()
    for argument in argv[1:]:
        if argument.startswith("--config."):
            path = argument.removeprefix("--config.").split("=")[0]
            if path not in config_lib.field_names(known):
                return config_lib.unknown_field(path, known)
    return str(error).replace("\n", " ")


def read_config():
    """The configuration with its overrides; None without --config.

    Raises:
      ConfigError: the file isn't there, or fails when it is run.
    """
    config = _CONFIG.value
    try:
        # a file that failed to load leaves an object that raises when it is used
        return None if config is None else config.lock()
    except Exception as error:  # whatever the file's own code raises
        reason = next((line.strip() for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        raise ConfigError(f"--config={flags.FLAGS['config'].config_filename}: {reason}") from error


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}: fields are set as --config.train.learning_rate=1e-5")
    config = read_config()
    if not (config or _RESUME.value):
        raise ConfigError("give --config=configs/NAME.py, or --resume=RUN_FOLDER")
    if _SWEEP.value and (_RESUME.value or not config):
        raise ConfigError("--sweep goes with --config; the same command continues a sweep")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it touches
    sys.stdout.reconfigure(line_buffering=True)  # so that it stays in order with the progress line on stderr
    from sftjax import distributed, train  # after the flags, so that --help and mistakes answer at once

    distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _RESUME.value:
        return train.resume(_RESUME.value, config=config, allow=_ALLOW.value, dry_run=_DRY_RUN.value)
    if _SWEEP.value:
        from sftjax import sweep

        return sweep.run(config, _SWEEP.value, allow=_ALLOW.value, dry_run=_DRY_RUN.value)
    return train.run(config, allow=_ALLOW.value, dry_run=_DRY_RUN.value)


def main_or_message(argv: Sequence[str]) -> None:
    exit_with_message(lambda: main(argv))


if __name__ == "__main__":
    exit_with_message(lambda: app.run(main_or_message, flags_parser=parse_flags))
