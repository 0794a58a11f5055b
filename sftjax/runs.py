"""The run folder: made, proved writable and locked before anything else; what a run was, and whether it may go on.

with RunFolder.open("runs/sft") as run:
    print(*check_resume(sealed.settings, config, sealed.fingerprints, fingerprints), sep="\\n")
    run.write_json("config.json", config)
    ...
    run.check_lines(restored.step, sealed["lines"])
    run.cut_back(restored.step)

What the run was begun as (its identity: settings, fingerprints of what went in) is sealed in every checkpoint, and that
is what a continuation is compared with; `config.json` and `environment.json` are for people.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import fsspec
import jax

from sftjax import paths
from sftjax.errors import ConfigError, StorageError
from sftjax.lock import FolderLock
from sftjax.utils import storage

LINE_FILES = ("metrics.jsonl", "timing.jsonl", "samples.jsonl", "nonfinite.jsonl")
PACKAGES = (
    "sftjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
    "tokenizers",
)


class RunFolder:
    """One run's folder, local or remote (`gs://...`), held by this process until `close`."""

    def __init__(self, path: str, lock: FolderLock | None, *, writes: bool = True):
        self.path = path
        self._lock = lock
        self._writes = writes

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, primary: bool = True, dry_run: bool = False) -> RunFolder:
        """Makes the folder, proves that it can be written, and locks it.

        Args:
          path: the folder.
          primary: False in processes other than the first, which write nothing here but checkpoints.
          dry_run: only look: nothing is made, locked or written, by any method.

        Raises:
          StorageError: it can't be written, or another process has it.
        """
        path = paths.absolute(str(path).rstrip("/"))
        if dry_run:
            _look_writable(path)
        if not primary or dry_run:
            return cls(path, None, writes=not dry_run)
        _prove_writable(path)
        return cls(path, FolderLock(path))

    @property
    def checkpoints(self) -> str:
        return self.file("checkpoints")

    @property
    def recovered(self) -> str:
        """A line about a dead owner whose lock was taken over, or ""."""
        return self._lock.recovered if self._lock else ""

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def size(self, name: str) -> int:
        """Bytes of a file of the run; 0 if there is none."""
        files, path = fsspec.core.url_to_fs(self.file(name))
        try:
            return files.size(path) or 0
        except FileNotFoundError:
            return 0

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the run; None if there is none.

        Raises:
          StorageError: it is there, but can't be read.
        """
        try:
            with fsspec.open(self.file(name), "r", encoding="utf-8") as file:
                return json.load(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self.file(name)}: can't be read ({error}); restore it or use another run_dir"
            ) from error

    def read_derived(self, name: str) -> Any:
        """The content of a JSON file that the run can make again. One that can't be read is put aside, and said; by a
        dry run neither."""
        try:
            return self.read_json(name)
        except StorageError as error:
            if self._writes:
                put_aside(self.file(name), str(error.__cause__))
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file in one piece; secrets in it are blanked out."""
        self.write_text(name, json.dumps(redact(value), indent=2, default=str) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file in one piece."""
        if self._writes:
            storage.write_text(self.file(name), text)

    def has_checkpoints(self) -> bool:
        """Whether anything was saved: a run that has no checkpoint, not even a damaged one, hasn't begun."""
        files, root = fsspec.core.url_to_fs(self.checkpoints)
        try:
            names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(root, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return False
        return any(name.isdigit() or name == "damaged" for name in names)

    def check_lines(self, step: int, counts: Mapping[str, int], *, allow: Iterable[str] = ()) -> None:
        """Compares what was logged up to `step` with the numbers of lines that its checkpoint has.

        Raises:
          ConfigError: lines are gone, and "logs" isn't allowed.
        """
        for name, wanted in counts.items():
            found = sum(_line_step(line) <= step for line in _lines(self.file(name)))
            if found >= wanted:
                continue
            what = f"{self.file(name)} has {found} of the {wanted} lines that were logged up to step {step}"
            if "logs" not in allow:
                raise ConfigError(f"{what}: put it back from a copy, or go on without them with --allow=logs")
            print(f"continuing with a change: {what}")

    def cut_back(self, step: int | None) -> None:
        """Removes what was logged after `step` (None: everything), and a last line that was cut short, so that
        a resumed run logs no step twice."""
        for name in LINE_FILES:
            cut_lines(self.file(name), -1 if step is None else step)

    def release(self) -> None:
        if self._lock:
            self._lock.release()

    close = release

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def _prove_writable(path: str) -> None:
    probe = f"{path}/.writable-{os.getpid()}"
    try:
        files, _ = fsspec.core.url_to_fs(path)
        files.makedirs(path, exist_ok=True)
        with fsspec.open(probe, "wb") as file:
            file.write(b"x" * 4096)
        files.rm(probe)
    except Exception as error:  # each kind of storage has its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise StorageError(f"{path}: the run folder can't be written ({reason}); choose another run_dir") from error


def _look_writable(path: str) -> None:
    """The same without a trace, as far as that can be known: of local folders, by what is there of the path."""
    if "://" in path:
        return
    there = _existing(path)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        reason = "Permission denied" if os.path.isdir(there) else f"{there} is a file"
        raise StorageError(f"{path}: the run folder can't be written ({reason}); choose another run_dir")


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def check_space(path: str, needed: int, what: str) -> None:
    """Raises `StorageError` if a local folder can't grow to `needed` bytes, of which it may have some already."""
    there = sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
        if os.path.isfile(os.path.join(folder, name))
    )
    free = shutil.disk_usage(_existing(path)).free
    if free + there < needed:
        raise StorageError(
            f"{path}: {free / 1e9:.2f} GB are free on this disk, and the run needs up to "
            f"{(needed - there) / 1e9:.2f} GB more ({what}); make room, keep fewer checkpoints "
            "(checkpoint.save_total_limit), or choose another run_dir"
        )


def put_aside(path: str, reason: str) -> None:
    """Renames a file that can't be used to NAME.damaged, and says so."""
    files, inside = fsspec.core.url_to_fs(path)
    files.mv(inside, f"{inside}.damaged")
    print(f"{path}: can't be read ({reason}); put aside as {os.path.basename(path)}.damaged and made again")


def _lines(path: str) -> list[bytes]:
    """The lines of a file with their ends; none where there is no file."""
    try:
        with fsspec.open(path, "rb") as file:
            return file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []


def cut_lines(path: str, step: int) -> int:
    """Keeps the lines of a JSONL file whose "step" is at most `step`; returns how many went."""
    lines = _lines(path)
    kept = [line for line in lines if line.endswith(b"\n") and _line_step(line) <= step]
    if len(kept) < len(lines):
        storage.write_text(path, b"".join(kept).decode("utf-8"))
    return len(lines) - len(kept)


def _line_step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a torn or foreign line


# --- what the run is --------------------------------------------------------------------------------------------------


def environment(fingerprints: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Versions, devices, and the fingerprints of what went in; no variables of the shell, no host names."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "working_folder": os.getcwd(),  # what relative paths of the configuration begin at
        "fingerprints": dict(fingerprints or {}),
    }


SECRET_KEY = re.compile(
    r"(?i)(.*[_-])?(secret|passw(or)?d|credentials?|(api|access|private|auth|hf|hub|wandb|bearer|refresh)[_-]?(key|token))"
    r"([_-].*)?|token"
)
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[opsru]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def redact(value: Any, key: str = "") -> Any:
    """The same value with secrets blanked out: by the name of their field, or by their own form."""
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if isinstance(value, str) and value:
        return "<redacted>" if SECRET_KEY.fullmatch(key) else SECRET_VALUE.sub("<redacted>", value)
    return value


# --- whether it may go on ---------------------------------------------------------------------------------------------

# (field, verdict), the first match wins. "free": changes nothing of what is trained. "!why": the saved state can't
# be used. Anything else is the name by which --allow lets it pass; an unlisted field goes by its section's name.
RESUME_RULES = (
    (r"run_dir|log\..*|checkpoint\..*|export\..*|eval\..*|mesh\..*", "free"),
    (r"data\.(workers|preflight_rows|max_eval_rows|eval|max_dropped_fraction|max_lost_fraction)(\..*)?", "free"),
    (r"model\.(attention|remat|scan_unroll|path)", "free"),  # the weights are known by their fingerprint
    (r"train\.(logging_steps|max_nonfinite_steps)", "free"),
    (r"model\.(chat_template|end_of_turn|template_kwargs|add_tokens)(\..*)?|fingerprint\.template", "template"),
    (r"peft\.(lora_dropout|loraplus_lr_ratio)", "train"),
    (r"peft\..*", "!the saved adapter has another form"),
    (r"train\.(trainable|optim)", "!the saved optimizer state belongs to other parameters"),
    (r"model\.(params_dtype|pad_vocab_to_multiple_of)", "!the saved parameters have another form"),
    (r"seed", "data"),
    (r"fingerprint\.base", "weights"),  # of every bit of what isn't trained
    (r"fingerprint\.(\w+).*", r"\1"),
)


class Identity(NamedTuple):
    """What a run was begun as; sealed in its checkpoints.

    Attributes:
      settings: its configuration, as nested dicts.
      fingerprints: of "data", "template", "tokenizer", "weights" (by samples), and "base" (every bit of what isn't
        trained, once it is loaded).
      working_folder: what relative paths of the settings begin at.
    """

    settings: dict[str, Any]
    fingerprints: dict[str, str]
    working_folder: str


class Change(NamedTuple):
    """One field that differs from the saved run, and what that means ("free", "!why", or a name for --allow)."""

    field: str
    saved: Any
    now: Any
    verdict: str

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.saved)} -> {_short(self.now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        fields: dict[str, Any] = {}
        for name, item in value.items():
            fields.update(_fields(item, f"{prefix}.{name}" if prefix else str(name)))
        return fields
    return {prefix: value}


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], rules=RESUME_RULES) -> list[Change]:
    """The fields in which two configurations (nested dicts, as JSON has them) differ."""
    old, new = (_fields(json.loads(json.dumps(redact(value), default=str))) for value in (saved, now))
    known = {_head(field) for field in old}  # a field that the saver's version didn't have yet has its old meaning
    return [
        Change(field, old.get(field), new.get(field), _verdict(field, rules))
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and _head(field) in known
    ]


