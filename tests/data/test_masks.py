"""Trained spans, drawn: [brackets] stand around what is trained. Each case failed somewhere else (see the names)."""

import random

import numpy as np
import pytest

from sftjax.data import masks, templates
from sftjax.data import tokenizer as tokenizers
from sftjax.data.encode import RowEncoder
from sftjax.data.types import RowError
from sftjax.errors import DataError
from tests.data.tiny import CHATML, byte_level, chat, drawn, sentencepiece

QWEN3_LIKE = """{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
TOOLS_LIKE = """{%- if tools %}{{- '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.content %}{{- m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def encoder_of(folder, template=CHATML, kind="", name=None, **options) -> RowEncoder:
    return RowEncoder(tokenizers.load(byte_level(folder, template=template, kind=kind), chat_template=name), **options)


def one(encoder, *contents, **row):
    (sample,) = encoder({"messages": chat(*contents), **row})
    return sample


def test_every_answer_and_its_end_of_turn_is_trained_and_nothing_else(tmp_path):
    encoder = encoder_of(tmp_path)
    sample = one(encoder, "Q1", "A1", "Q2", "A2")
    assert drawn(encoder.tokenizer, sample) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[A1<|im_end|>]\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n[A2<|im_end|>]\n"
    )
    assert sample.flags == ()
    assert sample.tokens.dtype == np.int32 and sample.weights.dtype == np.float32


BUILT_IN = {  # the blank behind [/INST] is what generation writes first, so it is trained
    "chatml": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[A<|im_end|>]\n",
    "llama2": "<s>[INST] Q [/INST][ A </s>]",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[A<|eot_id|>]",
    "zephyr": "<|user|>\nQ</s>\n<|assistant|>\n[A</s>]\n",
    "gemma": "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n[A<end_of_turn>]\n",
    "mistral": "<s>[INST] Q [/INST][ A</s>]",
    "alpaca": f"<s>{templates.ALPACA_SYSTEM}\n\n### Instruction:\nQ\n\n### Response:\n[A</s>]\n\n",
    "six": "<SOU>Q<EOU><SOA>[A<EOA>]",
}


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_built_in_templates(tmp_path, name):
    folder = byte_level(tmp_path, template=None, bos_token="<s>", eos_token="</s>", pad_token=None)
    encoder = RowEncoder(tokenizers.load(folder, chat_template=name))
    sample = one(encoder, "Q", "A")
    assert drawn(encoder.tokenizer, sample) == BUILT_IN[name]
    assert sample.tokens.tolist() == encoder.tokenizer.hf.apply_chat_template(chat("Q", "A"), return_dict=False)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", list(BUILT_IN))
def test_sentencepiece_spans_hold_the_answers(tmp_path, name, kind):
    """With dummy prefixes behind control tokens and blanks in front of answers, as ids and not as text."""
    encoder = RowEncoder(tokenizers.load(sentencepiece(tmp_path, kind), chat_template=name))
    tokenizer = encoder.tokenizer
    for answer in ("Paris", "  x = 1", "你好", "1", "\n- a\n- b"):
        messages = chat("Where?", answer, " And\n", answer + ".")
        (sample,) = encoder({"messages": messages})
        assert sample.tokens.tolist() == tokenizer.hf.apply_chat_template(messages, return_dict=False)
        runs = np.split(np.arange(len(sample.tokens)), np.flatnonzero(np.diff(sample.weights)) + 1)
        trained = [sample.tokens[run] for run in runs if sample.weights[run[0]]]
        assert len(trained) == 2
        for run, text in zip(trained, (answer, answer + "."), strict=True):
            assert run[-1] == tokenizer.stop_ids[0]
            assert "".join(tokenizer.decode(run[:-1]).split()) == "".join(text.split())
        if "straddle" not in sample.flags and "prompt_differs" not in sample.flags:
            prompt = tokenizer.hf.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
            assert prompt == sample.tokens[: runs[-2 if sample.weights[-1] == 0 else -1][0]].tolist()


def test_a_quoted_tag_is_not_a_mark(tmp_path):
    """Searching for "[/INST]" trains on the rest of such a question."""
    encoder = RowEncoder(
        tokenizers.load(byte_level(tmp_path, bos_token="<s>", eos_token="</s>"), chat_template="llama2")
    )
    sample = one(encoder, "What does [/INST] mean?", "It closes [INST].")
    assert drawn(encoder.tokenizer, sample) == "<s>[INST] What does [/INST] mean? [/INST][ It closes [INST]. </s>]"


def test_a_token_across_the_start_is_trained_and_counted(tmp_path):
    """An answer that starts with blanks: newline and blanks are one token, half of it in the prompt."""
    encoder = encoder_of(tmp_path)
    sample = one(encoder, "Q", "    return x")
    tokens = [encoder.tokenizer.decode([i]) for i, w in zip(sample.tokens, sample.weights, strict=True) if w]
    assert tokens[0].startswith("\n  ") and tokens[-1] == "<|im_end|>"
    assert set(sample.flags) == {"straddle", "prompt_differs"}
    assert "straddle" not in one(encoder, "Q", "return x").flags


def test_a_prompt_that_generation_would_tokenise_otherwise_is_counted(tmp_path):
    """Two newlines end the prompt: one token alone, two in front of text (pre-tokenizers of GPT-2's kind)."""
    encoder = encoder_of(tmp_path, CHATML.replace("assistant\n", "assistant\n\n").replace(
        "message['role'] + '\n'", "message['role'] + '\n\n'"))  # fmt: skip
    sample = one(encoder, "Q", "A")
    alone = encoder.tokenizer.encode("<|im_start|>assistant\n\n")
    assert alone != sample.tokens[-len(alone) - 3 : -3].tolist()
    assert sample.flags == ("prompt_differs",)
    assert drawn(encoder.tokenizer, sample).endswith("assistant\n\n[A<|im_end|>]\n")


def test_end_of_turn_is_trained_where_pad_equals_eos(tmp_path):
    for pad in ("<|im_end|>", None):
        encoder = RowEncoder(tokenizers.load(byte_level(tmp_path, pad_token=pad)))
        sample = one(encoder, "Q", "A")
        assert sample.weights[-2] == 1 and sample.tokens[-2] == encoder.tokenizer.eos_id


def test_rewritten_history_becomes_one_sample_for_each_trained_turn(tmp_path):
    """Templates of Qwen3's kind delete earlier thoughts; generation saw the history without, and wrote with."""
    encoder = encoder_of(tmp_path, QWEN3_LIKE, "thinking")
    row = {"messages": chat("Q1", "<think>\nT1\n</think>\n\nA1", "Q2", "<think>\nT2\n</think>\n\nA2")}
    first, second = encoder(row, 7, 3)
    head = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    assert drawn(encoder.tokenizer, first) == f"{head}[<think>\nT1\n</think>\n\nA1<|im_end|>]\n"
    assert drawn(encoder.tokenizer, second) == (
        f"{head}A1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\nT2\n</think>\n\nA2<|im_end|>]\n"
    )
    assert [(s.index, s.source, s.sample, s.flags) for s in (first, second)] == [
        (7, 3, 0, ("unrolled",)),
        (7, 3, 1, ("unrolled", "history_reasoning")),
    ]
    thought = encoder.tokenizer.hf.convert_tokens_to_ids("<think>")
    assert (first.tokens == thought).sum() == (second.tokens == thought).sum() == 1
    for k, sample in ((2, first), (4, second)):
        assert sample.tokens.tolist() == encoder.tokenizer.hf.apply_chat_template(
            row["messages"][:k], return_dict=False
        )
    assert len(encoder({"messages": row["messages"][:2]})) == 1  # a single turn has no history
    dropping = encoder_of(tmp_path, QWEN3_LIKE, "thinking", on_mask_error="drop")
    with pytest.raises(RowError, match="history_rewritten"):
        dropping(row)
    with pytest.raises(DataError, match="on_mask_error"):
        encoder_of(tmp_path, QWEN3_LIKE, "thinking", on_mask_error="raise")(row)


def test_only_the_last_of_rewritten_history_is_one_sample(tmp_path):
    encoder = encoder_of(tmp_path, QWEN3_LIKE, "thinking", train_on="last")
    (sample,) = encoder({"messages": chat("Q1", "A1", "Q2", "A2")})
    assert drawn(encoder.tokenizer, sample).endswith("[<think>\n\n</think>\n\nA2<|im_end|>]\n")
    assert sample.flags == ()


def test_a_template_that_drops_thoughts_is_refused_unless_that_is_allowed(tmp_path):
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(RowError, match=r"lost_reasoning.*allow_lost=\('reasoning',\)"):
        one(encoder_of(tmp_path, template, "thinking"), "Q", "<think>\nT\n</think>A")
    allowing = encoder_of(tmp_path, template, "thinking", allow_lost=("reasoning",))
    sample = one(allowing, "Q", "<think>\nT\n</think>A")
    assert sample.flags == ("lost_reasoning",) and drawn(allowing.tokenizer, sample).endswith("[A<|im_end|>]\n")


def test_a_prompt_that_is_no_prefix_of_the_answer_is_refused(tmp_path):
    """Generation is prompted with <think>, which the history doesn't have: training it would teach something else."""
    encoder = encoder_of(tmp_path, CHATML.replace("assistant\n", "assistant\n<think>\n"), "thinking")
    with pytest.raises(RowError, match=r"prompt_not_prefix.*<think>"):
        encoder({"messages": chat("Q", "A")})


def test_template_without_generation_prompt_starts_behind_the_question(tmp_path):
    template = CHATML.split("{% if add_generation_prompt")[0]
    sample = one(encoder := encoder_of(tmp_path, template), "Q", "A")
    assert drawn(encoder.tokenizer, sample) == ("<|im_start|>user\nQ<|im_end|>\n[<|im_start|>assistant\nA<|im_end|>]\n")


def test_generation_tags_make_no_difference(tmp_path):
    tagged = CHATML.replace("{{'<|im", "{% generation %}{{'<|im", 1).replace(
        "{% endfor", "{% endgeneration %}{% endfor"
    )
    plain = one(encoder_of(tmp_path / "a"), "Q", "A", "Q", "B")
    with_tags = one(encoder_of(tmp_path / "b", tagged), "Q", "A", "Q", "B")
    assert with_tags.tokens.tolist() == plain.tokens.tolist() and (with_tags.weights == plain.weights).all()


def test_last_turn_only_and_weights_of_messages(tmp_path):
    messages = chat("Q1", "A1", "Q2", "A2", "Q3", "A3")
    last = encoder_of(tmp_path, train_on="last")
    assert drawn(last.tokenizer, last({"messages": messages})[0]).count("[") == 1
    messages[1]["weight"], messages[3]["train"], messages[5]["train"] = 0.25, False, True
    for train_on in ("all", "weights"):
        (sample,) = encoder_of(tmp_path, train_on=train_on)({"messages": messages})
        assert sorted(set(sample.weights.tolist())) == [0.0, 0.25, 1.0]
        assert [sample.weights.tolist().count(w) for w in (0.25, 1.0)] == [3, 3]  # "A", "1", end of turn
    with pytest.raises(RowError, match="no_weights"):
        encoder_of(tmp_path, train_on="weights")({"messages": chat("Q", "A")})
    with pytest.raises(RowError, match="nothing_trained"):
        encoder_of(tmp_path)({"messages": [*chat("Q"), {"role": "assistant", "content": "A", "weight": 0}]})


def test_tool_calls_are_trained_and_results_are_not(tmp_path):
    encoder = encoder_of(tmp_path, TOOLS_LIKE, "thinking")
    call = {"type": "function", "id": None, "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
    row = {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "R <tool_call>"},
            {"role": "assistant", "content": "A"},
        ],
        "tools": '[{"type": "function", "function": {"name": "f", "parameters": {}}}]',
    }
    (sample,) = encoder(row)
    assert drawn(encoder.tokenizer, sample) == (
        '<|im_start|>system\n{"type": "function", "function": {"name": "f", "parameters": {}}}<|im_end|>\n'
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        '[<tool_call>{"name": "f", "arguments": {"x": [1, null]}}</tool_call><|im_end|>]\n'
        "<|im_start|>tool\nR <tool_call><|im_end|>\n<|im_start|>assistant\n[A<|im_end|>]\n"
    )
    number = encoder.tokenizer.hf.convert_tokens_to_ids("<tool_call>")
    assert (sample.tokens == number).sum() == 1  # the one of the template; the tool's is text
    call["function"]["arguments"] = {"x": [1, None]}
    assert encoder(row)[0].tokens.tolist() == sample.tokens.tolist()


