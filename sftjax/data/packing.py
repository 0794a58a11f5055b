"""From samples to rows of fixed length: what fits, which rows there are, and the arrays of a batch.

Which row a sample goes to is `bins`' business: first-fit or best-fit into a number of open bins that has nothing to do
with the batch size.

Two samples, `a b c` and `d e`, in a row of length 8 (weights: every token but the first of each is trained):

    tokens        a  b  c  d  e  0  0  0
    targets       b  c  0  e  0  0  0  0      shifted within a segment
    weights       1  1  0  1  0  0  0  0      the last token of a segment predicts nothing
    segment_ids   1  1  1  2  2  3  3  3      the padding tail is a segment of its own
    positions     0  1  2  0  1  0  1  2      restart at 0 in each
    source_ids    0  0  0  0  0 -1 -1 -1      -1: padding, and nothing else is

Legend: A micro-batches of accumulation, B rows, L length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sftjax.data.bins import STRATEGIES, Bins, lay_out
from sftjax.data.ledger import trained_tokens
from sftjax.data.types import Sample
from sftjax.errors import ConfigError

OVERLONG = ("drop", "truncate", "split", "error")
LENGTH_MULTIPLE = 128


class Element:
    """What is packed: a sample, the factor on its weights, and its share of its row (of the file)."""

    __slots__ = ("loss_weight", "sample", "share")

    def __init__(self, sample: Sample, *, loss_weight: float = 1.0, share: float = 0.0):
        self.sample, self.loss_weight, self.share = sample, loss_weight, share

    def __len__(self) -> int:
        return len(self.sample.tokens)

    @property
    def example(self) -> tuple[int, int, int]:
        """(source, row, sample)"""
        return self.sample.source, self.sample.index, self.sample.sample


@dataclass(frozen=True)
class Fit:
    """A sample made to fit: the pieces to pack, and what that cost.

    Attributes:
      pieces: 0, 1 or several samples of at most the length asked for.
      trained: trained tokens that the sample had.
      reason: why nothing or less than everything is left: "too_long", "truncated_to_nothing", "nothing_trained".
      lost_tokens, lost_trained: tokens in no piece; trained tokens that are no longer a target.
      repeated: tokens in two pieces (the last of one is the context with which the next begins).
    """

    pieces: tuple[Sample, ...]
    trained: int
    reason: str | None = None
    lost_tokens: int = 0
    lost_trained: int = 0
    repeated: int = 0


def fit_to_length(sample: Sample, length: int, overlong: str) -> Fit:
    """Applies the over-length policy to one sample.

    A sample without any trained token is dropped ("nothing_trained") whatever its length.

    Args:
      sample: the sample.
      length: the most tokens a piece may have.
      overlong: "drop" it; "truncate": cut behind the last trained turn that ends within `length`, or, where none does,
        at `length`; "split" into pieces that overlap by one token, so that no trained token is lost; "error" leaves
        the sample as it is with reason "too_long" for the caller to raise.
    """
    n, trained = len(sample.tokens), trained_tokens(sample)
    if trained == 0:
        return Fit((), 0, "nothing_trained", lost_tokens=n)
    if n <= length:
        return Fit((sample,), trained)
    if overlong == "drop" or overlong == "error":
        return Fit((), trained, "too_long", lost_tokens=n, lost_trained=trained)
    if overlong == "truncate":
        cut = _last_turn_end(sample.weights, length) or length
        piece = replace(sample, tokens=sample.tokens[:cut], weights=sample.weights[:cut])
        kept = trained_tokens(piece)
        if kept == 0:
            return Fit((), trained, "truncated_to_nothing", lost_tokens=n, lost_trained=trained)
        return Fit((piece,), trained, lost_tokens=n - cut, lost_trained=trained - kept)
    return _split(sample, trained, length)


def _last_turn_end(weights: np.ndarray, length: int) -> int:
    """Tokens up to the last place within `length` where a run of trained tokens ends; 0 if there is none.

    weights   0 0 1 1 0 0 1 1 1 | 1 0      length 9: the second run isn't complete, so 4
    """
    is_trained = weights != 0
    is_trained[0] = False
    ends = np.flatnonzero(is_trained[:length] & ~np.append(is_trained[1:], False)[:length])
    return int(ends[-1]) + 1 if len(ends) else 0


def _split(sample: Sample, trained: int, length: int) -> Fit:
    """Pieces [0, L), [L-1, 2L-1), ...: token L-1 is a target in the first and only context in the second."""
    n = len(sample.tokens)
    pieces, lost = [], 0
    starts = range(0, n - 1, length - 1)
    for start in starts:
        part = slice(start, start + length)
        piece = replace(sample, tokens=sample.tokens[part], weights=sample.weights[part])
        if trained_tokens(piece):
            pieces.append(piece)
        else:
            lost += len(piece.tokens)  # with nothing to learn it would only cost time
    return Fit(tuple(pieces), trained, lost_tokens=lost, repeated=len(starts) - 1)


@dataclass(frozen=True)
class Shape:
    """The rows that a packing strategy makes.

    Attributes:
      rows: rows per micro-batch, over all processes (B).
      lengths: static row lengths, ascending; a step takes the smallest that holds its rows. The last is the capacity.
      max_examples: samples per row; segments per row are one more, for the padding tail.
    """

    rows: int
    lengths: tuple[int, ...]
    max_examples: int

    @property
    def max_segments(self) -> int:
        return self.max_examples + 1


def row_shape(
    strategy: str,
    *,
    length: int,
    batch_size: int,
    max_segments: int,
    static_lengths: int = 1,
    flat_rows: int = 1,
    fill: str = "sequences",
) -> Shape:
    """Works out the rows of a strategy.

    Args:
      strategy: one of STRATEGIES.
      length: most tokens of one sample, and the row length unless padding-free; a multiple of 128.
      batch_size: sequences per micro-batch over all processes.
      max_segments: most segments of a row, the padding tail included.
      static_lengths: how many row lengths may occur ("none" and "padding_free"): each is compiled once.
      flat_rows: rows of a padding-free micro-batch: one per device that splits the batch.
      fill: padding-free only: "sequences" puts `batch_size / flat_rows` samples in a row, "tokens" as many as fit into
        `batch_size / flat_rows * length` tokens.

    Raises:
      ConfigError: a value that can't work, with the remedy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"packing={strategy!r} is unknown: choose one of {', '.join(STRATEGIES)}")
    if length < 1 or length % LENGTH_MULTIPLE:
        nearest = max(LENGTH_MULTIPLE, -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        raise ConfigError(f"max_length={length} must be a multiple of {LENGTH_MULTIPLE}: use {nearest}")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1 sequence (of {length} tokens)")
    if max_segments < 2:
        raise ConfigError(f"max_segments={max_segments} must be at least 2: a sample and the padding tail")
    if strategy in ("first_fit", "best_fit"):
        return Shape(batch_size, (length,), max_segments - 1)
    if strategy == "none":
        return Shape(batch_size, static_sizes(length, static_lengths), 1)
    if flat_rows < 1 or batch_size % flat_rows:
        raise ConfigError(
            f"batch_size={batch_size} can't be laid out in {flat_rows} flat rows: choose a multiple of {flat_rows}"
        )
    per_row = batch_size // flat_rows
    examples = per_row if fill == "sequences" else max_segments - 1
    return Shape(flat_rows, static_sizes(per_row * length, static_lengths), examples)


def static_sizes(capacity: int, count: int) -> tuple[int, ...]:
    """`count` evenly spaced row lengths up to `capacity`, multiples of 128: (2048, 4) -> (512, 1024, 1536, 2048)."""
    step = capacity / count
    return tuple(sorted({-(-round(step * (i + 1)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for i in range(count)}))


def default_bins(length: int) -> int:
    """Open bins that pack tightly without much to tokenise before the first batch: half a million tokens, 64 to 256.

    Measured at length 2048 on log-normal lengths of mean 500 (sigma 0.6, 0.8, 1.0), real tokens with best-fit:
    64 bins .973 .982 .986; 128 .977 .985 .990; 256 .980 .989 .993. First-fit is .002 to .004 below.
    """
    return max(64, min(256, 2**19 // length))


def assemble(
    rows: Sequence[Sequence[Element]], count: int, lengths: Sequence[int], pad_id: int
) -> dict[str, np.ndarray]:
    """Lays packed rows out as arrays [count, L]; rows that are missing are all padding.

    Args:
      rows: up to `count` rows.
      count: rows of the result (A * B).
      lengths: static lengths; the smallest that holds every row is taken.
      pad_id: id that stands in the padding (it has weight 0; its value doesn't matter).
    """
    used = [sum(map(len, row)) for row in rows]
    length = next(size for size in lengths if size >= max(used, default=0))
    column = np.arange(length, dtype=np.int32)
    tokens = np.full((count, length), pad_id, np.int32)
    targets = np.full((count, length), pad_id, np.int32)
    weights = np.zeros((count, length), np.float32)
    segments = np.ones((count, length), np.int32)
    positions = np.tile(column, (count, 1))
    sources = np.full((count, length), -1, np.int32)
    for i, (row, end) in enumerate(zip(rows, used, strict=True)):
        sizes = np.array([*map(len, row), length - end])  # of the segments, the padding tail among them
        ends = np.cumsum(sizes)
        tokens[i, :end] = np.concatenate([element.sample.tokens for element in row])
        targets[i, : end - 1] = tokens[i, 1:end]
        weights[i, : end - 1] = np.concatenate([element.sample.weights for element in row])[1:]
        targets[i, ends[:-1] - 1] = weights[i, ends[:-1] - 1] = 0
        if any(element.loss_weight != 1.0 for element in row):
            weights[i] *= np.repeat(np.array([*(e.loss_weight for e in row), 1.0], np.float32), sizes)
        segments[i] = np.repeat(np.arange(1, len(row) + 2, dtype=np.int32), sizes)
        positions[i] -= np.repeat((ends - sizes).astype(np.int32), sizes)
        sources[i] = np.repeat(np.array([*(e.sample.source for e in row), -1], np.int32), sizes)
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "segment_ids": segments,
        "positions": positions,
        "source_ids": sources,
    }


def open_bins(strategy: str, shape: Shape, count: int) -> Bins:
    """The bins of a strategy for rows of this shape; more of them pack tighter and mix over more of the data."""
    return Bins(strategy, count=count, capacity=shape.lengths[-1], most=shape.max_examples)


def simulate(lengths: Sequence[int], bins: Bins) -> np.ndarray:
    """Real tokens of each packed row if samples of these lengths came in this order."""
    rows = lay_out(lengths, bins)
    return np.array([sum(lengths[number] for number in row) for row in rows], np.int64)


def slots(row_tokens: np.ndarray, shape: Shape, accumulation: int) -> np.ndarray:
    """Token slots (real and padding) of each step, for rows with so many real tokens; int64 [steps]."""
    per_step = accumulation * shape.rows
    steps = -(-len(row_tokens) // per_step)
    fullest = np.pad(row_tokens, (0, steps * per_step - len(row_tokens))).reshape(steps, per_step).max(axis=1)
    return np.array(shape.lengths)[np.searchsorted(shape.lengths, fullest)] * per_step
