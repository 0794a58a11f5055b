"""Rows that are renderings already: read back where the model's own template writes them so, else refused."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from sftjax.data import rendered
from sftjax.data import tokenizer as tokenizers
from sftjax.data.encode import RowEncoder
from sftjax.data.sources import open_source
from sftjax.data.types import RowError
from tests.data.tiny import byte_level, chat, drawn

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\nresult: ' + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
TEMPLATES = {"chatml": None, "system first": SYSTEM_FIRST, "trimmed, with BOS": TRIMMED}


@pytest.fixture(scope="module", params=TEMPLATES.values(), ids=TEMPLATES.keys())
def tokenizer(request, tmp_path_factory):
    template = {"template": request.param} if request.param else {}
    return tokenizers.load(byte_level(tmp_path_factory.mktemp("t"), bos_token="<|endoftext|>", **template))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return tokenizers.load(byte_level(tmp_path_factory.mktemp("chatml"), kind="thinking"))


TALKS = {
    "one exchange": chat("Hi there", "Hello!"),
    "several": chat("Hi", "Hello", "And you?", "Fine,\n\nthanks"),
    "with a system text": chat("Hi", "Hello", system="Speak like a pirate"),
    "an open end": chat("Hi", "Hello", "And"),
    "empty lines inside": chat("a\n\nb", "c\n\n\nd"),
}


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS.keys())
def test_renderings_give_the_samples_of_their_conversations(tokenizer, messages):
    text = tokenizer.renderer.render(messages)
    bos = str(tokenizer.renderer.special_tokens["bos_token"])
    (expected,) = RowEncoder(tokenizer)({"messages": messages})
    encoder = pickle.loads(pickle.dumps(RowEncoder(tokenizer, format="rendered")))
    for written in (text, text.rstrip(), text.removeprefix(bos)):
        (sample,) = encoder({"text": written})
        assert sample.tokens.tolist() == expected.tokens.tolist()
        assert sample.weights.tolist() == expected.weights.tolist()
        assert {*sample.flags} == {*expected.flags, "rendered_text"}


def test_results_of_tools_are_turns_of_their_own(tokenizer):
    messages = [*chat("Sum?", "call f"), {"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4"}]
    (sample,) = RowEncoder(tokenizer, format="rendered")({"text": tokenizer.renderer.render(messages)})
    (expected,) = RowEncoder(tokenizer)({"messages": messages})
    assert sample.tokens.tolist() == expected.tokens.tolist() and sample.weights.tolist() == expected.weights.tolist()


def test_a_prompt_that_is_rendered_is_not_trained(chatml):
    messages = chat("Hi", "Hello", "And you?", "Fine")
    head = chatml.renderer.render(messages[:3], generation=True)
    (sample,) = RowEncoder(chatml, format="rendered")({"prompt": head, "completion": "Fine<|im_end|>"})
    assert drawn(chatml, sample) == f"{head}[Fine<|im_end|>]\n"
    with pytest.raises(RowError, match="middle of a turn"):
        RowEncoder(chatml, format="rendered")({"prompt": head + "Fi", "completion": "ne<|im_end|>"})


def test_thoughts_and_calls_in_answers_stay(chatml):
    messages = chat("Hi", "<think>\nhm\n</think>\n<tool_call>\n{}\n</tool_call>")
    (sample,) = RowEncoder(chatml, format="rendered")({"text": chatml.renderer.render(messages)})
    (expected,) = RowEncoder(chatml)({"messages": messages})
    assert sample.tokens.tolist() == expected.tokens.tolist()


REFUSED = {
    "another header": "<|im_start|>critic\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
    "a role in between": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>critic\nx<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"
    ),
    "no end": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello",
    "other blanks": "<|im_start|>user\nHi<|im_end|>\n\n<|im_start|>assistant\nHello<|im_end|>\n",
    "text with an end mark": "Once upon a time<|endoftext|>",
    "a generation prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_other_texts_are_refused_and_the_setting_that_trains_them_as_they_are_works(chatml, text):
    with pytest.raises(RowError) as caught:
        RowEncoder(chatml, format="rendered")({"text": text})
    assert caught.value.reason == "rendered_text" and "format='raw_text'" in caught.value.detail
    (sample,) = RowEncoder(chatml, format="raw_text")({"text": text})
    ids = chatml.encode(text)
    assert sample.tokens.tolist()[: len(ids)] == ids and sample.weights.tolist() == [0.0] + [1.0] * (
        len(sample.tokens) - 1
    )
    ended = text.rstrip().endswith("<|im_end|>")
    assert sample.tokens.tolist()[len(ids) :] == ([] if ended else [chatml.eos_id])


def source(folder, *rows):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(path))


def test_a_source_is_recognised_by_nearly_all_of_its_rows(chatml, tmp_path):
    text = chatml.renderer.render(chat("Hi", "Hello"))

    def told(*rows, format="auto"):
        return rendered.recognised(source(tmp_path, *rows), chatml, format)

    assert told(*[{"text": text}] * 19, {"text": "plain"}) == "rendered"
    assert told({"prompt": text[:-30], "completion": text[-30:]}) == "rendered"
    assert told({"text": text}, {"text": "plain"}, {"text": "plain"}) == "auto"
    assert told({"text": "about <think> and </think>"}) == "auto"  # what answers may hold
    assert told({"messages": chat("What is <|im_end|>?", "A mark")}) == "auto"
    assert told({"text": text}, format="text") == "text"


def test_the_preview_shows_such_rows_as_they_would_be_trained(tmp_path):
    folder = byte_level(tmp_path / "model")
    tokenizer = tokenizers.load(folder)
    source(tmp_path, *({"text": tokenizer.renderer.render(chat(f"Hi {i}", "Hello"))} for i in range(3)))
    arguments = ["--model", str(folder), "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    done = subprocess.run(
        [sys.executable, "tools/preview.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        trained = [n for n, weight in zip(line["tokens"], line["weights"], strict=True) if weight]
        assert tokenizer.decode(trained) == "Hello<|im_end|>"
