"""What the tools do with a model that is ready: score a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import orjson

from sftjax import loading
from sftjax.data import encode
from sftjax.data.sources import open_source
from sftjax.score import encode_rows, score_samples
from sftjax.utils import storage


def score_file(
    *,
    model: str,
    data: str,
    out: str,
    adapter: str | None = None,
    dtype: str = "float32",
    per_token: bool = False,
    template: Mapping[str, Any] | None = None,
    encoding: Mapping[str, Any] | None = None,
) -> int:
    """Scores every row of a file; see `tools/score.py` for the lines. Returns the exit code.

    Args:
      template: what `loading.open_model` takes for the chat template.
      encoding: what `encode.encoder_of` takes.
    """
    with storage.whole_file(out) as file:
        source = open_source({"path": data})
        loaded = loading.load_model(model, adapter=adapter, dtype=dtype, **(template or {}))
        encoder = encode.encoder_of(source, loaded.tokenizer, **(encoding or {}))
        samples, errors = encode_rows(source, encoder)
        lines = {}
        for number, line in score_samples(
            loaded.config, loaded.runtime, loaded.variables, samples, per_token=per_token
        ):
            lines[number] = {"row": source.location(line["index"]), **line}
            if sys.stderr.isatty():
                print(f"\r{len(lines)}/{len(samples)}", end="", file=sys.stderr, flush=True)
        rows = sorted([*lines.values(), *errors], key=lambda line: (line["index"], line.get("sample", 0)))
        file.writelines(orjson.dumps(line) + b"\n" for line in rows)
    nll, trained = (sum(line[key] for line in lines.values()) for key in ("nll", "num_trained_tokens"))
    mean = f"{nll / trained:.6f} nats over {trained:,} trained tokens" if trained else "no trained token"
    print(f"{out}: {len(lines)} samples, {mean}; {len(errors)} rows could not be used", file=sys.stderr)
    return 0
