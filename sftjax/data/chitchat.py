"""The quickstart's conversations: human dialogues of the package chitchat-dataset 0.9.0 (MIT), read from its wheel.

    [[{sender: x, text: "Hello"}, {sender: x, text: "How are you?"}], [{sender: y, text: "fine"}], ...]
    -> user "Hello\\nHow are you?", assistant "fine", ...

Who speaks first is the user; consecutive messages of one speaker are one turn. Which side of the split a dialogue falls
on is decided by its words, so that a dialogue that is there twice (it is taken once) can't be on both.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import orjson

from sftjax.data.conversations import join_same_speaker
from sftjax.errors import DataError, StorageError

INNER_PATH = "chitchat_dataset/dataset.json"


def dialogues(wheel: str | Path, *, min_turns: int = 4) -> Iterator[dict]:
    """Rows {"id", "messages"} with at least `min_turns` turns, in the order of the file.

    Turns behind the last answer are left out, since nothing in them is trained.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = orjson.loads(archive.read(INNER_PATH))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel} is not the wheel of chitchat-dataset 0.9.0, fetch it again ({error})") from None
    seen = set()
    for name, dialogue in content.items():
        messages = _turns(dialogue["messages"])
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        key = _digest(messages)
        if len(messages) >= min_turns and key not in seen:
            seen.add(key)
            yield {"id": name, "messages": messages}


def _turns(groups) -> list[dict[str, str]]:
    lines = [line for group in groups for line in group if (line.get("text") or "").strip()]
    if len({line["sender"] for line in lines}) != 2:
        return []
    first = lines[0]["sender"]
    return join_same_speaker(
        [
            {
                "role": "user" if line["sender"] == first else "assistant",
                "content": line["text"].strip().replace("\0", ""),
            }
            for line in lines
        ]
    )


def _digest(messages) -> bytes:
    words = [" ".join(message["content"].casefold().split()) for message in messages]
    return hashlib.sha256(orjson.dumps(words)).digest()


def write_split(wheel: str | Path, directory: str | Path, *, held_out: float = 0.05) -> tuple[Path, Path]:
    """Writes train.jsonl and held_out.jsonl, and returns their paths; existing ones are kept.

    Args:
      held_out: share of the dialogues to hold out.
    """
    directory = Path(directory)
    paths = directory / "train.jsonl", directory / "held_out.jsonl"
    if all(path.is_file() for path in paths):
        return paths
    sides: tuple[list, list] = ([], [])
    for row in dialogues(wheel):
        share = int.from_bytes(_digest(row["messages"])[:8], "big") / 2**64
        sides[share < held_out].append(orjson.dumps(row))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, lines in zip(paths, sides, strict=True):
            aside = path.with_suffix(".tmp")
            aside.write_bytes(b"\n".join(lines) + b"\n")
            aside.rename(path)
    except OSError as error:
        raise StorageError(f"can't write {directory}: {error}") from None
    return paths
