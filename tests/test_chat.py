import io
import json

import pytest

from sftjax import chat
from sftjax.errors import DataError, StorageError
from sftjax.generate.sample import Output


class Echo:
    """Answers with how many messages it saw and the last one's content."""

    tokenizer = object()

    def generate(self, prompts, *, n=1, on_text=None, seed=0, **_):
        outputs = []
        for number, messages in enumerate(prompts):
            for sample in range(n):
                text = f"{len(messages)}:{messages[-1]['content']}"
                if on_text:
                    on_text(number, text)
                outputs.append(Output(number, sample, (1, 2), (0.0, 0.0), text, "stop", 5))
        return outputs


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_text_file_has_a_prompt_on_each_line(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert chat.answer_file(Echo(), str(tmp_path / "p.txt"), str(tmp_path / "out.jsonl")) == 2
    assert lines(tmp_path / "out.jsonl") == [
        {"index": 0, "prompt": "one", "text": "1:one", "num_tokens": 2, "finish_reason": "stop"},
        {"index": 1, "prompt": "two", "text": "1:two", "num_tokens": 2, "finish_reason": "stop"},
    ]


def test_jsonl_rows_keep_their_form_and_several_answers_their_number(tmp_path):
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    rows = [{"prompt": "one", "id": 7}, {"messages": messages}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat.answer_file(Echo(), str(tmp_path / "p.jsonl"), str(tmp_path / "out.jsonl"), system="be brief", n=2)
    found = lines(tmp_path / "out.jsonl")
    assert [(row["index"], row["sample"], row["text"]) for row in found] == [
        (0, 0, "2:one"), (0, 1, "2:one"), (1, 0, "2:hi"), (1, 1, "2:hi"),
    ]  # fmt: skip
    assert found[0]["prompt"] == "one" and found[2]["messages"] == messages


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"messages": []}', '{"prompt": 3}', '{"messages": ["hi"]}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "one"}}\n{line}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: give"):
        chat.answer_file(Echo(), str(tmp_path / "p.jsonl"), str(tmp_path / "out.jsonl"))


def test_paths_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "p.txt").write_text("one")
    with pytest.raises(StorageError, match="can't read"):
        chat.answer_file(Echo(), str(tmp_path / "absent.txt"), str(tmp_path / "out.jsonl"))
    with pytest.raises(StorageError, match="can't write"):
        chat.answer_file(Echo(), str(tmp_path / "p.txt"), str(tmp_path / "absent" / "out.jsonl"))


def test_a_conversation_remembers_and_forgets(capsys):
    typed = io.StringIO("one\n\ntwo\n/reset\nthree\n")

    def ask(_):
        line = typed.readline()
        if not line:
            raise EOFError
        return line

    assert chat.interactive(Echo(), system="s", ask=ask) == 3
    assert capsys.readouterr().out.splitlines() == ["2:one", "4:two", "2:three"]
