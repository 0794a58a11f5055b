"""The tokenizer inside a GGUF file, as the `tokenizer.json` it once was.

GGUF keeps tokens, types, merges or scores, and the *name* of the pre-tokenizer; the rules behind that name are here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sftjax.errors import ConfigError
from sftjax.weights import gguf_file

NAMED_TEMPLATES = "additional_chat_templates"  # a folder beside tokenizer.json
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = _QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
_SPLITS = {
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "dbrx": _LLAMA3, "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "gpt-4o": _GPT4O, "tekken": _TEKKEN, "seed-coder": _SEED,
}  # fmt: skip
_PLAIN = ("gpt-2", "gpt2", "olmo", "phi-2", "mpt", "granite-docling")  # GPT-2's own rule
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "exaone")  # each digit apart, then GPT-2's rule
# what llama.cpp does under "default", and where a file doesn't say: these one after another
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+",
    r"[0-9][0-9][0-9]",
)  # fmt: skip
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # take a word that is a token, whatever the merges say


def tokenizer_data(path: str | os.PathLike) -> dict[str, Any]:
    """What the file holds.

    Returns:
      model ("gpt2" byte-level BPE or "llama" SentencePiece BPE), pre, tokens, types, merges, scores, and the
      ids and flags: bos, eos, unk, pad, eot (each or None), add_bos, add_eos, add_space_prefix, chat_template,
      named_templates.
    """
    metadata = gguf_file.read(path).metadata
    get = lambda name, default=None: metadata.get(f"tokenizer.ggml.{name}", default)  # noqa: E731
    tokens = get("tokens")
    if not tokens:
        raise ConfigError(f"{path}: the GGUF file has no tokenizer")
    spm = get("model") == "llama"
    return dict(
        architecture=metadata.get("general.architecture"),
        model=get("model"),
        pre=get("pre", "default"),
        tokens=tokens,
        types=get("token_type", [1] * len(tokens)),
        merges=[tuple(merge.split(" ", 1)) for merge in get("merges", [])],
        scores=get("scores", []),
        bos=get("bos_token_id"),
        eos=get("eos_token_id"),
        unk=get("unknown_token_id"),
        pad=get("padding_token_id"),
        eot=get("eot_token_id"),
        # llama.cpp adds BOS to a SentencePiece vocabulary that doesn't say otherwise
        add_bos=bool(get("add_bos_token", spm)),
        add_eos=bool(get("add_eos_token", False)),
        add_space_prefix=bool(get("add_space_prefix", spm)),
        chat_template=metadata.get("tokenizer.chat_template"),
        named_templates={
            name: metadata[f"tokenizer.chat_template.{name}"]
            for name in metadata.get("tokenizer.chat_templates", [])
            if re.fullmatch(r"[A-Za-z0-9_]+", name) and f"tokenizer.chat_template.{name}" in metadata
        },
    )


def tokenizer_files(path: str | os.PathLike) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja, by name.

    Raises:
      ConfigError: a kind of tokenizer or pre-tokenizer that isn't known.
    """
    data = tokenizer_data(path)
    names = {role: data[key] for role, key in zip(_ROLES, ("bos", "eos", "unk", "pad"), strict=True)}
    config = {role: data["tokens"][token] for role, token in names.items() if token is not None}
    config |= {
        "add_bos_token": data["add_bos"],
        "add_eos_token": data["add_eos"],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    out = {
        "tokenizer.json": build_tokenizer(data, str(path)).to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    if data["chat_template"]:
        out["chat_template.jinja"] = data["chat_template"].encode()
    for name, text in data["named_templates"].items():
        out[f"{NAMED_TEMPLATES}/{name}.jinja"] = text.encode()
    return out


_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def build_tokenizer(data: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that gives the ids of the original."""
    if data["model"] == "gpt2":
        tokenizer = _byte_level(data, where)
    elif data["model"] == "llama":
        tokenizer = _sentencepiece(data)
    else:
        raise ConfigError(f"{where}: tokenizer.ggml.model {data['model']!r} isn't known, only 'gpt2' and 'llama'")
    tokens = data["tokens"]
    added = [
        AddedToken(tokens[i], special=kind == _CONTROL, normalized=False)
        for i, kind in enumerate(data["types"])
        if kind in (_CONTROL, _USER_DEFINED) or i in (data["unk"], data["bos"], data["eos"])
    ]
    tokenizer.add_tokens(added)
    if tokenizer.get_vocab_size() != len(tokens):
        raise ConfigError(f"{where}: {tokenizer.get_vocab_size()} different tokens of {len(tokens)}; ids would shift")
    ends = {role: data[role] for role in ("bos", "eos") if data[f"add_{role}"] and data[role] is not None}
    if ends:
        tokenizer.post_processor = _with_ends({role: (tokens[i], i) for role, i in ends.items()})
    return tokenizer


def _with_ends(ends: dict[str, tuple[str, int]]) -> processors.TemplateProcessing:
    first = [f"{ends['bos'][0]}:{{t}}"] if "bos" in ends else []
    last = [f"{ends['eos'][0]}:{{t}}"] if "eos" in ends else []
    spell = lambda letter, kind: [piece.format(t=kind) for piece in [*first, f"${letter}:{{t}}", *last]]  # noqa: E731
    return processors.TemplateProcessing(
        single=spell("A", 0), pair=spell("A", 0) + spell("B", 1), special_tokens=list(ends.values())
    )


def _byte_level(data: dict[str, Any], where: str) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(data["tokens"])}
    # Llama 3 has whole words that no sequence of merges reaches
    tokenizer = Tokenizer(models.BPE(vocab, data["merges"], ignore_merges=data["pre"] in _WHOLE_WORDS))
    pre = data["pre"]
    if pre in _PLAIN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre in _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif pre in _SPLITS or pre == "default":
        patterns = _DEFAULT if pre == "default" else [_SPLITS[pre]]
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        known = ", ".join(sorted({"default", *_PLAIN, *_DIGITS, *_SPLITS}))
        raise ConfigError(f"{where}: the pre-tokenizer {pre!r} isn't known ({known}); use the Hugging Face folder")
    if "qwen" in pre:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(data: dict[str, Any]) -> Tokenizer:
    """BPE whose merges follow from the pieces: a piece is made of any two others, the better piece first."""
    gemma = str(data["architecture"]).startswith("gemma")
    # Gemma's blanks come as blanks; SentencePiece, and so the merges, spell them "▁"
    tokens = ["▁" * len(t) if gemma and t and not t.strip(" ") else t for t in data["tokens"]]
    data["tokens"] = tokens
    # the order of Gemma's ids is that of its merges, and its scores aren't (user-defined ones all have one score)
    rank = [-i for i in range(len(tokens))] if gemma else data["scores"]
    unknown = None if data["unk"] is None else tokens[data["unk"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, _merges(vocab, rank), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if data["add_space_prefix"] else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if gemma:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    stripped = [decoders.Strip(" ", 1, 0)] if data["add_space_prefix"] else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer


def _merges(vocab: dict[str, int], rank: list[float]) -> list[tuple[str, str]]:
    found = []
    for piece, i in vocab.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in halves if left in vocab and right in vocab]
        found += [(rank[i], vocab[left], vocab[right], left, right) for left, right in pairs]
    found.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    return [(left, right) for *_, left, right in found]


# -------------------------------------------------------------------------------------------------------- writing


def write_fields(writer: gguf.GGUFWriter, files: Mapping[str, bytes], size: int, stop_ids: Sequence[int] = ()) -> None:
    """Puts the tokenizer of an HF folder into a GGUF file; the inverse of `tokenizer_data` and `build_tokenizer`.

    Args:
      files: by name.
      size: rows of the embedding; ids without a token are filled up with unused ones.
      stop_ids: tokens that end an answer.

    Raises:
      ConfigError: a tokenizer that isn't BPE, or splits text in a way without a name in llama.cpp.
    """
    if "tokenizer.json" not in files:
        raise ConfigError("the model has no tokenizer.json, and GGUF files hold the tokenizer; save it as one first")
    spec, settings = (json.loads(files.get(name, b"{}")) for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    if spec["model"].get("type") != "BPE":
        raise ConfigError("tokenizer.json: only BPE tokenizers can be written to GGUF")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    added = {entry["content"]: entry for entry in spec["added_tokens"]}
    ids = {**spec["model"]["vocab"], **{name: entry["id"] for name, entry in added.items()}}
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [_UNUSED] * size
    for token, i in ids.items():
        tokens[i], types[i] = token, _type_of(token, added, spec)
    spm = bool(spec["model"].get("byte_fallback"))
    writer.add_tokenizer_model("llama" if spm else "gpt2")
    writer.add_tokenizer_pre("default" if spm else _name_of_rule(spec))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if spm:
        writer.add_token_scores(_scores(tokens, merges))
        first = tokenizer.encode("a", add_special_tokens=False).tokens[0]
        writer.add_add_space_prefix(first.startswith("▁"))
    else:
        writer.add_token_merges(merges)
    adders = (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id)
    for role, add in zip(_ROLES, adders, strict=True):
        token = settings.get(role)
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            add(ids[token])
    eos = settings.get("eos_token")
    ends = [i for i in stop_ids if i != ids.get(eos["content"] if isinstance(eos, dict) else eos)]
    if ends:
        writer.add_eot_token_id(ends[0])
    before, after = _additions(tokenizer)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    templates = _templates(files) or settings.get("chat_template")
    if templates:
        writer.add_chat_template(templates)  # one, or a list of named ones


def _templates(files: Mapping[str, bytes]) -> str | list[dict[str, str]]:
    """The chat templates that are files, the way tokenizer_config.json has them."""
    named = {Path(name).stem: text.decode() for name, text in files.items() if name.startswith(NAMED_TEMPLATES)}
    default = files.get("chat_template.jinja", b"").decode()
    if not named:
        return default
    return [dict(name=name, template=text) for name, text in ({"default": default} | named).items()]


def _additions(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that it puts in front of and behind a text by itself."""
    plain, full = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    for cut in range(len(full) - len(plain) + 1):
        if full[cut : cut + len(plain)] == plain:
            return full[:cut], full[cut + len(plain) :]
    return [], []


def _type_of(token: str, added: dict[str, Any], spec: dict[str, Any]) -> int:
    if token == spec["model"].get("unk_token"):
        return _UNKNOWN
    if token in added:
        return _CONTROL if added[token]["special"] else _USER_DEFINED
    is_byte = spec["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
    return _BYTE if is_byte else _NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp merges the pair whose result has the best score: the earliest merge that makes a piece."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ")), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


_PROBE = (
    "Hello World, it's 12345 o'clock; DON'T we'Re THEY'LL\n\n x = foo_bar(1.5, 'a')\t# \u00e9t\u00e9 2024-01-31\r\n   "
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\ud55c\uad6d\uc5b4 \u0440\u0443\u0441 f\u00e9\u3000$3,000.00 50% <a href='x'>"
    "http://e.g/?q=1&r=2</a> iPhone4S XMLHttp \u00bd \u2163 \u0664\u0662 \U0001f600\U0001f3fd -- .. !!\n\t\n//\n end \n"
)


def _name_of_rule(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer.json splits text: the rule that splits a text of many kinds alike.

    Normalisation is left aside, since llama.cpp has none for byte-level vocabularies.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    data = dict(model="gpt2", tokens=alphabet, types=[1] * 256, merges=[], unk=None, bos=None, eos=None)
    data |= dict(add_bos=False, add_eos=False)
    bare = {**spec, "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}, "post_processor": None}
    splitter = Tokenizer.from_str(json.dumps(bare)).pre_tokenizer
    pieces = [] if splitter is None else splitter.pre_tokenize_str(_PROBE)
    whole_words = bool(spec["model"].get("ignore_merges"))
    for name in (*_PLAIN, *_DIGITS, *_SPLITS, "default"):
        theirs = build_tokenizer({**data, "pre": name}, name).pre_tokenizer
        if theirs.pre_tokenize_str(_PROBE) == pieces and (name in _WHOLE_WORDS) == whole_words:
            return name
    raise ConfigError("tokenizer.json: llama.cpp has no name (that is known here) for how it splits text")
