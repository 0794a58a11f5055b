"""Nothing of a row vanishes: what a template leaves out is refused or counted by name, in the tool and before a run."""

import json

import numpy as np
import pytest

from sftjax.data import preflight
from sftjax.data import tokenizer as tokenizers
from sftjax.data.encode import RowEncoder
from sftjax.data.mixture import Ingredient, Mixture
from sftjax.data.sources import open_source
from sftjax.data.types import RowError
from sftjax.errors import ConfigError, DataError
from tests.data import shapes
from tests.data.tiny import byte_level, chat, drawn

CALL = {"type": "function", "function": {"name": "find", "arguments": {"place": "Lisbon"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}, {"content": "Let me see."}])
def test_a_call_that_a_template_does_not_write_refuses_the_row(tmp_path, content):
    encoder = RowEncoder(tokenizers.load(byte_level(tmp_path)))
    row = {"messages": [*chat("Where?"), {"role": "assistant", **content, "tool_calls": [CALL]}], "tools": TOOLS}
    with pytest.raises(RowError, match=r"lost_tool_call: message 1.*'find'"):
        encoder(row)


def test_an_end_mark_alone_is_never_trained(tmp_path):
    encoder = RowEncoder(tokenizers.load(byte_level(tmp_path)), allow_lost=("tool_call",))
    row = {"messages": [*chat("Where?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": TOOLS}
    with pytest.raises(RowError, match=r"lost_tool_call.*nothing else"):
        encoder(row)
    row["messages"][1]["content"] = "There."
    (sample,) = encoder(row)
    assert "lost_tool_call" in sample.flags and drawn(encoder.tokenizer, sample).endswith("[There.<|im_end|>]\n")
    with pytest.raises(ConfigError, match="allow_lost: 'calls'"):
        RowEncoder(encoder.tokenizer, allow_lost=("calls",))


def test_lost_system_texts_are_counted_and_refused_above_a_share(tmp_path):
    encoder = RowEncoder(shapes.load(shapes.SHAPES["other roles dropped"], tmp_path))
    rows = [{"messages": chat("Q", "A", system="Be brief and kind." if i == 0 else None)} for i in range(10)]

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def report(**options):
        mixture = Mixture([Ingredient(open_source({"path": str(data)}), encoder)], epochs=1, shuffle=False)
        return preflight.run(mixture, encoder.tokenizer, length=128, batch_size=2, **options)

    found = report(max_lost=0.1)
    assert found.lost["lost_system"] | {"example": ""} == {"rows": 1, "share": 0.1, "refused": 0, "example": ""}
    assert "Be brief and kind." in found.lost["lost_system"]["example"] and found.problems == []
    with pytest.raises(DataError, match=r"lost_system: the text of 1 of 10 rows.*data.max_lost_fraction.*fold_system"):
        report(max_lost=0.05).check()


def test_marks_of_thoughts_stay_one_token_in_answers_and_stops_never(tmp_path):
    encoder = RowEncoder(shapes.load(shapes.SHAPES["chatml"], tmp_path))
    number = encoder.tokenizer.hf.convert_tokens_to_ids
    (sample,) = encoder({"messages": chat("why <seed:think>", "<seed:think>T</seed:think>A <|im_end|>")})
    assert np.count_nonzero(sample.tokens == number("<seed:think>")) == 1
    assert np.count_nonzero(sample.tokens == number("<|im_end|>")) == 2


def test_rows_can_not_set_special_tokens_and_their_variables_are_text(tmp_path):
    template = "{{ bos_token }}{{ note }}" + shapes.SHAPES["chatml"].text
    encoder = RowEncoder(tokenizers.load(byte_level(tmp_path, template=template)))
    with pytest.raises(RowError, match=r"reserved_variable: .*'eos_token'"):
        encoder({"messages": chat("Q", "A"), "chat_template_kwargs": {"eos_token": "x"}})
    (sample,) = encoder({"messages": chat("Q", "A"), "chat_template_kwargs": {"note": "<|im_end|>"}})
    assert np.count_nonzero(sample.tokens == encoder.tokenizer.eos_id) == 2


def test_variables_of_a_run_are_in_the_template_that_is_saved(tmp_path):
    folder = byte_level(tmp_path, template=shapes.SHAPES["a switch changes the system text"].text)
    tokenizer = tokenizers.load(folder, template_kwargs={"enable_thinking": True})
    assert tokenizer.hf.apply_chat_template(chat("Q"), tokenize=False).startswith("<|system|>/think")
    assert tokenizer.hf.apply_chat_template(chat("Q"), tokenize=False, enable_thinking=False).count("/no_think") == 1
    assert tokenizer.fingerprint() != tokenizers.load(folder).fingerprint()
    with pytest.raises(ConfigError, match=r"model\.template_kwargs: 'messages'"):
        tokenizers.load(folder, template_kwargs={"messages": []})


def test_a_template_without_any_mark_names_a_remedy_that_works(tmp_path):
    shape = shapes.SHAPES["no mark at all, one chosen"]
    folder = shapes.folder_of(shape, tmp_path)
    with pytest.raises(ConfigError, match=r"set model.end_of_turn='<eos>'"):
        RowEncoder(tokenizers.load(folder))({"messages": chat("Q", "A")})
    (sample,) = RowEncoder(tokenizers.load(folder, end_of_turn="<eos>"))({"messages": chat("Q", "A")})
    assert sample.tokens[-1] == sample.tokens[sample.weights > 0][-1]
