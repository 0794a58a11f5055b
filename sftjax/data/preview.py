"""Shows samples with their trained tokens marked: as JSONL, in the terminal, and as one HTML page for offline use."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import orjson

from sftjax.data.encode import RowEncoder
from sftjax.data.tokenizer import Tokenizer
from sftjax.data.types import RowError, Sample

_CHUNK = 64  # rows encoded at once
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # data must not steer the terminal


@dataclass(frozen=True)
class Row:
    """One row of the file: its samples, or why there are none."""

    index: int
    location: str
    samples: tuple[Sample, ...] = ()
    error: RowError | None = None


def rows(source, encoder: RowEncoder, limit: int | None = None) -> Iterator[Row]:
    """Encodes the first `limit` rows of a source, in order; errors are yielded in their place."""
    total = len(source) if limit is None else min(limit, len(source))
    for start in range(0, total, _CHUNK):
        numbers, records, failed = range(start, min(start + _CHUNK, total)), [], {}
        for index in numbers:
            try:
                records.append((index, source[index]))
            except RowError as error:
                failed[index] = error
        encoded = encoder.encode_batch([record for _, record in records], [index for index, _ in records])
        results = dict(zip((index for index, _ in records), encoded, strict=True)) | failed
        for index in numbers:
            result = results[index]
            if isinstance(result, RowError):
                yield Row(index, source.location(index), error=result)
            else:
                yield Row(index, source.location(index), tuple(result))


def json_lines(tokenizer: Tokenizer, row: Row) -> Iterator[bytes]:
    """One line for each sample: index, sample, tokens, weights, text; or one with index and error."""
    if row.error is not None:
        yield orjson.dumps({"index": row.index, "error": str(row.error)}) + b"\n"
    for sample in row.samples:
        yield (
            orjson.dumps(
                {
                    "index": sample.index,
                    "sample": sample.sample,
                    "tokens": sample.tokens.tolist(),
                    "weights": sample.weights.tolist(),
                    "text": tokenizer.decode(sample.tokens),
                }
            )
            + b"\n"
        )


def runs(tokenizer: Tokenizer, sample: Sample) -> list[tuple[str, float]]:
    """Stretches of equal weight as text."""
    cuts = np.flatnonzero(np.diff(sample.weights)) + 1
    bounds = [0, *cuts.tolist(), len(sample.tokens)]
    return [(tokenizer.decode(sample.tokens[a:b]), float(sample.weights[a])) for a, b in pairwise(bounds)]


def visible(text: str) -> str:
    """`text` with control characters, which could steer a terminal, as symbols."""
    return _INVISIBLE.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 32 else "�", text)


def show(console, tokenizer: Tokenizer, row: Row) -> None:
    """Prints a row on a rich console: trained text green (other weights than 1 yellow), the rest dim."""
    from rich.text import Text

    if row.error is not None:
        console.print(Text(f"{row.location}  not used: {row.error}", style="red"))
        return
    for sample in row.samples:
        head = Text(_summary(row, sample), style="bold")
        console.print(head)
        text = Text()
        for part, weight in runs(tokenizer, sample):
            style = "dim" if not weight else "green" if weight == 1 else "yellow"
            text.append(visible(part), style=style)
        console.print(text, soft_wrap=True)
        console.print()


def _summary(row: Row, sample: Sample) -> str:
    trained = int(np.count_nonzero(sample.weights[1:]))
    flags = f"  [{', '.join(sample.flags)}]" if sample.flags else ""
    return f"{row.location}  sample {sample.sample}: {trained} of {len(sample.tokens)} tokens trained{flags}"


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;color:#222;background:#fff}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:.7rem 1rem;border-radius:6px;color:#777}
mark{background:#cdeccd;color:#0a3d0a;border-radius:3px}mark.other{background:#fdeeb5;color:#4d3b00}
h2{font-size:1rem;margin:1.6rem 0 .3rem}.flag{background:#e4e4f4;border-radius:3px;padding:0 .4rem;font-size:.85rem}
.error{color:#a00}@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}pre{background:#222;color:#999}
mark{background:#1f4d1f;color:#cfc}mark.other{background:#544300;color:#fea}.flag{background:#335}.error{color:#f88}}
"""


def sample_html(tokenizer: Tokenizer, sample: Sample) -> str:
    """One sample as a `<pre>` with trained text marked; other weights than 1 carry their number."""
    parts = []
    for text, weight in runs(tokenizer, sample):
        escaped = html.escape(visible(text))
        if not weight:
            parts.append(escaped)
        elif weight == 1:
            parts.append(f"<mark>{escaped}</mark>")
        else:
            parts.append(f'<mark class="other" title="weight {weight:g}">{escaped}</mark>')
    return f"<pre>{''.join(parts)}</pre>"


def page(tokenizer: Tokenizer, shown: Iterable[Row], title: str) -> str:
    """One self-contained HTML page."""
    body, samples, tokens, trained, errors = [], 0, 0, 0, 0
    for row in shown:
        if row.error is not None:
            errors += 1
            body.append(f'<h2 class="error">{html.escape(row.location)}: {html.escape(str(row.error))}</h2>')
        for sample in row.samples:
            samples, tokens = samples + 1, tokens + len(sample.tokens)
            trained += int(np.count_nonzero(sample.weights[1:]))
            flags = "".join(f' <span class="flag">{html.escape(flag)}</span>' for flag in sample.flags)
            summary = html.escape(_summary(row, sample).split("  [")[0])
            body.append(f"<h2>{summary}{flags}</h2>{sample_html(tokenizer, sample)}")
    share = f"{trained / tokens:.1%}" if tokens else "none"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>{samples} samples, {tokens:,} tokens, {share} of them trained; {errors} rows not used. "
        f"<mark>Trained</mark>, <mark class='other'>trained with another weight than 1</mark>, not trained.</p>"
        f"{''.join(body)}</html>\n"
    )
