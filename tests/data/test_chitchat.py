"""The quickstart's conversations, from a wheel of the same form and (where it has been downloaded) the real one."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from sftjax.data import chitchat
from sftjax.errors import DataError


def wheel(path: Path, *dialogues) -> Path:
    content = {
        f"d{i}": {"messages": [[{"text": text, "sender": sender} for sender, text in lines]]}
        for i, lines in enumerate(dialogues)
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(chitchat.INNER_PATH, json.dumps(content))
    return path


LONG = [("x", "Hello"), ("x", "How are you?"), ("y", " fine "), ("x", "ok"), ("x", ""), ("y", "so"), ("x", "bye")]


def test_speakers_become_roles_and_their_lines_one_turn(tmp_path):
    loud = [(who, text.upper()) for who, text in LONG]
    short, alone, three = LONG[:3], [("x", "a")] * 9, [*LONG, ("z", "who?")]
    rows = list(chitchat.dialogues(wheel(tmp_path / "w.whl", short, LONG, alone, three, loud)))
    assert rows == [  # the loud one has the same words, and is taken once
        {
            "id": "d1",
            "messages": [
                {"role": "user", "content": "Hello\nHow are you?"},
                {"role": "assistant", "content": "fine"},
                {"role": "user", "content": "ok"},
                {"role": "assistant", "content": "so"},
            ],
        }
    ]


def test_split_by_dialogue(tmp_path):
    many = [[(who, f"{text} {n}") for who, text in LONG] for n in range(200)]
    path = wheel(tmp_path / "w.whl", *many)
    train, held_out = chitchat.write_split(path, tmp_path / "out", held_out=0.2)
    sides = [{json.loads(line)["id"] for line in file.read_text().splitlines()} for file in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200 and 20 < len(sides[1]) < 60
    before = train.read_bytes()
    chitchat.write_split(wheel(tmp_path / "w2.whl", *many[::-1]), tmp_path / "again", held_out=0.2)
    first, again = (
        sorted(json.loads(line)["messages"][0]["content"] for line in text.splitlines())
        for text in (before, (tmp_path / "again/train.jsonl").read_bytes())
    )
    assert first == again  # the side depends on the words alone
    assert chitchat.write_split(tmp_path / "gone.whl", tmp_path / "out") == (train, held_out)  # kept, not made anew


def test_a_wrong_file_is_named(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"x.whl is not the wheel of chitchat-dataset"):
        list(chitchat.dialogues(tmp_path / "x.whl"))


@pytest.mark.skipif(
    not os.environ.get("SFTJAX_CHITCHAT"), reason="set SFTJAX_CHITCHAT to chitchat_dataset-0.9.0's wheel"
)
def test_the_real_wheel():
    rows = list(chitchat.dialogues(os.environ["SFTJAX_CHITCHAT"]))
    assert len(rows) > 3000
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert len(roles) >= 4 and roles == ["user", "assistant"] * (len(roles) // 2)