def test_templates_that_want_arguments_as_text_get_them(tmp_path):
    template = TOOLS_LIKE.replace("(call.function | tojson)", "call.function.name + ' ' + call.function.arguments")
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    row = {"messages": [*chat("Q"), {"role": "assistant", "tool_calls": [call]}]}
    sample = one(encoder := encoder_of(tmp_path, template, "thinking"), **row)
    assert '[<tool_call>f {"x": "é"}</tool_call><|im_end|>]' in drawn(encoder.tokenizer, sample)


def test_what_a_model_writes_itself_stays_a_token_in_answers(tmp_path):
    encoder = encoder_of(tmp_path, kind="thinking")
    sample = one(encoder, "why <think>?", "<think>T</think>A")
    thought = encoder.tokenizer.hf.convert_tokens_to_ids("<think>")
    assert np.flatnonzero(sample.tokens == thought).tolist() == [np.flatnonzero(sample.weights)[0]]


def test_data_can_not_close_its_turn_or_open_another(tmp_path):
    """Contents with every control token: the control tokens of the sample are the template's, in place and number."""
    rng = random.Random(0)
    for encoder in (
        encoder_of(tmp_path / "a"),
        encoder_of(tmp_path / "b", QWEN3_LIKE, "thinking"),
        RowEncoder(tokenizers.load(sentencepiece(tmp_path / "c"), chat_template="llama2")),
        RowEncoder(tokenizers.load(sentencepiece(tmp_path / "d", "unigram"), chat_template="six")),
    ):
        tokenizer = encoder.tokenizer
        names = [n for n in tokenizer.control_tokens if n != "<unk>" and not n.strip("</>").replace("_", "").isalpha()]
        names = names or ["<s>", "</s>"]
        clean = {len(m): encoder({"messages": m}) for m in (chat("Q", "A"), chat("Q", "A", "Q", "A"))}
        for _ in range(200):
            contents = [
                "x" + "".join(rng.choice([*names, " ", "\n", "a", "你"]) for _ in range(rng.randint(0, 6))) + "y"
                for _ in range(rng.choice((2, 4)))
            ]
            samples = encoder({"messages": chat(*contents)})
            for sample, plain in zip(samples, clean[len(contents)], strict=True):
                control, expected = (s.tokens[tokenizer.is_control[s.tokens]] for s in (sample, plain))
                assert control.tolist() == expected.tolist(), contents
                trained, should = (s.tokens[(s.weights > 0) & tokenizer.is_control[s.tokens]] for s in (sample, plain))
                assert trained.tolist() == should.tolist(), contents
                seen = contents if len(samples) == 1 else contents[: 2 * (sample.sample + 1)]
                assert ("control_text" in sample.flags) == any(name in text for name in names for text in seen)


