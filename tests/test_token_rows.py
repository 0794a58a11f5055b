"""Tokenizers with more ids than the model has rows: Gemma 3's image token, the padding token of Llama-2 copies."""

import json

import pytest

from sftjax import loading
from sftjax.data.encode import RowEncoder
from sftjax.data.types import RowError
from sftjax.errors import DataError
from sftjax.generate.sample import Generator
from tests import tiny_run
from tests.data import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer has `<image_soft_token>` right above the embedding's rows, and pads with it."""
    where = tmp_path_factory.mktemp("rows")
    plain = tiny.byte_level(where / "plain")
    rows = len(json.loads((plain / "tokenizer.json").read_text())["model"]["vocab"])
    added = json.loads((plain / "tokenizer.json").read_text())["added_tokens"]
    rows = max(rows, max(token["id"] for token in added) + 1)
    path = tiny_run.model(where / "model", vocab_size=rows)
    saved = json.loads((path / "tokenizer.json").read_text())
    saved["added_tokens"].append(saved["added_tokens"][0] | {"id": rows, "content": "<image_soft_token>"})
    (path / "tokenizer.json").write_text(json.dumps(saved))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["pad_token"] = "<image_soft_token>"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def opened(folder):
    return loading.open_model(str(folder))


def test_it_opens_and_never_pads_with_what_has_no_row(opened):
    tokenizer = opened.tokenizer
    assert tokenizer.vocab_size == opened.config.vocab_size + 1 and tokenizer.rows == opened.config.vocab_size
    assert tokenizer.pad_id < tokenizer.rows and max(tokenizer.stop_ids) < tokenizer.rows
    assert opened.new_token_ids == ()


def test_only_the_row_that_has_such_an_id_is_refused(opened):
    last = opened.config.vocab_size
    encoder = RowEncoder(opened.tokenizer)
    fine, told = {"messages": tiny.chat("a <image_soft_token>", "b")}, {"input_ids": [1, last], "labels": [1, last]}
    results = encoder.encode_batch([fine, told])
    assert max(results[0][0].tokens) < last  # as text
    assert isinstance(results[1], RowError)
    assert f"the token '<image_soft_token>' (id {last}) has no row" in results[1].detail
    spoiled = loading.open_model(opened.files.path)
    spoiled.tokenizer.eos_id = last
    with pytest.raises(RowError, match="image_soft_token"):
        RowEncoder(spoiled.tokenizer)({"text": "some text"})


def test_only_the_prompt_that_has_such_an_id_is_refused(folder):
    loaded = loading.load_model(str(folder))
    generator = Generator(loaded.config, loaded.runtime, loaded.variables, loaded.tokenizer, batch_size=2, steps=4)
    answers = generator.generate([tiny.chat("the cat"), "the dog sees"], max_new_tokens=6, temperature=1.0)
    assert all(max(answer.tokens) < loaded.config.vocab_size for answer in answers)
    for prompt in ("see <image_soft_token>", [1, loaded.config.vocab_size]):
        with pytest.raises(DataError, match=r"prompt 1: the token '<image_soft_token>'.* has no row"):
            generator.generate(["fine", prompt], max_new_tokens=2)


def test_a_run_keeps_the_vocabulary_and_names_the_row(folder, tmp_path):
    data = tiny_run.conversations(tmp_path / "data.jsonl", 30)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    with open(data, "a") as file:
        file.write(json.dumps({"input_ids": [1, 2, rows], "labels": [1, 2, rows]}) + "\n")
    command = tiny_run.command(folder, data, tmp_path / "run", train__max_steps=2, eval__num_samples=1)
    done = tiny_run.run(command)
    assert "no_embedding_row" in done.stdout or "bad_ids" in done.stdout
    exported = json.loads((tmp_path / "run/export/config.json").read_text())
    assert exported["vocab_size"] == rows
    assert "<image_soft_token>" in (tmp_path / "run/export/tokenizer.json").read_text()
