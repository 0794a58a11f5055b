"""Byte-level vocabularies that come as ranks, without merges: Mistral's `tekken.json`, tiktoken's text files.

Both give the bytes of each token and its rank; a merge is whatever two tokens put together make a third, in the order
of that one's rank. The result is the byte-level BPE that a `tokenizer.json` of the same model holds.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from sftjax.errors import ConfigError

MAX_FILE_BYTES = 64 * 2**20
# Of the first tekken files, which name no control tokens; those up to the vocabulary's start are fillers.
_TEKKEN_CONTROL = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]


def read_tekken(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer of a `tekken.json`, and the names of its special tokens by role.

    Control tokens have the first ids, `config.default_num_special_tokens` of them; then come the byte tokens.

    Raises:
      ConfigError: the file isn't sound.
    """
    try:
        data = json.loads(_read(path))
        config = data["config"]
        count, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        listed = data.get("special_tokens")
        named = [token["token_str"] for token in sorted(listed, key=lambda t: t["rank"])] if listed else _TEKKEN_CONTROL
        control = [*named, *(f"<SPECIAL_{number}>" for number in range(len(named), count))][:count]
        ranks = {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in data["vocab"][: size - count]}
        tokenizer = build({token: rank + count for token, rank in ranks.items()}, str(config["pattern"]), control)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a sound tekken.json ({error}); fetch it again") from error
    if "<s>" in control:
        beginning = ("<s>", control.index("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s>:0 $A:0", pair="<s>:0 $A:0 $B:0", special_tokens=[beginning]
        )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return tokenizer, {role: name for role, name in roles.items() if name in control}


def build(ranks: Mapping[bytes, int], pattern: str, control: Sequence[str]) -> Tokenizer:
    """Byte-level BPE.

    Args:
      ranks: `{bytes of a token: its id}`; ids ascend with the rank.
      pattern: the regular expression of the words that are encoded each by itself.
      control: control tokens, from id 0.
    """
    alphabet = _alphabet()
    spelled = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        merges += [
            (spelled[left], spelled[right]) for left, right in sorted(pairs, key=lambda p: (ranks[p[0]], ranks[p[1]]))
        ]
    vocab = {name: number for number, name in enumerate(control)}
    vocab |= {spelled[token]: number for token, number in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return tokenizer


def is_tiktoken(path: Path) -> bool:
    """Whether a file is a list of `<base64> <rank>` lines."""
    with open(path, "rb") as file:
        start = file.readline(1000).split()
    try:
        return len(start) == 2 and start[1].isdigit() and bool(base64.b64decode(start[0], validate=True))
    except ValueError:
        return False


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes are too many for a tokenizer")
    return path.read_text(encoding="utf-8")


def _alphabet() -> list[str]:
    """The character that stands for each byte: itself where it shows, else the next one from 256 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in shown else next(rest)) for byte in range(256)]
