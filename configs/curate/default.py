"""All of curation with its defaults; sftjax/curate/settings.py says what each field is.

Copy it, or set fields on the command line: --config.sources=chats.jsonl --config.output=curated
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from sftjax.curate.settings import Settings


def get_config(arg: str = ""):
    config = ConfigDict(asdict(Settings()))
    if arg:
        config.quality.preset = arg  # configs/curate/default.py:guide
    return config.lock()
