"""The models that a server has: named ones, and adapters that share the weights of the one in front of them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from sftjax import loading
from sftjax.errors import ConfigError
from sftjax.generate.sample import Generator, encode_prompt, in_compute_dtype


@dataclasses.dataclass
class Served:
    """A model under its name.

    Attributes:
      context: positions that prompt and answer may fill together.
      created: seconds since 1970.
    """

    name: str
    generator: Generator
    context: int
    created: int

    def __post_init__(self):
        self._token_text = functools.lru_cache(1 << 16)(self._decode_token)

    def encode(self, prompt) -> list[int]:
        return encode_prompt(self.generator.tokenizer, prompt)

    def token_text(self, token: int) -> str:
        """What a token writes in the middle of a text; control tokens by name; "\\ufffd" for part of a character."""
        return self._token_text(token)

    def _decode_token(self, token: int) -> str:
        decode = self.generator.tokenizer.decode
        anchor = self.generator.tokenizer.encode("a")[-1:]  # some tokenizers take the first token's blank away
        return decode([*anchor, token])[len(decode(anchor)) :]


def load(
    wanted: Sequence[tuple[str, str]], *, dtype: str, batch_size: int, steps: int, max_length: int | None
) -> dict[str, Served]:
    """Loads what the command line names, in its order.

    Args:
      wanted: ("model" or "adapter", "[NAME=]PATH"); an adapter belongs to the model in front of it.
      dtype: "auto": float32 on a CPU, bfloat16 elsewhere.
      max_length: positions at most; None: what the model has.

    Raises:
      ConfigError: two of one name; an adapter without model; and what `loading` raises.
    """
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    plan = _plan(wanted)
    served: dict[str, Served] = {}
    base = None
    for kind, name, path in plan:
        if kind == "model":
            model = loading.load_model(path, dtype=dtype)
            variables = in_compute_dtype(model.variables, dtype)  # here, so that adapters share the result
            base = model = dataclasses.replace(model, variables=variables)
        else:
            model = loading.load_adapter(base, path)
        generator = Generator(
            model.config, model.runtime, model.variables, model.tokenizer, batch_size=batch_size, steps=steps
        )
        context = min(model.config.max_position, max_length or model.config.max_position)
        served[name] = Served(name, generator, context, int(time.time()))
    return served


def _plan(wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(kind, name, path) of each; checked before anything is loaded."""
    plan = []
    for kind, text in wanted:
        name, separator, path = text.partition("=")
        if not separator or "/" in name:
            name, path = Path(text).name, text
        if not name or not path:
            raise ConfigError(f"--{kind} {text}: give NAME=DIR or DIR")
        if kind == "adapter" and not plan:
            raise ConfigError(f"--adapter {text}: put it behind the --model that it belongs to")
        if name in [other for _, other, _ in plan]:
            raise ConfigError(f"--{kind} {text}: there are two named {name!r}; give one another name with NAME=DIR")
        plan.append((kind, name, path))
    return plan
