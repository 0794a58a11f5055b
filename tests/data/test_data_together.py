"""Files, encoder, mixture, packing and preflight together, on the real parts with a small tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from sftjax.data import preflight, tokenizer
from sftjax.data.encode import RowEncoder
from sftjax.data.mixture import Ingredient, Mixture
from sftjax.data.pipeline import build
from sftjax.data.sources import open_source

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """A byte-level tokenizer with ChatML."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(CONTROL)
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.load(folder, chat_template="chatml")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(60):
        turns = [("user", f"question {i}"), ("assistant", "yes " * rng.integers(1, 12))] * rng.integers(1, 3)
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    lines[20] = '{"messages": [{"role": "user"'
    lines[30] = json.dumps({"messages": [{"role": "user", "content": "nobody answers"}]})
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"text": f"page {i} " * 4}) + "\n" for i in range(10)))
    return tmp_path


def test_from_files_to_batches_with_and_without_workers(chatml, data):
    sources = [open_source({"path": str(data / name)}) for name in ("chat.jsonl", "pages.jsonl")]
    ingredients = [
        Ingredient(sources[0], RowEncoder(chatml)),
        Ingredient(sources[1], RowEncoder(chatml, format="text"), replay=True),
    ]
    mixture = Mixture(ingredients, replay_share=0.1, seed=1, epochs=2)
    options = {"length": 256, "batch_size": 2, "packing_bins": 4, "max_dropped": 0.1}
    report = preflight.run(mixture, chatml, **options)
    report.check()
    assert report.complete and report.rows_dropped == 2 and report.stop_trained == 1.0
    assert sum(entry["count"] for entry in report.dropped.values()) == 2
    dropped = {row for entry in report.dropped.values() for rows in entry["rows"].values() for row in rows}
    assert dropped == {f"{data}/chat.jsonl:21", f"{data}/chat.jsonl:31"}
    chats, pages = report.per_source.values()
    assert chats["conversations"] and not pages["conversations"]
    assert 0 < chats["trained_share"] < 1 and pages["trained"] == pages["tokens"] - pages["samples"]

    with build(mixture, pad_id=chatml.pad_id, **options) as pipeline:
        items = list(pipeline)
    assert len(items) == report.steps
    assert sum(item.info.real_tokens for item in items) == report.tokens_to_come
    with build(mixture, pad_id=chatml.pad_id, workers=1, position=items[3].position, **options) as pipeline:
        for one, other in zip(items[4:], pipeline, strict=True):
            assert one.position == other.position
            for name, array in one.batch.items():
                np.testing.assert_array_equal(array, other.batch[name])

    (stop,) = chatml.stop_ids
    batch = items[0].batch
    at_stop = (batch["targets"] == stop) & (batch["weights"] > 0)
    assert at_stop.sum() > 0
    text = chatml.decode(batch["targets"][batch["weights"] > 0].tolist())
    assert "question" not in text and "yes" in text
