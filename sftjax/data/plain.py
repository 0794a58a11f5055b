"""A copy of a tokenizer that has no control tokens, whatever a text spells."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tokenizers import Tokenizer

from sftjax.errors import ConfigError

_UNREACHABLE = "\U0010fffc"  # in front of a name that no text may reach


def copies(backend: Tokenizer, control_tokens: Mapping[str, int]) -> tuple[Tokenizer, Tokenizer]:
    """Two copies with the same ids: for text at the very start, and for text behind a control token.

    Added tokens that aren't control tokens stay.
    """
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in control_tokens]
    _make_unreachable(spec["model"], control_tokens)
    first = Tokenizer.from_str(json.dumps(spec))
    _drop_first_prefix(spec.get("pre_tokenizer"))
    for token in spec["added_tokens"]:
        if first.token_to_id(token["content"]) != token["id"]:
            raise ConfigError(f"the tokenizer's added token {token['content']!r} can't be told from control tokens")
    return first, Tokenizer.from_str(json.dumps(spec))


def _make_unreachable(model: dict, names) -> None:
    """Renames pieces in a tokenizer.json model so that no text can spell them; ids stay."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # unigram; the unknown piece is found by number
        for entry in vocab:
            if entry[0] in names:
                entry[0] = _UNREACHABLE + entry[0]
        return
    keep = model.get("unk_token")  # found by name; BPE reaches it by merges only, which go away below
    model["vocab"] = {(_UNREACHABLE + t if t in names and t != keep else t): i for t, i in vocab.items()}
    if "merges" in model:
        pairs = (pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]


def _drop_first_prefix(pre_tokenizer: dict | None) -> None:
    """Metaspace's `first` scheme takes each stretch encoded alone for the first one."""
    if pre_tokenizer is None:
        return
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
