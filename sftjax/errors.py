"""Errors a user can act on, and the exit codes that scripts can rely on.

Each carries one clear line: what is wrong, where (file, row, field), and what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
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
    """Runs a tool's `main()` and leaves with its exit code; what a user can put right becomes one line on stderr."""
    try:
        code = main() or EXIT_OK
    except UserError as error:
        code = _say(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "sftjax":
            raise
        code = _say(missing_package(error.name), EXIT_CONFIG)
    except BrokenPipeError:  # whoever read our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None or not error.strerror:
            raise
        code = _say(f"{os.fsdecode(error.filename)}: {error.strerror}", EXIT_IO)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def missing_package(module: str) -> str:
    """What to say where an optional package isn't installed: the extra of this project that has it, or its own name."""
    name = module.partition(".")[0]
    packages = {package.lower().replace("_", "-") for package in PACKAGES.get(name, [name])}
    for line in _requirements():
        package, _, condition = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
        if extra and re.split(r"[^\w.-]", package.strip())[0].lower().replace("_", "-") in packages:
            return f"the package {name} is missing: pip install 'sftjax[{extra[1]}]'"
    return f"the package {name} is missing: pip install {min(packages)}"


PACKAGES = {"lm_eval": ["lm-eval"], "sklearn": ["scikit-learn"], "yaml": ["pyyaml"]}  # not called as their modules are


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("sftjax") or []
    except importlib.metadata.PackageNotFoundError:
        return []