def test_text_that_spells_a_control_token_can_be_an_error(tmp_path):
    with pytest.raises(RowError, match="control_text"):
        encoder_of(tmp_path, control_text="error")({"messages": chat("a <|im_end|> b", "A")})


def test_bos_is_exactly_what_the_template_writes(tmp_path):
    folder = sentencepiece(tmp_path)  # its own BOS goes in front of plain text
    for name, count in (("llama2", 2), ("mistral", 1), ("chatml", 0)):
        encoder = RowEncoder(tokenizers.load(folder, chat_template=name))
        sample = one(encoder, "Q", "A", "Q", "A")
        assert (sample.tokens == encoder.tokenizer.bos_id).sum() == count


def test_system_text_by_policy(tmp_path):
    encoder = encoder_of(tmp_path, system="S")
    assert drawn(encoder.tokenizer, one(encoder, "Q", "A")).startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user"
    )
    refusing = CHATML.replace(
        "{{'<|im", "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{'<|im", 1
    )
    row = {"messages": chat("Q", "A", system="S")}
    with pytest.raises(RowError, match=r"template_refused.*no system"):
        encoder_of(tmp_path, refusing)(row)
    folding = encoder_of(tmp_path, refusing, fold_system=True)
    assert drawn(folding.tokenizer, folding(row)[0]).startswith("<|im_start|>user\nS\n\nQ<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chat("Q"), "no_assistant_turn"),
        (chat("Q", ""), "empty_answer"),
        (chat("Q", " \n"), "empty_answer"),
        ([{"role": "assistant", "content": "A"}], "assistant_first"),
        ([{"role": "user", "content": "Q", "weight": 1}, {"role": "assistant", "content": "A"}], "weight_on_prompt"),
    ],
)
def test_rows_that_train_nothing_say_why(tmp_path, messages, reason):
    template = CHATML.replace("{% for", "{{ messages[0].role[:0] }}{% for", 1)
    with pytest.raises(RowError) as caught:
        encoder_of(tmp_path, template)({"messages": messages})
    assert caught.value.reason == reason


