import pytest

from sftjax.data import tokenizer as tokenizers
from sftjax.synth import distill
from sftjax.synth.teacher import LocalTeacher, Reply, Sampling, query_prefix
from tests.data import tiny
from tests.synth.fakes import asker

ANSWERS = {
    "a": " Paris. ",
    "b": "",
    "c": Reply("Paris and", "length"),
    "d": "I'm sorry, I can't.",
}


def test_only_answers_that_can_be_used_are_kept(tmp_path):
    rows = [{"question": name} for name in ANSWERS]
    with asker(tmp_path, lambda prompt, *_: ANSWERS[prompt]) as asking:
        made = distill.distill(rows, asking, Sampling())
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Paris."}]
    assert made.rows == [{"messages": messages, "method": "distill", "index": 0}]
    assert made.report["filters"] == {"answer_empty": 1, "answer_cut_off": 1, "answer_refuses": 1}
    assert made.report["prompts"] == 4


def test_magpie_asks_with_the_prefix_and_answers_what_comes(tmp_path):
    drawn = ["What is the sea?", "what is the sea", "Hm", "x " * 400, Reply("What is", "length"), "Who was he then?"]

    def answer(prompt, number, seed):
        return drawn[number] if prompt == "PREFIX" else f"Answer to {prompt}"

    with asker(tmp_path, answer, chunk=6) as asking:
        made = distill.magpie(6, asking, Sampling(), prefix="PREFIX", end_of_turn="<end>")
        assert asking.teacher.asked[:6] == ["PREFIX"] * 6
    assert [row["messages"][0]["content"] for row in made.rows] == ["What is the sea?", "Who was he then?"]
    assert made.rows[1]["messages"][1]["content"] == "Answer to Who was he then?"
    filters = {name: count for name, count in made.report["filters"].items() if count}
    names = ("question_cut_off", "question_too_short", "question_too_long", "question_known")
    assert filters == dict.fromkeys(names, 1)


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "zephyr", "six"])
def test_the_prefix_is_what_stands_before_a_users_message(tmp_path, template):
    tokenizer = tokenizers.load(
        tiny.byte_level(tmp_path / "t", template=None, bos_token="<|endoftext|>"), chat_template=template
    )
    prefix = query_prefix(tokenizer)
    rendered = tokenizer.renderer.render([{"role": "user", "content": "Hello there"}])
    assert rendered.startswith(prefix + "Hello there") and prefix


class Recorder:
    """In place of a Generator."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, prompts, **_):
        self.prompts = prompts
        return []


@pytest.mark.parametrize("writes_bos", [False, True])
def test_a_local_teacher_starts_a_text_with_exactly_one_bos(tmp_path, writes_bos):
    tokenizer = tokenizers.load(tiny.sentencepiece(tmp_path / "t"), chat_template="llama2")
    bos = tokenizer.bos_id
    generator = Recorder(tokenizer)
    text = query_prefix(tokenizer) if writes_bos else "Hello"
    assert text.startswith("<s>") is writes_bos
    LocalTeacher(generator, "m").complete([text], Sampling(), seed=0)
    assert generator.prompts[0][0] == bos and generator.prompts[0].count(bos) == 1
