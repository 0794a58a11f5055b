"""Curates a data set: quality, duplicates, benchmark leaks, personal data, balance; with a report of all of it.

    python tools/curate.py --config=configs/curate/default.py --config.sources=chats.jsonl --config.output=curated

Several sources, or ones with settings, as a Python tuple: --config.sources="('a.jsonl', 'b.parquet')". See
docs/curation.md. A run that was stopped goes on with the same command.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from ml_collections import config_flags

from sftjax.errors import ConfigError, exit_with_message

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg): FILE.py[:ARG].")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Report what would be removed, and write no rows.")


def parse_flags(argv):
    try:
        return flags.FLAGS(list(argv))
    except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError, flags.Error) as error:
        raise ConfigError(str(error).replace("\n", " ")) from error


def read_config() -> dict:
    if _CONFIG.value is None:
        raise ConfigError("give --config=configs/curate/default.py")
    try:
        return _CONFIG.value.to_dict()
    except Exception as error:  # whatever the file's own code raises; one that isn't there raises here too
        reason = next(line.strip() for line in [*str(error).splitlines()[::-1], type(error).__name__] if line.strip())
        raise ConfigError(f"--config={flags.FLAGS['config'].config_filename}: {reason}") from error


def main(argv) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}: fields are set as --config.output=curated")
    config = read_config()
    from sftjax.curate import run, settings

    chosen = settings.from_mapping(config)
    found = run.curate(chosen, dry_run=_DRY_RUN.value, say=lambda line: print(line, file=sys.stderr, flush=True))
    for line in run.summary_lines(found):
        print(line)
    print(f"report: {chosen.output}/curation.html")
    return 0


if __name__ == "__main__":
    exit_with_message(lambda: app.run(lambda argv: exit_with_message(lambda: main(argv)), flags_parser=parse_flags))
