"""Curates a data set: quality, duplicates, benchmark leaks, personal data, balance; with a report of all of it.

    python tools/curate.py --config=configs/curate/default.py --config.sources=chats.jsonl --config.output=curated

Several sources, or ones with settings, as a Python tuple: --config.sources="('a.jsonl', 'b.parquet')". See
docs/curation.md. A run that was stopped goes on with the same command.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from sftjax import config_file
from sftjax.errors import ConfigError, exit_with_message

_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Report what would be removed, and write no rows.")


def fields() -> list[str]:
    from sftjax.curate import settings

    return settings.field_names()


def main(argv) -> int:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}: fields are set as --config.output=curated")
    config = config_file.read()
    if config is None:
        raise ConfigError("give --config=configs/curate/default.py")
    from sftjax.curate import run, settings

    chosen = settings.from_mapping(config.to_dict())
    found = run.curate(chosen, dry_run=_DRY_RUN.value, say=lambda line: print(line, file=sys.stderr, flush=True))
    for line in run.summary_lines(found):
        print(line)
    print(f"report: {chosen.output}/curation.html")
    return 0


if __name__ == "__main__":
    exit_with_message(lambda: config_file.run(main, fields))
