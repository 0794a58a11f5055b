"""Chat templates: the built-in ones for models that have none, and those that come with a model or in a file.

A template is Jinja text, the same that is exported as `chat_template.jinja`, so what is trained on and what any other
program renders later are the same bytes. The built-in ones (U = user, A = assistant, E = end of turn):

    chatml    <|im_start|>system\\nS<|im_end|>\\n<|im_start|>user\\nU<|im_end|>\\n<|im_start|>assistant\\nA<|im_end|>\\n
    llama2    <s>[INST] <<SYS>>\\nS\\n<</SYS>>\\n\\nU [/INST] A </s><s>[INST] U [/INST] A </s>
    llama3    <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nU<|eot_id|>...
    zephyr    <|system|>\\nS</s>\\n<|user|>\\nU</s>\\n<|assistant|>\\nA</s>\\n
    gemma     <bos><start_of_turn>user\\nS\\n\\nU<end_of_turn>\\n<start_of_turn>model\\nA<end_of_turn>\\n
    mistral   <s>[INST] S\\n\\nU [/INST] A</s>[INST] U [/INST] A</s>
    alpaca    <s>S\\n\\n### Instruction:\\nU\\n\\n### Response:\\nA</s>\\n\\n
    six       <SOT>S<EOT><SOU>U<EOU><SOA>A<EOA>

All are loops that never look ahead, so that `rendering.append_only_loop` proves them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftjax.data.sandbox import MAX_TEMPLATE_CHARS
from sftjax.errors import ConfigError

RESERVED = ("messages", "tools", "add_generation_prompt")  # variables that rendering itself gives a template

_UNKNOWN = "{{- raise_exception('this template has no role ' + message['role']) -}}"
_NO_TOOLS = (
    "{%- if message['tool_calls'] -%}{{- raise_exception('this template can write no tool calls') -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Template:
    """A template's text and what is known about it before a tokenizer is at hand.

    Attributes:
      name: built-in name, file, or "tokenizer".
      text: Jinja.
      tools_text: another text for conversations with tools (some tokenizers carry two); None: `text` serves.
      end_of_turn: the token behind an answer, where known by name; None: found by rendering a probe.
      tokens: control tokens that the template needs; those the tokenizer lacks are added to it.
      kwargs: values for its variables, where whoever renders it gives none.
      is_file: it is from a file of the user's.
    """

    name: str
    text: str
    tools_text: str | None = None
    end_of_turn: str | None = None
    tokens: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_file: bool = False


def _loop(body: str, generation: str, before: str = "") -> str:
    return (
        f"{before}{{%- for message in messages -%}}{_NO_TOOLS}{body}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{generation}{{%- endif -%}}"
    )


def _write(text: str) -> str:
    return "{{- " + text + " -}}"


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)


def _by_role(user: str, assistant: str, system: str) -> str:
    return (
        f"{{%- if message['role'] == 'user' -%}}{user}"
        f"{{%- elif message['role'] == 'assistant' -%}}{assistant}"
        f"{{%- elif message['role'] == 'system' -%}}{system}"
        f"{{%- else -%}}{_UNKNOWN}{{%- endif -%}}"
    )


_BOS = "{{- bos_token -}}"
_REMEMBER_SYSTEM = "{%- set state = namespace(system='') -%}"
_KEEP = "{%- set state.system = SYSTEM -%}"
_FORGET = "{%- set state.system = '' -%}"


def _chatml(end: str | None) -> Template:
    end = end or "<|im_end|>"
    turn = _write(f"'<|im_start|>' + message['role'] + '\\n' + message['content'] + {_quote(end)} + '\\n'")
    text = _loop(_by_role(turn, turn, turn), _write("'<|im_start|>assistant\\n'"))
    return Template("chatml", text, end_of_turn=end, tokens=("<|im_start|>", end))


def _llama2(end: str | None) -> Template:
    ending = _quote(end) if end else "eos_token"
    user = _BOS + _write("'[INST] ' + (state.system + message['content']) | trim + ' [/INST]'") + _FORGET
    system = _KEEP.replace("SYSTEM", "'<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n'")
    body = _by_role(user, _write(f"' ' + message['content'] | trim + ' ' + {ending}"), system)
    return Template("llama2", _loop(body, "", _REMEMBER_SYSTEM), end_of_turn=end, tokens=(end,) if end else ())


def _llama3(end: str | None) -> Template:
    end = end or "<|eot_id|>"
    turn = _write(
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + "
        + _quote(end)
    )
    text = _loop(
        _by_role(turn, turn, turn), _write("'<|start_header_id|>assistant<|end_header_id|>\\n\\n'"), before=_BOS
    )
    return Template("llama3", text, end_of_turn=end, tokens=("<|start_header_id|>", "<|end_header_id|>", end))


def _zephyr(end: str | None) -> Template:
    ending = _quote(end) if end else "eos_token"
    turn = _write(f"'<|' + message['role'] + '|>\\n' + message['content'] + {ending} + '\\n'")
    text = _loop(_by_role(turn, turn, turn), _write("'<|assistant|>\\n'"))
    return Template("zephyr", text, end_of_turn=end, tokens=(end,) if end else ())


def _gemma(end: str | None) -> Template:
    end = end or "<end_of_turn>"
    ending = f"{_quote(end)} + '\\n'"
    user = _write(f"'<start_of_turn>user\\n' + state.system + message['content'] | trim + {ending}") + _FORGET
    assistant = _write(f"'<start_of_turn>model\\n' + message['content'] | trim + {ending}")
    system = _KEEP.replace("SYSTEM", "message['content'] + '\\n\\n'")
    text = _loop(_by_role(user, assistant, system), _write("'<start_of_turn>model\\n'"), before=_BOS + _REMEMBER_SYSTEM)
    return Template("gemma", text, end_of_turn=end, tokens=("<start_of_turn>", end))


def _mistral(end: str | None) -> Template:
    ending = _quote(end) if end else "eos_token"
    user = _write("'[INST] ' + state.system + message['content'] + ' [/INST]'") + _FORGET
    system = _KEEP.replace("SYSTEM", "message['content'] + '\\n\\n'")
    body = _by_role(user, _write(f"' ' + message['content'] | trim + {ending}"), system)
    text = _loop(body, "", before=_BOS + _REMEMBER_SYSTEM)
    return Template("mistral", text, end_of_turn=end, tokens=(end,) if end else ())


ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


def _alpaca(end: str | None) -> Template:
    ending = _quote(end) if end else "eos_token"
    default = _write(_quote(ALPACA_SYSTEM + "\n\n"))
    before = _BOS + "{%- if messages[0]['role'] != 'system' -%}" + default + "{%- endif -%}"
    body = _by_role(
        _write("'### Instruction:\\n' + message['content'] + '\\n\\n'"),
        _write(f"'### Response:\\n' + message['content'] + {ending} + '\\n\\n'"),
        _write("message['content'] + '\\n\\n'"),
    )
    text = _loop(body, _write("'### Response:\\n'"), before)
    return Template("alpaca", text, end_of_turn=end, tokens=(end,) if end else ())


def _six(end: str | None) -> Template:
    end = end or "<EOA>"
    body = _by_role(
        _write("'<SOU>' + message['content'] + '<EOU>'"),
        _write(f"'<SOA>' + message['content'] + {_quote(end)}"),
        _write("'<SOT>' + message['content'] + '<EOT>'"),
    )
    tokens = ("<SOT>", "<EOT>", "<SOU>", "<EOU>", "<SOA>", end)
    return Template("six", _loop(body, _write("'<SOA>'")), end_of_turn=end, tokens=tokens)


BUILTIN: dict[str, Callable[[str | None], Template]] = {
    "chatml": _chatml,
    "llama2": _llama2,
    "llama3": _llama3,
    "zephyr": _zephyr,
    "gemma": _gemma,
    "mistral": _mistral,
    "alpaca": _alpaca,
    "six": _six,
}


def builtin(name: str, end_of_turn: str | None = None) -> Template:
    """A built-in template.

    Args:
      name: a key of BUILTIN.
      end_of_turn: token that ends a turn in place of the usual one (for chatml, llama3, gemma of every turn; for the
        others of the assistant's).
    """
    return BUILTIN[name](end_of_turn or None)


def find(name: str, end_of_turn: str | None = None) -> Template:
    """A template by built-in name or file. Raises ConfigError, naming the choices."""
    if name in BUILTIN:
        return builtin(name, end_of_turn)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"chat template {name!r} is neither a file nor one of the built-in {', '.join(BUILTIN)}")
    if path.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
        raise ConfigError(f"chat template {name}: {path.stat().st_size:,} bytes is more than any template needs")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat template {name} is not UTF-8 text (byte {error.start})") from None
    return Template(str(path), text, is_file=True)


def with_end_of_turn(text: str, old: str, new: str) -> str:
    """A foreign template's text with another end-of-turn token; where it writes `eos_token`, that name is set anew."""
    if old in text:
        return text.replace(old, new)
    return "{%- set eos_token = " + _quote(new) + " -%}" + text


def with_defaults(text: str, kwargs: Mapping[str, Any]) -> str:
    """A template's text with values for variables that whoever renders it doesn't give.

    They stand in the text, and not beside it, so that they are exported with it: whatever renders the template later
    gets the same without being told.
    """
    lines = []
    for name, value in kwargs.items():
        if not name.isidentifier() or name in RESERVED:
            raise ConfigError(
                f"model.template_kwargs: {name!r} can't be set: it is no variable's name, or not yours to set"
            )
        lines.append(f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n")
    return "".join(lines) + text


def _literal(value) -> str:
    """A Jinja literal. Raises ConfigError."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quote(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    raise ConfigError(f"model.template_kwargs: {value!r} is {type(value).__name__}; give text, numbers, lists or dicts")
