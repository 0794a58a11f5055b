"""Tokenizers of every kind a model folder may hold: ids, stop tokens, control tokens as text, files."""

import json
import pickle
import random
import time

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend

from sftjax.data import templates, tokenizer_export
from sftjax.data import tokenizer as tokenizers
from sftjax.data.control import ControlText
from sftjax.errors import ConfigError
from tests.data.tiny import CHATML, CORPUS, byte_level, chat, sentencepiece, write_files


def lines(count: int = 1000) -> list[str]:
    """Lines of code, CJK, leading and inner blanks, tabs, emoji, bytes that no piece covers."""
    rng = random.Random(0)
    found = [line for text in CORPUS for line in text.split("\n")]
    rng.shuffle(found)
    found = found[: count - 300]
    found += [" " * n + "return x" for n in range(60)] + ["x" + " " * n + "= 1" for n in range(40)] + ["", " ", "   "]
    found += ["\t\tif x:", "你好 世界", "  안녕", "\u3000全角", "😀🏽 ok", "a\u00a0b", "ﬁ½", "=" * 9, "-" * 13]
    return found + ["".join(rng.choice("  ab\t_./x你好é=") for _ in range(rng.randint(1, 40))) for _ in range(190)]


BPE_OPTIONS = [
    {},
    {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
    {"byte_fallback": False, "split_digits": True},
]


@pytest.mark.parametrize("options", BPE_OPTIONS)
def test_sentencepiece_bpe_gives_the_processors_ids(tmp_path, options):
    folder = sentencepiece(tmp_path, "bpe", **options)
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = tokenizers.load(folder)
    for line in [*lines(), "a <s> b </s>", "</s>"]:
        assert tokenizer.encode_plain(line) == processor.encode(line), repr(line)
        if options.get("byte_fallback", True):  # the unknown piece is written otherwise
            assert tokenizer.hf.decode(processor.encode(line)) == processor.decode(processor.encode(line)), repr(line)


@pytest.mark.parametrize("options", BPE_OPTIONS)
def test_sentencepiece_unigram_gives_the_processors_ids_up_to_ties(tmp_path, options):
    folder = sentencepiece(tmp_path, "unigram", **options)
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = tokenizers.load(folder)
    ties = 0
    for line in [*lines(), "a <s> b </s>"]:
        ours, theirs = tokenizer.encode_plain(line), processor.encode(line)
        if ours != theirs:  # the same pieces in another order: equal scores, told apart by float32 rounding alone
            ties += 1
            assert sum(map(processor.get_score, ours)) == pytest.approx(sum(map(processor.get_score, theirs)), abs=1e-3)
    assert ties <= 15


def test_text_that_spells_control_tokens_stays_text(tmp_path):
    """10,000 contents with every control token somewhere: none of its ids comes out, and the text does."""
    rng = random.Random(1)
    for folder in (byte_level(tmp_path / "bpe", kind="thinking"), sentencepiece(tmp_path / "spm")):
        tokenizer = tokenizers.load(folder)
        names, control = list(tokenizer.control_tokens), set(tokenizer.control_tokens.values())
        assert len(names) >= 3
        contents = [
            "".join(rng.choice([*names, "a", " ", "\n", "你", "<|", "|>", "<s"]) for _ in range(rng.randint(1, 8)))
            for _ in range(5000)
        ]
        hidden = [tokenizer.hide_control_tokens(text) for text in contents]
        for text, cover, ids in zip(contents, hidden, tokenizer.encode_ids(contents, hidden), strict=True):
            assert not control & set(ids), text
            assert folder.name == "spm" or tokenizer.decode(ids) == text
            assert tokenizer.unhide_control_tokens(cover) == text


def test_blanks_and_html_that_a_vocabulary_lists_as_added_are_text(tmp_path):
    from tokenizers import AddedToken, Tokenizer

    folder = byte_level(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken(name, special=False) for name in ("\n\n", "<h1>", "</table>", "<turn>")])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = tokenizers.load(folder)
    assert set(tokenizer.control_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<turn>"}


def test_thousands_of_control_tokens_cost_no_time():
    names = [f"<unused{i}>" for i in range(6000)] + ["<eos>", "<think>"]
    control = ControlText(names, ["<think>"])
    text = "a < b <unused17><unused5999> <<eos> <think>" * 2000
    start = time.process_time()
    hidden = control.hide(text)
    assert len(hidden) == len(text) and control.unhide(hidden) == text and "unused" not in hidden
    assert time.process_time() - start < 2
    assert "<think>" in control.hide(text, answer=True) and "<think>" not in hidden


@pytest.mark.parametrize("names", [["aaab", "ab"], ["<a>", "<<b>"], [chr(65 + i) + "x>" for i in range(40)] + ["<>"]])
def test_a_control_token_is_found_wherever_it_begins(names):
    control = ControlText(names)
    for before in ("", "a", "aa", "<", "<<", "<<<", "A", "Ax"):
        for name in names:
            text = f"{before}{name} and"
            hidden = control.hide(text)
            first = min(text.find(other) for other in names if other in text)
            assert hidden[first] != text[first] and control.unhide(hidden) == text, text
    assert len(names) > 2 or not control.possible("nothing of that kind")


def test_missing_pad_and_pad_equal_to_eos_are_fine(tmp_path):
    none = tokenizers.load(byte_level(tmp_path / "none", pad_token=None))
    same = tokenizers.load(byte_level(tmp_path / "same", pad_token="<|im_end|>"))
    assert none.pad_id == same.pad_id == none.eos_id == 2
    assert none.stop_ids == same.stop_ids == (2,)


def test_stop_ids_come_from_template_then_generation_config_then_eos(tmp_path):
    folder = byte_level(tmp_path, eos_token="<|endoftext|>")
    assert tokenizers.load(folder).stop_ids == (2, 0)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 99999999]}')
    tokenizer = tokenizers.load(folder)
    assert tokenizer.stop_ids == (2, 1, 0)
    assert tokenizer.generation_config() == {"eos_token_id": [2, 1, 0], "pad_token_id": 0}


