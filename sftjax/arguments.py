"""Command lines of the tools: a mistake in one is a line and the exit code of a wrong configuration."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence

from sftjax import paths
from sftjax.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argparse parser that shows its text as it was written, and raises what it complains about.

    Raises (from `parse_args`):
      ConfigError: an argument is unknown, missing, or of another type; names the nearest that exists.
    """

    def __init__(self, description: str | None = None, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        self._given = paths.with_home(sys.argv[1:] if args is None else args)
        return super().parse_args(self._given, namespace)

    def error(self, message: str):
        message, names = " ".join(message.split()), self._spellings()
        words = {word.partition("=")[0] for word in getattr(self, "_given", ()) if word.startswith("--")}
        for word in sorted(words - set(names.values())):
            if close := difflib.get_close_matches(word.replace("-", "_"), names, n=1):
                message += f"; {word} is no option: did you mean {names[close[0]]}?"
        raise ConfigError(f"{message} ({self.prog} --help lists what there is)")

    def _spellings(self) -> dict[str, str]:
        """Every option, by its name with underscores; those of subcommands too."""
        names = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    names |= parser._spellings()
            names |= {name.replace("-", "_"): name for name in action.option_strings if name.startswith("--")}
        return names
