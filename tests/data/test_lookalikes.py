"""Templates that write tokens the tokenizer lacks: said, with settings and edits that work when they are followed."""

import ast
import re

import pytest

from sftjax.data import lookalikes
from sftjax.data import tokenizer as tokenizers
from sftjax.errors import ConfigError
from tests.data.tiny import CHATML, byte_level, chat, sentencepiece, write_files

LOOP = "{%- for m in messages -%}BODY{%- endfor -%}{%- if add_generation_prompt -%}START{%- endif -%}"
BARE = LOOP.replace("BODY", "{{ m['role'] }}: {{ m['content'] }}\n").replace("START", "assistant: ")
NO_SYSTEM = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"


def written(before: str, behind: str, start: str) -> str:
    return LOOP.replace("BODY", before + "{{ m['content'] }}" + behind).replace("START", start)


OWN = {
    "<|fin|>": written("<|{{ m['role'] }}|>\n", "<|fin|>\n", "<|assistant|>\n"),
    "[END]": written("[{{ m['role'] | upper }}]", "[END]", "[ASSISTANT]"),
    "<turn_end>": NO_SYSTEM + written("<turn_start>{{ m['role'] }}\n", "<turn_end>\n", "<turn_start>assistant\n"),
    "<|end of turn|>": written("{{ m['role'] }}: ", "<|end of turn|>", "assistant: "),
    "<｜fin｜>": written("<｜{{ m['role'] | capitalize }}｜>", "<｜fin｜>", "<｜Assistant｜>"),
    "</s>": written("{{ m['role'] }}: ", "</s>\n", "assistant: "),
}


def load(folder, template, **settings):
    (folder / "own.jinja").write_text(template)
    tokenizer = tokenizers.load(folder, **{"chat_template": str(folder / "own.jinja")} | settings)
    tokenizer.require_template()
    return tokenizer


def remedies(message: str) -> list[dict[str, object]]:
    """The settings that a message names, one by one or where it says "and"."""
    ways = re.split(r", or ", message.split(";", 1)[1])
    named = [re.findall(r"model\.(\w+)=(\([^)]*\)|'[^']*')", way) for way in ways]
    return [{field: ast.literal_eval(value) for field, value in fields} for fields in named]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("end", OWN)
def test_the_tokens_of_a_template_are_proposed_and_the_proposal_works(tmp_path, end, make):
    folder = make(tmp_path)
    if end in tokenizers.load(folder).control_tokens:
        assert load(folder, OWN[end]).decode([load(folder, OWN[end]).end_of_turn_id]) == end
        return
    with pytest.raises(ConfigError, match=r"so that generation would never learn to stop.*model.add_tokens=") as told:
        load(folder, OWN[end])
    (way,) = remedies(str(told.value))
    assert end in way["add_tokens"]
    tokenizer = load(folder, OWN[end], **way)
    assert tokenizer.added_tokens == way["add_tokens"] and not lookalikes.split_tokens(tokenizer)
    for name in way["add_tokens"]:
        (number,) = tokenizer.encode(name)
        assert tokenizer.backend.get_added_tokens_decoder()[number].special and tokenizer.encode(f"a{name}b")[-2] != 0
        assert number in tokenizer.encode(f"a{name}b{name}") and number not in tokenizer.encode_plain(name)
    assert tokenizer.decode([tokenizer.end_of_turn_id]) == end and tokenizer.stop_ids[0] == tokenizer.encode(end)[0]
    alone = load(folder, OWN[end], end_of_turn=end)  # the other field that might come to mind
    assert alone.added_tokens == (end,) and alone.decode([alone.end_of_turn_id]) == end


@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_where_nothing_looks_like_a_token_the_way_out_works(tmp_path, eos):
    folder = byte_level(tmp_path, eos_token=eos, template=None)
    with pytest.raises(ConfigError, match="no control token, but with nothing") as told:
        load(folder, BARE)
    (way,) = remedies(str(told.value))
    assert way == {"end_of_turn": eos or "<|end|>"} and load(folder, BARE, **way).end_of_turn_id is not None


def test_an_end_that_cannot_be_put_into_a_template_is_told_with_what_can(tmp_path):
    folder = byte_level(tmp_path)
    joined = CHATML.replace("'<|im_end|>", "'<|im' + '_end|>")
    with pytest.raises(ConfigError, match=r"could not be put into.*in place of '<\|im_end\|>'") as told:
        load(folder, joined, end_of_turn="<|zz|>")
    way = {field: ast.literal_eval(value) for field, value in
           re.findall(r"model\.(\w+)=(\([^)]*\)|'[^']*')", str(told.value).split(": ", 1)[1])}  # fmt: skip
    assert set(way) == {"add_tokens", "end_of_turn"}
    tokenizer = load(folder, joined.replace("'<|im' + '_end|>", "'<|zz|>"), **way)
    assert tokenizer.decode([tokenizer.end_of_turn_id]) == "<|zz|>"


def test_only_tokens_are_proposed(tmp_path):
    template = CHATML.replace("message['content']", "'<b>[1] a < b</b> <p>' + message['content']")
    tokenizer = load(byte_level(tmp_path), template)
    assert lookalikes.split_tokens(tokenizer) == {} and lookalikes.explain(tokenizer) == ""


def test_an_added_token_is_one_everywhere_also_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    names = ("<|user|>", "<|assistant|>", "<|system|>", "<|fin|>", "<think>", "</think>")
    tokenizer = load(byte_level(tmp_path / "in"), OWN["<|fin|>"], add_tokens=names)
    assert tokenizer.added_tokens == names and tokenizer.vocab_size == 900 + len(names)
    write_files(tmp_path / "out", tokenizer.files())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = chat("Hi", "<think>so</think>Hello", system="Be kind.")
    ids = tokenizer.encode(tokenizer.renderer.render(messages))
    assert theirs.apply_chat_template(messages, return_dict=False) == ids
    assert [theirs.convert_tokens_to_ids(name) for name in names] == [*range(900, 906)]
    assert set(range(900, 906)) <= set(ids)
    assert "<think>so</think>Hello" in theirs.decode(ids, skip_special_tokens=True)
    assert "<|fin|>" not in theirs.decode(ids, skip_special_tokens=True)
    again = tokenizers.load(tmp_path / "out", add_tokens=names)  # to train on: nothing is new any longer
    assert again.added_tokens == () and again.encode("<|fin|>") == [903]
    assert again.hide_control_tokens("<think>", answer=True) == "<think>" != again.hide_control_tokens("<think>")
    assert tokenizer.fingerprint() != load(tmp_path / "in", OWN["<|fin|>"], add_tokens=names[:5]).fingerprint()


def test_a_word_that_becomes_a_token_keeps_its_id(tmp_path):
    folder = sentencepiece(tmp_path)
    word = next(name for name in tokenizers.load(folder).hf.get_vocab() if re.fullmatch(r"[a-z]{4,}", name))
    tokenizer = load(folder, written("{{ m['role'] }}: ", word, "assistant: "), add_tokens=(word,))
    assert tokenizer.added_tokens == () and tokenizer.vocab_size == tokenizers.load(folder).vocab_size
    assert tokenizer.end_of_turn_id == tokenizers.load(folder).hf.convert_tokens_to_ids(word)
