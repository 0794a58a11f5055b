"""Vocabularies of ranks: tekken.json read, tiktoken's refused with the way out."""

import base64
import json
from itertools import pairwise

import pytest
from tokenizers import Tokenizer as Backend

from sftjax.data import byte_ranks
from sftjax.data import tokenizer as tokenizers
from sftjax.errors import ConfigError
from tests.data import tiny

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "the cat sees 12 dogs",
    "  two\n\nlines\t!",
    "naïve 猫 🤖",
    "a" * 30,
    *(text.replace("<", "(").replace("[", "(") for text in tiny.CORPUS),
]


def ranks(tmp_path) -> tuple[dict[bytes, int], Backend]:
    """The byte tokens of a trained byte-level vocabulary by rank, and the tokenizer they come from."""
    saved = json.loads((tiny.byte_level(tmp_path / "source") / "tokenizer.json").read_text())
    number = {character: byte for byte, character in enumerate(byte_ranks._alphabet())}
    added = {token["content"] for token in saved["added_tokens"]}
    ordered = sorted((i, name) for name, i in saved["model"]["vocab"].items() if name not in added)
    found = {bytes(number[character] for character in name): rank for rank, (_, name) in enumerate(ordered)}
    assert {bytes([byte]) for byte in range(256)} <= set(found)
    return found, Backend.from_str(json.dumps(saved))


def tekken(path, found, *, special_tokens=None, count=32, extra=5):
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for token, rank in found.items()]
    unused = [
        {"rank": len(vocab) + i, "token_bytes": base64.b64encode(bytes([200, i, 7])).decode()} for i in range(extra)
    ]
    config = {"pattern": PATTERN, "default_vocab_size": len(vocab) + count, "default_num_special_tokens": count}
    data = {"config": config, "vocab": vocab + unused}
    path.write_text(json.dumps(data | ({"special_tokens": special_tokens} if special_tokens else {})))


def greedy(found, piece: bytes) -> list[int]:
    """Byte-pair encoding by ranks: the pair that makes the lowest rank goes first, as tiktoken does it."""
    if piece in found:
        return [found[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        pairs = [(found.get(a + b, len(found)), i) for i, (a, b) in enumerate(pairwise(parts))]
        best, at = min(pairs)
        if best == len(found):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [found[part] for part in parts]


@pytest.mark.parametrize("named", [False, True])
def test_tekken_is_byte_pair_encoding_by_ranks_behind_the_control_tokens(tmp_path, named):
    found, _ = ranks(tmp_path)
    folder = tmp_path / "mistral"
    folder.mkdir()
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)] if named else None
    tekken(folder / "tekken.json", found, special_tokens=special)
    tokenizer = tokenizers.load(folder)
    assert tokenizer.vocab_size == len(found) + 32
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix_ids) == (1, 2, (1,))
    assert tokenizer.encode("[INST]x<SPECIAL_31>") == [3, *tokenizer.encode("x"), 31]
    words = tokenizer.backend.pre_tokenizer
    number = {character: byte for byte, character in enumerate(byte_ranks._alphabet())}
    for text in TEXTS:
        pieces = [bytes(number[character] for character in piece) for piece, _ in words.pre_tokenize_str(text)]
        assert b"".join(pieces).decode() == text
        assert tokenizer.encode(text) == [32 + one for piece in pieces for one in greedy(found, piece)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tekken_that_is_no_tekken_is_one_line(tmp_path):
    (tmp_path / "tekken.json").write_text('{"config": {}}')
    with pytest.raises(ConfigError, match=r"tekken.json: not a sound tekken.json"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken"])
def test_ranks_without_their_rule_are_refused_with_the_way_out(tmp_path, name):
    found, _ = ranks(tmp_path)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in found.items()]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ConfigError, match=rf"{name} is a vocabulary in tiktoken's form.*TikTokenConverter.*tokenizer\.json"
    ):
        tokenizers.load(tmp_path)
    assert not byte_ranks.is_tiktoken(tiny.sentencepiece(tmp_path / "spm") / "tokenizer.model")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_released_tekken_files_are_what_mistral_common_makes_of_them(name):
    from pathlib import Path

    mistral_common = pytest.importorskip("mistral_common", reason="the files come with mistral-common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = Path(mistral_common.__file__).parent / "data" / name
    ours, theirs = byte_ranks.read_tekken(path)[0], Tekkenizer.from_file(path)
    assert ours.get_vocab_size() == theirs.n_words
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=True).ids == theirs.encode(text, bos=True, eos=False)
