"""Encoding by words against the tokenizer itself: every character of the basic plane, and texts at random."""

import json
import pickle
import random
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sftjax.data import splitting, words
from sftjax.data.words import WordEncoder
from tests.data.tiny import CORPUS

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LETTERS_AND_REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
PATTERNS = {  # as the models' tokenizer.json files have them
    "gpt2": None,
    "smollm2": "digits",
    "llama3": (CONTRACTIONS + LETTERS_AND_REST % r"\p{N}{1,3}" + BLANKS,),
    "qwen2": (CONTRACTIONS + LETTERS_AND_REST % r"\p{N}" + BLANKS,),
    "marks": (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + BLANKS,),
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + BLANKS,
    ),
    "deepseek3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*" + BLANKS,
    ),
}


def tokenizer_of(name: str, *, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    patterns = PATTERNS[name]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=patterns in (None, "digits"))
    if patterns == "digits":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    else:
        first = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns or ()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = ["<|im_start|>", "<|im_end|>", "<|im_end|><|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=tokens, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=True, special=False)])
    return tokenizer


def encoder_of(tokenizer: Tokenizer) -> WordEncoder | None:
    return WordEncoder.of(tokenizer, json.loads(tokenizer.to_str()))


def texts_at_random(count: int) -> list[str]:
    rng = random.Random(0)
    near = "ab 1\n\t' .,!?s'll  \r\nAB\u017fK\u2014\u2019é你の"
    pieces = (
        lambda: rng.choice(near),
        lambda: rng.choice(near),
        lambda: chr(rng.randrange(128)),
        lambda: chr(rng.randrange(0x3000)),
        lambda: rng.choice("😀🏽é你𝐀\u0301\U0010f000\ue000\ufe0f"),
        lambda: rng.choice(["<|im_end|>", "<|im_start|>", "<think>", "<|im", "it's", " don't", "12345"]),
    )
    return ["".join(rng.choice(pieces)() for _ in range(rng.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_the_tokenizers(name, nfc):
    tokenizer = tokenizer_of(name, nfc=nfc)
    encoder = encoder_of(tokenizer)
    characters = [chr(number) for number in range(1 << 16) if not 0xD800 <= number < 0xE000]
    some = [c for c in characters if ord(c) < 0x600] + characters[::5]
    texts = [f"{c}a{c} {c}1{c}\n{c}  {c}.{c}{c}'{c}s " for c in some] + texts_at_random(4000) + CORPUS
    encoded = 0
    for first in range(0, len(texts), 64):
        part = texts[first : first + 64]
        wanted = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        for text, ids, encoding in zip(part, encoder.encode(part), wanted, strict=True):
            if ids is not None:
                assert ids.dtype == np.int32 and ids.tolist() == encoding.ids, ascii(text)
                encoded += 1
    assert encoded > 0.6 * len(texts)
    assert all(ids is not None for ids in encoder.encode([*CORPUS, "", "Fine \u2014 it\u2019s 2\u00bd €, 你好 😀🏽"]))


def test_texts_that_could_differ_are_left_to_the_tokenizer():
    encoder = encoder_of(tokenizer_of("llama3", nfc=True))
    left = ["e\u0301", "𝐀", "\U0010f000", "\ud800", "\u0378", "a\U000f0000b"]  # not NFC, astral letter, unassigned...
    found = encoder.encode(["a b", *left, "c d"])
    assert found[0] is not None and found[-1] is not None and found[1:-1] == [None] * len(left)


def test_a_full_store_of_words_still_encodes(monkeypatch):
    tokenizer = tokenizer_of("gpt2")
    monkeypatch.setattr(words, "_MAX_WORDS", 8)
    texts = [*CORPUS, "a" * 500]
    for text, ids in zip(texts, encoder_of(tokenizer).encode(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_words_that_were_met_go_along_to_other_processes():
    tokenizer = tokenizer_of("qwen2")
    encoder = encoder_of(tokenizer)
    wanted = encoder.encode(CORPUS)
    there = pickle.loads(pickle.dumps(encoder))
    assert there._ids == encoder._ids and len(there._ids) > 100
    texts = [*CORPUS, "words it hasn't met: zyzzyva <think>"]
    for ids, other in zip([*wanted, *encoder.encode(texts[-1:])], there.encode(texts), strict=True):
        assert np.array_equal(ids, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t.model, "dropout", 0.1),
        lambda t: t.add_tokens([AddedToken("<greedy>", lstrip=True)]),
        lambda t: setattr(
            t,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(r"(?<=a)b"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(change):
    tokenizer = tokenizer_of("gpt2")
    assert encoder_of(tokenizer) is not None
    change(tokenizer)
    assert encoder_of(tokenizer) is None


@pytest.mark.parametrize("pattern", ["a.b", "^a", r"\w+", r"[a[b]]", r"\p{Han}", r"[\p{L}&&a]", r"(?<!a)b", r"a\b"])
def test_patterns_that_are_not_known_are_refused(pattern):
    steps = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    with pytest.raises(splitting.Unsupported):
        splitting.compile_words({"type": "Sequence", "pretokenizers": [steps, level]})


def test_words_end_where_texts_do():
    pattern = splitting.compile_words({"type": "ByteLevel", "add_prefix_space": False})
    assert isinstance(pattern, re.Pattern)
    assert pattern.findall("it's  12\U0010f000 a  \U0010f001") == [
        *("it", "'s", " ", " 12", "\U0010f000", " a", "  ", "\U0010f001")
    ]
