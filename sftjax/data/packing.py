"""From samples to rows of fixed length.

The packing itself is Grain's (first-fit and best-fit into a number of open bins that has nothing to do with the batch
size); this module turns samples into what Grain packs and bins into the arrays of a batch.

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
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from sftjax.data.ledger import trained_tokens
from sftjax.data.types import Sample
from sftjax.errors import ConfigError

STRATEGIES = ("best_fit", "first_fit", "none", "padding_free")
OVERLONG = ("drop", "truncate", "split", "error")
LENGTH_MULTIPLE = 128

# One element per token: one array to pack instead of three.
TOKEN = np.dtype([("token", np.int32), ("target", np.int32), ("weight", np.float32)])


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


def to_element(sample: Sample, *, loss_weight: float = 1.0, share: float = 0.0) -> dict[str, Any]:
    """What Grain packs: `data` TOKEN [n], and `example` = (source, row, sample, share of its row)."""
    data = np.zeros(len(sample.tokens), TOKEN)
    data["token"] = sample.tokens
    data["target"][:-1] = sample.tokens[1:]
    data["weight"][:-1] = sample.weights[1:]
    if loss_weight != 1.0:
        data["weight"] *= np.float32(loss_weight)
    return {"data": data, "example": (sample.source, sample.index, sample.sample, share)}


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


def pack(
    elements: grain.IterDataset, strategy: str, shape: Shape, *, bins: int, shuffle: bool = False, seed: int = 0
) -> grain.IterDataset:
    """Packs elements of `to_element` into rows; "none" and "padding_free" are one open bin, so the order stays.

    Args:
      elements: gives {"data", "example"}.
      strategy: one of STRATEGIES.
      shape: from `row_shape`.
      bins: open bins of first-fit and best-fit; more pack tighter and mix over a longer stretch of the data.
      shuffle: shuffle the rows of each set of bins (their fill depends on the order).
      seed: for that shuffle.
    """
    binned = strategy in ("first_fit", "best_fit")
    packer = (
        grain_experimental.BestFitPackIterDataset
        if strategy == "best_fit"
        else grain_experimental.FirstFitPackIterDataset
    )
    return packer(
        elements,
        length_struct={"data": shape.lengths[-1]},
        num_packing_bins=bins if binned else 1,
        meta_features=["example"],
        max_sequences_per_bin=shape.max_examples,
        shuffle_bins=shuffle and binned,
        seed=seed,
    )


def assemble(rows: Sequence[dict[str, Any]], count: int, lengths: Sequence[int], pad_id: int) -> dict[str, np.ndarray]:
    """Lays packed rows out as arrays [count, L]; rows that are missing are all padding.

    Args:
      rows: up to `count` rows from `pack`.
      count: rows of the result (A * B).
      lengths: static lengths; the smallest that holds every row is taken.
      pad_id: id that stands in the padding (it has weight 0; its value doesn't matter).
    """
    used = np.array([np.count_nonzero(row["data_segment_ids"]) for row in rows] + [0] * (count - len(rows)))
    length = next(size for size in lengths if size >= used.max())
    data = np.zeros((count, length), TOKEN)
    segments = np.zeros((count, length), np.int32)
    positions = np.zeros((count, length), np.int32)
    sources = np.full((count, length), -1, np.int32)
    for i, row in enumerate(rows):
        data[i] = row["data"][:length]
        segments[i] = row["data_segment_ids"][:length]
        positions[i] = row["data_positions"][:length]
        sources[i] = np.array([-1, *(example[0] for example in row["example"])], np.int32)[segments[i]]
    column = np.arange(length, dtype=np.int32)
    padding = column >= used[:, None]
    segments = np.where(padding, segments.max(axis=1, keepdims=True) + 1, segments).astype(np.int32)
    positions = np.where(padding, column - used[:, None], positions).astype(np.int32)
    tokens = np.where(padding, np.int32(pad_id), data["token"])
    return {
        "tokens": tokens,
        "targets": np.where(padding, np.int32(pad_id), data["target"]),
        "weights": np.ascontiguousarray(data["weight"]),
        "segment_ids": segments,
        "positions": positions,
        "source_ids": sources,
    }


def simulate(lengths: Sequence[int], strategy: str, shape: Shape, *, bins: int) -> np.ndarray:
    """Real tokens of each packed row if samples of these lengths came in this order."""
    rows = lay_out(lengths, strategy, shape, bins=bins)
    return np.array([sum(lengths[number] for number in row) for row in rows], np.int64)


def lay_out(lengths: Sequence[int], strategy: str, shape: Shape, *, bins: int) -> list[list[int]]:
    """Which of the samples of these lengths each packed row would hold: the packer without the data."""
    elements = [{"data": np.zeros(n, np.uint8), "example": number} for number, n in enumerate(lengths)]
    if not elements:
        return []
    stream = grain.MapDataset.source(elements).to_iter_dataset(grain.ReadOptions(num_threads=0))
    return [[int(number) for number in row["example"]] for row in pack(stream, strategy, shape, bins=bins)]


def slots(row_tokens: np.ndarray, shape: Shape, accumulation: int) -> np.ndarray:
    """Token slots (real and padding) of each step, for rows with so many real tokens; int64 [steps]."""
    per_step = accumulation * shape.rows
    steps = -(-len(row_tokens) // per_step)
    fullest = np.pad(row_tokens, (0, steps * per_step - len(row_tokens))).reshape(steps, per_step).max(axis=1)
    return np.array(shape.lengths)[np.searchsorted(shape.lengths, fullest)] * per_step
