"""The command line: `python -m sftjax.main --config=configs/llama7b.py [--config.train.learning_rate=1e-5]`."""

from __future__ import annotations

from sftjax.utils import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()  # before the imports, which take a second or two

import json
import sys
from collections.abc import Sequence

from absl import flags, logging

from sftjax import config as config_lib
from sftjax import config_file
from sftjax.errors import ConfigError, exit_with_message
from sftjax.phases import phase

_RESUME = flags.DEFINE_string("resume", None, "Continue this run folder, with the configuration saved in it.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Do all up to the first step, report it, and leave no trace.")
_PREFLIGHT = flags.DEFINE_string("preflight", "", "With --dry_run: write what it counted here, for tools/plan.py.")
_NEW = flags.DEFINE_bool(
    "new", False, "Use the first of RUN_DIR, RUN_DIR-2, ... that is free, or has an unfinished run of these settings."
)
_SWEEP = flags.DEFINE_string(
    "sweep", "", 'One run for each combination: "train.learning_rate=1e-5|2e-5;peft.r=8|16", compared in sweep.html.'
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where no cluster tells it.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "With --coordinator: how many processes there are.")
_PROCESS = flags.DEFINE_integer("process", -1, "With --coordinator: which of them this is, from 0.")
_ALLOW = flags.DEFINE_list("allow", [], "Differences to accept on resume, by the names that the refusal gives.")


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}: fields are set as --config.train.learning_rate=1e-5")
    config = config_file.read()
    if not (config or _RESUME.value):
        raise ConfigError("give --config=configs/NAME.py, or --resume=RUN_FOLDER")
    if _PREFLIGHT.value and not _DRY_RUN.value:
        raise ConfigError("--preflight goes with --dry_run: a run writes its preflight.json by itself")
    if _NEW.value and (_RESUME.value or _SWEEP.value):
        raise ConfigError("--new is for one run that begins: give another run_dir to a sweep, and neither to --resume")
    if _PREFLIGHT.value and _SWEEP.value:
        raise ConfigError("--preflight is for one run, not for --sweep")
    if _SWEEP.value and (_RESUME.value or not config):
        raise ConfigError("--sweep goes with --config; the same command continues a sweep")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it touches
    sys.stdout.reconfigure(line_buffering=True)  # so that it stays in order with the progress line on stderr
    with phase("starting", line=False):
        from sftjax import distributed, finished, train  # after the flags, so that --help and mistakes answer at once

    distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    options = {"allow": _ALLOW.value, "dry_run": _DRY_RUN.value}
    if _SWEEP.value:
        from sftjax import sweep

        return sweep.run(config, _SWEEP.value, **options)
    options["preflight"] = _PREFLIGHT.value
    if _RESUME.value:
        return train.resume(_RESUME.value, config=config, **options)
    if _NEW.value:
        config.run_dir = finished.next_folder(config.run_dir, json.loads(config_lib.to_json(config)))
        print(f"run folder: {config.run_dir}")
    return train.run(config, **options)


if __name__ == "__main__":
    exit_with_message(lambda: config_file.run(main))