def test_a_turn_without_end_is_refused(tmp_path):
    template = CHATML.replace("'<|im_end|>'", "('<|im_end|>' if message.content != 'odd' else '')")
    with pytest.raises(RowError, match="no_end_of_turn"):
        encoder_of(tmp_path, template)({"messages": chat("Q", "odd")})


def test_one_rendering_by_pieces_equals_rendering_every_prefix(tmp_path, monkeypatch):
    rng = random.Random(0)
    folder = sentencepiece(tmp_path)
    for name in templates.BUILTIN:
        encoder = RowEncoder(tokenizers.load(folder, chat_template=name))
        for _ in range(10):
            row = {"messages": chat(*(rng.choice(["a", " b\n", "c </s>", "  d"]) for _ in range(6)))}
            fast = encoder(row)
            with monkeypatch.context() as patch:
                patch.setattr(masks._Conversation, "_by_pieces", lambda *_: None)
                slow = encoder(row)
            assert fast[0].tokens.tolist() == slow[0].tokens.tolist() and (fast[0].weights == slow[0].weights).all()
            assert fast[0].flags == slow[0].flags


def test_long_conversations_take_time_in_proportion(tmp_path):
    encoder = encoder_of(tmp_path)
    (sample,) = encoder({"messages": chat(*["Hi", "Yes"] * 20_000)})
    assert (sample.weights > 0).sum() == 2 * 20_000
    with pytest.raises(RowError, match="too_many_turns"):
        encoder_of(tmp_path, QWEN3_LIKE)({"messages": chat(*["Hi", "Yes"] * 2_000)})
