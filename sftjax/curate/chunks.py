"""The part of the work that looks at one row at a time: in worker processes, by chunks, each kept as a file.

    rows 0..999 -> 00000.npz    rows 1000..1999 -> 00001.npz    ...

A chunk's file appears whole or not at all, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sftjax.curate import contamination, dedup, personal, rules, tasks, text
from sftjax.data import processes
from sftjax.data.types import RowError
from sftjax.errors import ConfigError, DataError, StorageError
from sftjax.utils import storage

ROWS = 1000  # in a chunk
VERSION = 2  # of what a chunk's file holds

_NONE = np.zeros(0, np.uint32)


@dataclass(frozen=True)
class Input:
    """One source as curation reads it."""

    name: str
    source: Any
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""


@dataclass(frozen=True)
class Work:
    """What is to be found out about each row."""

    inputs: tuple[Input, ...]
    table: tuple[rules.Rule, ...]
    index: contamination.Index
    near_words: int = 0  # 0: no near duplicates
    personal: bool = True
    tokenizer: str = ""

    def chunks(self) -> list[tuple[int, int, int]]:
        """(source, first row, row behind the last) of each chunk."""
        return [
            (number, start, min(start + ROWS, len(one.source)))
            for number, one in enumerate(self.inputs)
            for start in range(0, len(one.source), ROWS)
        ]


def look(work: Work, chunk: tuple[int, int, int]) -> dict[str, Any]:
    """What there is to say about the rows of a chunk: arrays, and `rows`, a dict for each row."""
    number, start, end = chunk
    given = work.inputs[number]
    said, keys, kinds, numbers, hashes, shingles, answers, dialogues = ([] for _ in range(8))
    for index in range(start, end):
        try:
            row = given.source[index]
            dialogue = text.read(row, given.format, given.fields)
        except RowError as error:
            said.append({"error": error.reason, "detail": error.detail})
            keys.append(bytes(16))
            kinds.append(0)
            numbers.append(_NONE)
            hashes.append([])
            shingles.append(_NONE)
            answers.append(_NONE)
            continue
        try:
            score, taken = rules.score(dialogue, work.table)
        except ConfigError as error:
            raise ConfigError(f"{given.source.location(index)}: {error}") from error
        found = [text.word_hashes(part) for _, part in dialogue.messages]
        said.append({"score": score, "taken": taken, "licence": _licence(row, given)})
        dialogues.append((said[-1], dialogue))
        if work.personal:
            said[-1]["personal"] = personal.count(part for _, part in dialogue.messages)
        keys.append(text.exact_key(dialogue))
        hashes.append(found)
        kinds.append(text.kind_of(dialogue))
        numbers.append(text.numbers_of(dialogue))
        said_by = [role == "assistant" for role, _ in dialogue.messages]
        shingles.append(_shingles(found, work))
        answers.append(_shingles([one for one, says in zip(found, said_by, strict=True) if says], work))
    _describe(work, dialogues)
    return {
        "rows": said,
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16),
        "hits": [(hit.row, hit.item, hit.starts, hit.long_starts, hit.whole) for hit in work.index.find(hashes)],
        "kinds": np.array(kinds, np.uint64),
        "numbers": np.concatenate(numbers),
        "number_counts": np.array([len(one) for one in numbers], np.int32),
        "shingles": np.concatenate(shingles),
        "shingle_counts": np.array([len(one) for one in shingles], np.int32),
        "answers": np.concatenate(answers),
        "answer_counts": np.array([len(one) for one in answers], np.int32),
        "signs": dedup.signatures(shingles) if work.near_words else np.zeros((len(said), 0), np.uint32),
    }


def _shingles(hashes: Sequence[np.ndarray], work: Work) -> np.ndarray:
    return dedup.shingles(np.concatenate(hashes), work.near_words) if work.near_words and hashes else _NONE


def _licence(row: Mapping[str, Any], given: Input) -> str:
    found = row.get("license") or row.get("licence") or given.licence
    return found if isinstance(found, str) else str(found)


def _describe(work: Work, dialogues: Sequence[tuple[dict, text.Dialogue]]) -> None:
    counts: list[int | None] = [None] * len(dialogues)
    if work.tokenizer:
        encoder = _tokenizer(work.tokenizer)
        texts = ["\n".join(part for _, part in dialogue.messages) for _, dialogue in dialogues]
        counts = [len(one.ids) for one in encoder.encode_batch(texts, add_special_tokens=False)]
    for (said, dialogue), tokens in zip(dialogues, counts, strict=True):
        said |= tasks.describe(dialogue, tokens)


_tokenizers: dict[str, Any] = {}


def _tokenizer(path: str) -> Any:
    if path not in _tokenizers:
        from tokenizers import Tokenizer

        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            _tokenizers[path] = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare exceptions
            raise StorageError(f"tokenizer={path}: no tokenizer.json can be read there ({error})") from None
    return _tokenizers[path]


# --- files of chunks ------------------------------------------------------------------------------------------------


def path_of(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Writes a chunk's file, whole or not at all."""
    arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    others = {name: value for name, value in found.items() if name not in arrays}
    buffer = io.BytesIO()
    np.savez(buffer, others=np.frombuffer(orjson.dumps(others), np.uint8), **arrays)
    storage.write_bytes(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return {**orjson.loads(arrays.pop("others").tobytes()), **arrays}


# --- processes ------------------------------------------------------------------------------------------------------


def run(
    work: Work, folder: Path, workers: int, progress: Callable[[int], None], say: Callable[[str], None] | None = None
) -> None:
    """Makes the files of all chunks that aren't there yet.

    Args:
      workers: processes; 0 = one for each core. One does it all where the work can't go to another.
      progress: called with the number of chunks that are done.
      say: told why there is one process where there could be more.

    Raises:
      DataError: a process died.
      UserError: what a worker met.
    """
    chunks = work.chunks()
    todo = [number for number in range(len(chunks)) if not path_of(folder, number).exists()]
    done = len(chunks) - len(todo)
    progress(done)
    workers = min(workers or _cores(), len(todo))
    shared = _packed(work, say or (lambda line: None)) if workers > 1 else None
    if shared is None:
        for number in todo:
            save(path_of(folder, number), look(work, chunks[number]))
            done += 1
            progress(done)
        return
    with processes.pool(workers, _use, shared) as pool:
        made = [pool.submit(_make, path_of(folder, number), chunks[number]) for number in todo]
        try:
            for one in as_completed(made):
                one.result()
                done += 1
                progress(done)
        except BrokenExecutor:
            raise DataError(
                "a worker process died (out of memory?); the same command goes on from here, and workers=1 needs less "
                "memory"
            ) from None


def _packed(work: Work, say: Callable[[str], None]) -> bytes | None:
    for rule in work.table:
        try:
            processes.packed(rule, f"rule {rule.name}")
        except ConfigError as error:
            say(f"one process looks at the rows: {error}")
            return None
    return processes.packed(work, "a source")


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


# --- in a worker ----------------------------------------------------------------------------------------------------

_work: Work | None = None


def _use(work: Work) -> None:
    global _work
    _work = work


def _make(path: Path, chunk: tuple[int, int, int]) -> None:
    save(path, look(_work, chunk))
