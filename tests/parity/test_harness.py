"""lm-evaluation-harness on our model class and on its own for transformers: the same numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytestmark = pytest.mark.parity

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from tokenizers import Tokenizer, processors  # noqa: E402

from sftjax.assess import harness  # noqa: E402
from tests import tiny_run  # noqa: E402

TEXTS = (
    "the red cat sees a small dog",
    "the red cat sees a small dog and then the old river finds a new tree with the house of a cat",
)


@pytest.mark.parametrize("bos", ["none", "there", "added"])
def test_texts_and_continuations_score_as_in_the_harness(tmp_path, bos):
    folder = tiny_run.model(tmp_path / "model")
    if bos != "none":
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if bos == "added":
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    ours = harness.SftjaxLM(str(folder), max_length=24)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", max_length=24, batch_size=1)
    assert ours.prefix_token_id == theirs.prefix_token_id
    for kind, arguments in (
        ("loglikelihood_rolling", [(text,) for text in TEXTS]),
        ("loglikelihood", [("the red cat", " sees a dog"), ("", "a dog")]),
    ):
        requests = [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]
        got, want = (np.asarray(getattr(model, kind)(requests), np.float64) for model in (ours, theirs))
        np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=kind)
