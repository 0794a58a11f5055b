"""Arguments of the tools that show rows as training would see them: the settings of a run, by the same names."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sftjax.errors import ConfigError

_ENCODING = (
    "format", "train_on", "system", "fold_system", "on_mask_error", "control_text", "close_thoughts", "allow_lost"
)  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """Adds them to a tool's parser."""
    parser.add_argument(
        "--template", default="", help="chat template: built-in name or file (default: the model's own)"
    )
    parser.add_argument("--end_of_turn", default="", help="token that ends an answer, in place of the template's")
    parser.add_argument("--template_kwargs", default="{}", help="the template's variables as a JSON object")
    parser.add_argument("--format", default="auto", help="of the rows (default: recognised)")
    parser.add_argument("--fields", nargs="*", default=(), help="names of columns, as question=ask answer=reply")
    parser.add_argument("--train_on", default="all", choices=("all", "last", "weights"))
    parser.add_argument("--system", default="", help="system text of conversations that have none")
    parser.add_argument("--fold_system", action="store_true", help="write it in front of the first user message")
    parser.add_argument("--on_mask_error", default="unroll", choices=("unroll", "drop", "raise"))
    parser.add_argument("--control_text", default="plain", choices=("plain", "error"))
    parser.add_argument("--close_thoughts", action="store_true", help="train an empty thought where a prompt opens one")
    parser.add_argument(
        "--allow_lost", nargs="+", default=(), help="parts that a template may leave out: reasoning, ..."
    )


def template(args: argparse.Namespace) -> dict[str, Any]:
    """What `loading.open_model` takes. Raises ConfigError."""
    try:
        kwargs = json.loads(args.template_kwargs)
    except ValueError as error:
        raise ConfigError(f"--template_kwargs {args.template_kwargs!r} is not JSON ({error})") from None
    if not isinstance(kwargs, dict):
        raise ConfigError(f"--template_kwargs {args.template_kwargs!r} is not a JSON object")
    return {"chat_template": args.template, "end_of_turn": args.end_of_turn, "template_kwargs": kwargs}


def encoding(args: argparse.Namespace) -> dict[str, Any]:
    """What `encode.encoder_of` takes. Raises ConfigError."""
    for pair in args.fields:
        if "=" not in pair:
            raise ConfigError(f"--fields {pair}: give NAME=COLUMN, as question=ask")
    fields = dict(pair.split("=", 1) for pair in args.fields)
    return {"fields": fields, **{name: getattr(args, name) for name in _ENCODING}}
