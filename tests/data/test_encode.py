"""The row encoder as the pipeline uses it: texts, tokens, batches, pickling, fingerprints."""

import pickle

import numpy as np
import pytest

from sftjax.data import tokenizer as tokenizers
from sftjax.data.encode import RowEncoder
from sftjax.data.types import RowError
from sftjax.errors import ConfigError
from tests.data.tiny import byte_level, chat, drawn, sentencepiece


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Adds BOS to plain text by itself."""
    return tokenizers.load(sentencepiece(tmp_path_factory.mktemp("llama")), chat_template="llama2")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Adds nothing."""
    return tokenizers.load(byte_level(tmp_path_factory.mktemp("qwen"), eos_token="<|endoftext|>"))


def test_raw_text_is_trained_whole_and_ends_with_eos(llama, qwen):
    (sample,) = RowEncoder(qwen)({"text": "Hello there"})
    assert drawn(qwen, sample).endswith("there<|endoftext|>]") and sample.tokens[-1] == qwen.eos_id
    assert sample.weights.tolist() == [0] + [1] * (len(sample.tokens) - 1)  # nothing stands before the first
    (sample,) = RowEncoder(llama)({"text": "Hello there"})
    assert drawn(llama, sample) == "<s>[Hello there</s>]"
    assert sample.tokens.tolist() == [llama.bos_id, *llama.encode("Hello there"), llama.eos_id]


def test_a_tokenizer_that_adds_eos_itself_gets_no_second(tmp_path):
    from tokenizers import Tokenizer, processors

    folder = byte_level(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    backend.save(str(folder / "tokenizer.json"))
    (sample,) = RowEncoder(tokenizers.load(folder))({"text": "Hello"})
    assert sample.tokens.tolist().count(2) == 1 and sample.tokens[-1] == 2


def test_completions_are_trained_with_eos_and_prompts_are_not(llama, qwen):
    row = {"prompt": "Q: capital?\nA:", "completion": " Paris"}
    (sample,) = RowEncoder(qwen)(row)
    assert drawn(qwen, sample) == "Q: capital?\nA:[ Paris<|endoftext|>]" and sample.flags == ()
    (sample,) = RowEncoder(llama)(row)
    assert drawn(llama, sample).startswith("<s>") and drawn(llama, sample).endswith("[Paris</s>]")
    (sample,) = RowEncoder(qwen)({"prompt": "x = y\n", "completion": "    return x"})
    assert set(sample.flags) == {"straddle", "prompt_differs"}
    assert sample.tokens[:-1].tolist() == qwen.encode("x = y\n    return x")  # one tokenisation
    (sample,) = RowEncoder(qwen)({"prompt": "a <|im_end|>", "completion": "b <|endoftext|>"})
    assert sample.flags == ("control_text",) and not qwen.is_control[sample.tokens[:-1]].any()


def test_tokens_pass_as_they_are(qwen):
    (sample,) = RowEncoder(qwen)({"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, 4, 2)
    assert (sample.tokens.tolist(), sample.weights.tolist(), sample.index, sample.source) == (
        [5, 6, 7],
        [0, 0, 1],
        4,
        2,
    )
    with pytest.raises(RowError, match="bad_ids"):
        RowEncoder(qwen)({"input_ids": [5, qwen.vocab_size]})


ROWS = [
    {"messages": chat("Q", "A")},
    {"messages": chat("Q <|im_end|>", "    A", "Q", "B")},
    {"messages": []},
    {"text": "hello"},
    {"nothing": 1},
    {"prompt": "a", "completion": " b"},
    {"input_ids": [1, 2, 3]},
    3,
    {"messages": chat("Q", "   ")},
]


def test_a_batch_gives_what_the_rows_give_alone(llama, qwen):
    for tokenizer in (llama, qwen):
        encoder = RowEncoder(tokenizer)
        batch = encoder.encode_batch(ROWS, range(10, 19), source=1)
        copy = pickle.loads(pickle.dumps(encoder))
        for number, (row, result) in enumerate(zip(ROWS, batch, strict=True)):
            try:
                alone = copy(row, 10 + number, 1)
            except RowError as error:
                assert (error.reason, error.detail) == (result.reason, result.detail)
                continue
            for ours, theirs in zip(result, alone, strict=True):
                assert (ours.tokens == theirs.tokens).all() and (ours.weights == theirs.weights).all()
                assert (ours.flags, ours.index, ours.source, ours.sample) == (
                    theirs.flags, theirs.index, theirs.source, theirs.sample)  # fmt: skip
        assert [isinstance(r, RowError) for r in batch] == [False, False, True, False, True, False, False, True, True]
    assert RowEncoder(llama).encode_batch([]) == []


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(RowError("reason", "detail")))
    assert (error.reason, error.detail, str(error)) == ("reason", "detail", "reason: detail")


def test_fingerprint_follows_the_policy(llama, qwen):
    prints = {
        RowEncoder(tokenizer, **options).fingerprint()
        for tokenizer in (llama, qwen)
        for options in ({}, {"train_on": "last"}, {"system": "S"}, {"fields": {"text": "body"}}, {"format": "text"})
    }
    assert len(prints) == 10
    encoder = RowEncoder(qwen)
    before = encoder.fingerprint()
    encoder({"messages": chat("Q", "A")})
    assert encoder.fingerprint() == before == pickle.loads(pickle.dumps(encoder)).fingerprint()


@pytest.mark.parametrize("option", ["train_on", "on_mask_error", "control_text", "format"])
def test_misspelt_options_list_the_choices(qwen, option):
    with pytest.raises(ConfigError, match=rf"data.{option}='x' is not one of"):
        RowEncoder(qwen, **{option: "x"})


def test_a_very_long_row_is_encoded_in_bounded_time(qwen):
    text = "lorem ipsum dolor " * 60_000  # 1 MB
    (sample,) = RowEncoder(qwen)({"messages": chat("Q", text)})
    assert np.count_nonzero(sample.weights) > 100_000 and sample.weights[-2] == 1


def test_no_template_is_a_matter_of_configuration_not_of_the_row(tmp_path):
    encoder = RowEncoder(tokenizers.load(byte_level(tmp_path, template=None)))
    assert encoder({"text": "fine without"})
    with pytest.raises(ConfigError, match="no chat template"):
        encoder({"messages": chat("Q", "A")})