def _head(field: str) -> str:
    return ".".join(field.split(".")[:2])


def _verdict(field: str, rules) -> str:
    for regex, verdict in rules:
        match = re.fullmatch(regex, field)
        if match:
            return verdict if verdict.startswith("!") else match.expand(verdict)
    return field.split(".")[0]


def check_resume(
    saved_settings: Mapping[str, Any],
    settings: Mapping[str, Any],
    saved_fingerprints: Mapping[str, str],
    fingerprints: Mapping[str, str],
    *,
    allow: Iterable[str] = (),
) -> list[str]:
    """Compares a run with what it was begun as.

    Args:
      saved_settings, saved_fingerprints: of its `Identity`.
      fingerprints: of "data", "template", "tokenizer", "weights" (and more): a changed one must be allowed by its name.
      allow: the names given by --allow.

    Returns:
      Lines that say what differs and is accepted.

    Raises:
      ConfigError: something differs that isn't allowed; the message lists it with the flag that would allow it.
    """
    found = changes(saved_settings, settings)
    found += changes({"fingerprint": dict(saved_fingerprints)}, {"fingerprint": dict(fingerprints)})
    allowed = set(allow)
    impossible = [change for change in found if change.verdict.startswith("!")]
    refused = [change for change in found if change.verdict not in allowed | {"free"} and change not in impossible]
    if impossible:
        lines = [f"  {change} ({change.verdict[1:]})" for change in impossible]
        raise ConfigError("\n".join(["this run can't be continued with these changes; use another run_dir:", *lines]))
    if refused:
        flag = ",".join(sorted({change.verdict for change in refused} | allowed))
        lines = [f"  {change}" for change in refused]
        head = f"the run was begun with other settings; put them back, or continue all the same with --allow={flag}:"
        raise ConfigError("\n".join([head, *lines]))
    return [f"continuing with a change: {change}" for change in found]