@pytest.mark.parametrize("name", list(templates.BUILTIN))
def test_built_in_templates_on_a_base_model_survive_export(tmp_path, name):
    """Saved and loaded by transformers alone, the folder renders the same bytes and gives the same ids."""
    from transformers import AutoTokenizer

    tokenizer = tokenizers.load(sentencepiece(tmp_path / "base"), chat_template=name)
    before = 900
    assert tokenizer.vocab_size == before + len(tokenizer.added_tokens)
    assert all(tokenizer.hf.convert_tokens_to_ids(token) >= before for token in tokenizer.added_tokens)
    if name == "six":
        assert tokenizer.added_tokens == ("<SOT>", "<EOT>", "<SOU>", "<EOU>", "<SOA>", "<EOA>")
        assert tokenizer.stop_ids[0] == tokenizer.hf.convert_tokens_to_ids("<EOA>")
    write_files(tmp_path / "saved", tokenizer.files())
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == tokenizer.template.text
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = chat("Hi", "Hello", "  x = 1\n", "你好", system="Be kind.")
    text = tokenizer.renderer.render(messages)
    assert again.apply_chat_template(messages, tokenize=False) == text
    assert again.apply_chat_template(messages, return_dict=False) == tokenizer.encode(text)
    loaded = tokenizers.load(tmp_path / "saved")
    assert loaded.end_of_turn_id == tokenizer.end_of_turn_id and loaded.encode(text) == tokenizer.encode(text)


def test_an_untouched_tokenizer_leaves_byte_for_byte(tmp_path):
    """Class name, special-tokens map, list of extra tokens: what another program looks for stays where it was."""
    folder = byte_level(
        tmp_path / "in",
        additional_special_tokens=["<|im_start|>"],
        added_tokens_decoder={"1": {"content": "<|im_start|>", "lstrip": False, "normalized": False, "rstrip": False,
                                    "single_word": False, "special": True}},
    )  # fmt: skip
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    came = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert tokenizers.load(folder).files() == came == tokenizer_export.untouched(tokenizer_export.read(folder))


