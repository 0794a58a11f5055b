"""Errors a user can act on, and the exit codes that scripts can rely on.

Each carries one clear line: what is wrong, where (file, row, field), and what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_OK, EXIT_DATA, EXIT_IO, EXIT_PREEMPTED, EXIT_DIVERGED, EXIT_CONFIG = 0, 65, 74, 75, 76, 78


class UserError(Exception):
    """Something the user can put right; shown without a traceback."""

    exit_code = 1


class DataError(UserError):
    """The data can't be used as it is."""

    exit_code = EXIT_DATA


class StorageError(UserError):
    """A file or folder can't be read or written."""

    exit_code = EXIT_IO


class Preempted(UserError):
    """The run was asked to stop and has saved; the same command continues it."""

    exit_code = EXIT_PREEMPTED


class Diverged(UserError):
    """Losses or gradients stayed non-finite."""

    exit_code = EXIT_DIVERGED


class ConfigError(UserError):
    """A setting, or a model's configuration, is wrong or not understood."""

    exit_code = EXIT_CONFIG


def exit_with_message(main: Callable[[], int | None]) -> None:
    """Runs a tool's `main()` and leaves with its exit code; a `UserError` becomes one line on stderr."""
    try:
        code = main() or EXIT_OK
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