def test_rules_that_a_class_puts_in_place_of_the_files_are_written(tmp_path):
    """transformers 5 gives Qwen2Tokenizer rules of its own, 4 believes tokenizer.json: that must say the same."""
    tokenizer = tokenizers.load(byte_level(tmp_path, tokenizer_class="Qwen2Tokenizer"))
    files = tokenizer.files()
    text = "cafe\u0301 1234"
    assert tokenizer.encode(text) != Backend.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert tokenizer.encode(text) == Backend.from_str(files["tokenizer.json"].decode()).encode(text).ids
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "Qwen2Tokenizer"


NAMED = {"default": CHATML, "tool_use": "tools" + CHATML, "rag": "{{ documents }}" + CHATML}


@pytest.mark.parametrize("form", ["list", "files"])
def test_every_named_template_leaves_as_it_came(tmp_path, form):
    from transformers import AutoTokenizer

    folder = byte_level(tmp_path / "in", template=None)
    if form == "list":
        byte_level(folder, template=[{"name": name, "template": text} for name, text in NAMED.items()])
    else:
        names = {"default": "chat_template.jinja"}
        where = {names.get(name, f"additional_chat_templates/{name}.jinja"): text for name, text in NAMED.items()}
        write_files(folder, {name: text.encode() for name, text in where.items()})
    came = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert tokenizers.load(folder).files() == came
    # another end of turn: two of them say it, the third is as it was, and all are where they were
    changed = tokenizers.load(folder, end_of_turn="<END>")
    written = changed.files()
    assert set(written) == set(came)
    again = AutoTokenizer.from_pretrained(write_files(tmp_path / "out", written)).chat_template
    assert again == {
        "default": changed.template.text, "tool_use": changed.template.tools_text, "rag": NAMED["rag"]
    }  # fmt: skip
    assert "<END>" in again["default"] and "<END>" in again["tool_use"]
    # a template that takes the place of the model's own takes that of its variant for tools too
    other = tokenizers.load(folder, chat_template="zephyr").files()
    again = AutoTokenizer.from_pretrained(write_files(tmp_path / "other", other)).chat_template
    assert again["rag"] == NAMED["rag"] and again["default"] == templates.find("zephyr").text
    assert again.get("tool_use") != NAMED["tool_use"]


def test_what_only_transformers_5_writes_leaves_in_words_that_4_knows(tmp_path):
    folder = byte_level(
        tmp_path / "in", tokenizer_class="TokenizersBackend", extra_special_tokens=["<|im_start|>"],
        auto_map={"AutoTokenizer": ["evil.py", None]},
    )  # fmt: skip
    for files in (tokenizers.load(folder).files(), tokenizer_export.untouched(tokenizer_export.read(folder))):
        settings = json.loads(files["tokenizer_config.json"])
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in settings
        assert settings["additional_special_tokens"] == ["<|im_start|>"] and "extra_special_tokens" not in settings
        again = tokenizers.load(write_files(tmp_path / "out", files))
        assert again.encode("a<|im_start|>b") == tokenizers.load(folder).encode("a<|im_start|>b")


def test_new_tokens_are_in_every_list_of_tokens(tmp_path):
    folder = byte_level(tmp_path, template=None, added_tokens_decoder={})
    (folder / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    tokenizer = tokenizers.load(folder, chat_template="six")
    files = tokenizer.files()
    listed = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {entry["content"]: int(number) for number, entry in decoder.items()} == listed
    assert json.loads(files["added_tokens.json"]) == listed
    assert all(listed[name] == tokenizer.hf.convert_tokens_to_ids(name) for name in tokenizer.added_tokens)


@pytest.mark.parametrize("name", list(templates.BUILTIN))
def test_end_of_turn_of_any_built_in_template_can_be_chosen(tmp_path, name):
    tokenizer = tokenizers.load(byte_level(tmp_path, template=None), chat_template=name, end_of_turn="<END>")
    assert tokenizer.decode([tokenizer.stop_ids[0]]) == "<END>" and "<END>" in tokenizer.added_tokens
    assert "A<END>" in tokenizer.renderer.render(chat("Q", "A")).replace(" <END>", "<END>")


@pytest.mark.parametrize("ending", ["'<|im_end|>'", "eos_token"])
def test_end_of_turn_of_a_models_own_template_can_be_chosen(tmp_path, ending):
    folder = byte_level(tmp_path, template=CHATML.replace("'<|im_end|>'", ending))
    tokenizer = tokenizers.load(folder, end_of_turn="<|endoftext|>")
    assert tokenizer.stop_ids[0] == 0 and not tokenizer.added_tokens
    assert tokenizer.renderer.render(chat("Q", "A")).endswith("A<|endoftext|>\n")


def test_a_template_file_takes_the_place_of_the_models_own(tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML.replace("assistant\n", "assistant\nSure: "))
    tokenizer = tokenizers.load(byte_level(tmp_path / "m"), chat_template=str(tmp_path / "t.jinja"))
    assert tokenizer.renderer.render(chat("Q"), generation=True).endswith("assistant\nSure: ")


def test_fingerprint_follows_what_decides_ids_and_survives_pickling(tmp_path):
    folder = byte_level(tmp_path)
    tokenizer = tokenizers.load(folder)
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint() == tokenizer.fingerprint()
    others = [tokenizers.load(folder, chat_template="six"), tokenizers.load(folder, end_of_turn="<|endoftext|>")]
    others.append(tokenizers.load(byte_level(tmp_path / "x", kind="thinking")))
    assert len({t.fingerprint() for t in [tokenizer, *others]}) == 4


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no tokenizer.json, tokenizer.model or vocab.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json can't be read"),
        ({"tokenizer.json": json.dumps({"model": 1})}, "tokenizer.json can't be read"),
        ({"tokenizer.model": "junk"}, "is not a SentencePiece model"),
        ({"tokenizer.model": ""}, "is not a SentencePiece model"),
    ],
)
def test_damaged_folders_are_named(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        tokenizers.load(tmp_path)


def test_remote_code_is_never_run(tmp_path):
    folder = byte_level(tmp_path, auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    tokenizers.load(folder)
    assert not (tmp_path / "canary").exists()


def test_unknown_template_lists_the_choices(tmp_path):
    with pytest.raises(ConfigError, match="chatml, llama2"):
        tokenizers.load(byte_level(tmp_path), chat_template="chatlm")
    with pytest.raises(ConfigError, match="no such folder"):
        tokenizers.load(tmp_path / "nowhere")


def test_conversations_without_a_template_or_a_stop_token_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no chat template.*set model.chat_template"):
        tokenizers.load(byte_level(tmp_path / "a", template=None)).require_template()
    plain = CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "")
    with pytest.raises(ConfigError, match=r"ends an answer with no control token"):
        tokenizers.load(byte_level(tmp_path / "b", template=plain)).require_template()


@pytest.mark.parametrize("kind", ["", "prefix", "nfc", "greedy blanks"])
def test_places_counted_from_bytes_are_the_tokenizers(tmp_path, kind):
    """Byte-level tokenizers: whole characters, parts of them, control tokens; where counting fails, they are asked."""
    folder = byte_level(tmp_path / "t")
    saved = json.loads((folder / "tokenizer.json").read_text())
    if kind == "prefix":
        saved["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
    if kind == "nfc":
        saved["normalizer"] = {"type": "NFC"}
    if kind == "greedy blanks":
        saved["added_tokens"][-1]["lstrip"] = saved["added_tokens"][-1]["rstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = tokenizers.load(folder)
    control = saved["added_tokens"][-1]["content"]
    texts = [*lines(), "e\u0301 naïve", f"a {control}  b{control}c", "👨‍👩‍👧 " * 3, "\u202e\ufeff𝒳"]
    found = tokenizer.encode_mixed(texts, texts)
    counted = 0
    for text, one in zip(texts, found, strict=True):
        wanted = tokenizer.backend.encode(text, add_special_tokens=False)
        assert one.ids.tolist() == wanted.ids
        assert list(zip(one.starts.tolist(), one.ends.tolist(), strict=True)) == wanted.offsets
        counted += kind != "prefix" and tokenizer.byte_counter.places(wanted.ids, text) is not None
    assert counted > 0.9 * len(texts) or (kind == "prefix" and tokenizer.byte_counter is None)


def test_places_of_tokenizers_that_are_not_byte_level_are_asked_for(tmp_path):
    assert tokenizers.load(sentencepiece(tmp_path, "bpe")).byte_counter is None
