"""What messages and pages name exists: settings, commands with their flags, files.

Messages are the string literals of sftjax/ and tools/ that hold more than one word (docstrings are for programmers;
those of tools are their help), the commands in templates, and the shell scripts. Pages are README, docs/ and the
notebooks. A name that isn't ours and looks like one of ours goes into one of the three lists here, with the reason.

A failure names the file and line, and the nearest that exists.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sftjax import arguments
from sftjax import config as config_lib
from sftjax.curate import settings as curation

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "docs", "notebooks", "sftjax", "tests", "tools")
GAP = "\0"  # stands for what an f-string puts in

# Dotted names that are no settings, files or Python objects.
OTHER_NAMES = {
    "e.g": "an abbreviation",
    "llama.cpp": "a program",
    "state.system": "a variable of a Jinja template",
    "rope.scaling.type": "a key of GGUF",
    "rope_parameters.factor": "a field of a model's config.json",
    "config.o_bias": "a field of ModelConfig, in the page on new families",
    "stream_options.include_usage": "a field of OpenAI's protocol",
    "exchange.response": "what a rule of curation is given",
    "packing.fit_to_length": "a function, in an error of ours",
    "llama.read_seed_oss": "a function that the page on new families writes",
    "llama.write_seed_oss": "a function that the page on new families writes",
    "b.*": "part of a regular expression",
    "d.*": "part of a regular expression",
    "config.*": "every setting",
    "kept.*": "a file of any ending",
    "win.*": "the rules whose names begin so",
}
# Flags of other programs (those with a hyphen are never ours, and not looked at).
OTHER_FLAGS = {
    **dict.fromkeys(("nodes", "worker", "command", "cluster", "workload"), "of srun, gcloud and xpk"),
    "merge": "of llama.cpp's gguf-split",
    "quiet": "of pip, in the notebooks",
}
# Files that a person has or names, in examples; and files of other programs.
OTHER_FILES = {
    **dict.fromkeys(("a.json", "a.jsonl", "b.parquet", "plain.jsonl", "alpaca.json"), "somebody's data"),
    "pretraining.txt": "somebody's data",
    **dict.fromkeys(("x.whl", "inner.json"), "somebody's data, in an archive"),
    **dict.fromkeys(("words.txt", "mine.py", "file.py"), "somebody's rules of curation"),
    "question.jsonl": "FastChat's questions of MT-Bench",
    "tokenizer.ggml.model": "a key of GGUF",
    "configuration_seed_oss.py": "a file of transformers",
    "modeling_seed_oss.py": "a file of transformers",
}

TRAINING = config_lib.field_names(config_lib.defaults())
SETTINGS = {*TRAINING, *curation.field_names()}
GROUPS = {name.partition(".")[0] for name in SETTINGS if "." in name}
ENDINGS = {
    *("json", "jsonl", "ndjson", "parquet", "csv", "tsv", "txt", "log", "md", "html", "svg", "css", "js", "j2"),
    *("jinja", "py", "ipynb", "sh", "toml", "yaml", "yml", "npz", "npy", "safetensors", "gguf", "bin", "pt", "model"),
    *("zip", "gz", "bz2", "xz", "zst", "whl", "tar"),
}


class Text(NamedTuple):
    place: str  # FILE:LINE
    text: str
    is_code: bool = False  # Python in a page: its names are its own


# --- where names are -------------------------------------------------------------------------------------------------


def literals(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, text with gaps, whether it is a docstring) of each string in a Python file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body[0] for node in ast.walk(tree) if isinstance(node, holders) and node.body]
    docstrings = {id(first.value) for first in bodies if isinstance(first, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            pieces = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
            yield node.lineno, "".join(pieces), False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value, id(node) in docstrings


@functools.cache
def python_files() -> list[Path]:
    return sorted(path for folder in ("sftjax", "tools") for path in (ROOT / folder).rglob("*.py"))


def messages() -> Iterator[Text]:
    for path in python_files():
        name = path.relative_to(ROOT)
        for line, text, is_docstring in literals(path):
            if " " in text.strip() and (name.parts[0] == "tools" or not is_docstring):
                yield Text(f"{name}:{line}", text)
    for path in sorted((ROOT / "tools").glob("*.sh")):
        yield from lines(path, path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "sftjax").rglob("*.j2")):
        for line in lines(path, path.read_text(encoding="utf-8")):
            if re.search(r"tools/|--config|sftjax\.main", line.text):  # the rest is CSS, and variables of the page
                yield line


def pages() -> Iterator[Text]:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        is_code = False
        for line in lines(path, path.read_text(encoding="utf-8").replace("\\\n", "\\ ")):
            if line.text.startswith("```"):
                is_code = not is_code and line.text.strip() in ("```python", "```jinja", "```json")
            yield line._replace(is_code=is_code)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for line in "".join(cell["source"]).splitlines():
                yield Text(str(path.relative_to(ROOT)), line, cell["cell_type"] == "code")


def lines(path: Path, text: str) -> Iterator[Text]:
    return (Text(f"{path.relative_to(ROOT)}:{n}", line) for n, line in enumerate(text.splitlines(), 1))


@functools.cache
def everything() -> list[Text]:
    return [*messages(), *pages()]


# --- what there is ---------------------------------------------------------------------------------------------------


class _Asked(Exception):
    pass


def _options_of(path: Path) -> set[str]:
    """Names of a tool's flags: of its parser, or of those that it and what it imports define."""
    source = path.read_text(encoding="utf-8")
    assert "ArgumentParser(" not in source, f"{path.name}: sftjax.arguments.Parser tells mistakes in one line: use that"
    if "Parser(" not in source:
        defined = set(re.findall(r'\bDEFINE_\w+\(\s*"(\w+)"', source))
        return defined | {"config"} if "config_file" in source else defined
    found: set[str] = set()

    def parse_args(self, *_):
        found.update(self._spellings().values())
        raise _Asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments.Parser, "parse_args", parse_args)
        program = runpy.run_path(str(path), run_name="asked")
        with pytest.raises(_Asked):
            program["main"]()
    return {name.removeprefix("--") for name in found}


@functools.cache
def flags() -> dict[str, set[str]]:
    """The flags of each program, by the name it is called by."""
    found = {f"tools/{path.name}": _options_of(path) for path in sorted((ROOT / "tools").glob("*.py"))}
    found["sftjax.main"] = _options_of(ROOT / "sftjax" / "main.py")
    for path in sorted((ROOT / "tools").glob("*.sh")):
        found[f"tools/{path.name}"] = set(re.findall(r"^\s*(?:[\w -]+\| )?--([\w]+)[=*|)]", path.read_text(), re.M))
    return {program: names | {"help"} for program, names in found.items()}


@functools.cache
def file_names() -> set[str]:
    """Names of files that the code reads or writes (a literal that is a path and no sentence), or that are here."""
    found = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    found |= {path.name for path in ROOT.iterdir()}
    for path in python_files():
        found |= {text.rsplit("/", 1)[-1].split(GAP)[-1] for _, text, _ in literals(path) if " " not in text}
    return {name for name in found if re.fullmatch(r"[\w.-]+", name)}


def is_python(name: str) -> bool:
    """Whether it is a module of ours, of what we build on or of the standard library, or something in one."""
    parts = name.split(".")
    if parts[0] not in ("sftjax", "configs", "jax", "transformers") and parts[0] not in sys.stdlib_module_names:
        return False
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[count:])
    return False


# --- what is wrong ---------------------------------------------------------------------------------------------------

BEFORE = rf"(?<![\w./{GAP}*<-])"  # a name begins here, and not in the middle of another, or behind a gap
DOTTED = re.compile(
    BEFORE + r"(?P<flag>--)?(?P<name>[a-z_][a-z0-9_]*(?:\.(?:[a-z_][a-z0-9_]*|\*))+)" + rf"(?![\w(/{GAP}]|\.[\w{GAP}])"
)
FLAG = re.compile(r"(?<![\w-])--(?P<name>[a-z][\w-]*)(?![\w-])")
COMMAND = re.compile(
    r"(?:python3?|bash|python -m) (?P<program>tools/\w+\.(?:py|sh)|-m sftjax\.main|sftjax\.main)"
    r"(?P<rest>(?:(?!\bpython |\bbash )[^`|;&\n])*)"
)
PATH = re.compile(rf"{BEFORE}(?P<name>(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/])(?![\w{GAP}{{<*$])")
FILE = re.compile(
    rf"(?:{BEFORE}|(?<=[A-Z]/))(?P<name>[A-Za-z][\w-]*(?:\.[\w-]+)*\.(?:{'|'.join(sorted(ENDINGS))}))(?![\w(/{GAP}]|\.\w)"
)


def wrong_settings(text: Text) -> Iterator[str]:
    for match in DOTTED.finditer(text.text):
        name = match["name"]
        is_flag = match["flag"] is not None
        if text.is_code and not name.startswith("config."):
            continue
        if is_flag and not name.startswith("config."):
            continue
        setting = name.removeprefix("config.")
        if setting in SETTINGS or name in OTHER_NAMES or (setting.endswith(".*") and setting[:-2] in GROUPS):
            continue
        if not is_flag and (name.rpartition(".")[2] in {*ENDINGS, "weight"} or is_python(name)):
            continue
        if name.startswith("config.") and setting in GROUPS:
            continue
        yield f"{name} is no setting; {_nearest(setting, SETTINGS)}"


def wrong_flags(text: Text) -> Iterator[str]:
    known = set().union(*flags().values())
    for match in FLAG.finditer(text.text):
        name, is_script = match["name"], text.place.partition(":")[0].endswith(".sh")
        if name in known or name in OTHER_FLAGS or name.startswith("xla_") or is_script:
            continue
        if "-" not in name or name.replace("-", "_") in known:
            yield f"no program has a flag --{name}; {_nearest(name.replace('-', '_'), known)}"
    for match in COMMAND.finditer(text.text):
        program = match["program"].removeprefix("-m ")
        if program not in flags():
            yield f"there is no program {program}; {_nearest(program, flags())}"
            continue
        try:
            words = shlex.split(match["rest"], comments=True)
        except ValueError:  # a command that goes on in another string
            words = match["rest"].split()
        for word in words:
            name = word.removeprefix("--").partition("=")[0].partition(".")[0]
            if word.startswith("--") and re.fullmatch(r"[a-z]\w*", name) and name not in flags()[program]:
                yield f"{program} has no flag --{name}; {_nearest(name, flags()[program])}"


def wrong_files(text: Text) -> Iterator[str]:
    for match in PATH.finditer(text.text):
        name = match["name"].rstrip(".")
        if not re.search(r"[A-Z]{3}", name.removesuffix("README.md")) and not (ROOT / name).exists():
            yield f"there is no file {name}"
    for match in FILE.finditer(COMMAND.sub("", text.text)):  # what is given to a command is somebody's own
        name = match["name"]
        if name not in file_names() and name not in OTHER_FILES and not re.search(r"[A-Z]{3}", name):
            yield f"nothing here reads or writes a file {name}; {_nearest(name, file_names())}"


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"the nearest is {close[0]}" if close else "nothing is near it"


@pytest.mark.parametrize("wrong", [wrong_settings, wrong_flags, wrong_files], ids=lambda check: check.__name__)
def test_what_messages_and_pages_name_exists(wrong):
    problems = [f"{text.place}: {problem}" for text in everything() for problem in wrong(text)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (wrong_settings, "choose another adapter.target_modules"),
        (wrong_settings, "raise data.max_dropped to 0.5, or mend the rows"),
        (wrong_settings, f"data.overlong={GAP} is unknown"),
        (wrong_settings, "add --config.train.lr=1e-4 to it"),
        (wrong_settings, "set near.enabled"),
        (wrong_flags, "add --overwrite to the command"),
        (wrong_flags, "give --max-length as well"),
        (wrong_flags, "run python tools/plan.py --topolgy=cpu again"),
        (wrong_flags, "run python tools/plan.py --sweep=cpu again"),  # a flag of another program
        (wrong_flags, "python tools/planner.py --config=FILE"),
        (wrong_files, "start from configs/nothing.py"),
        (wrong_files, "the rows are in notfinite.jsonl"),
    ],
)
def test_what_does_not_exist_is_found(wrong, text):
    assert list(wrong(Text("here:1", text)))


@pytest.mark.parametrize(
    "text",
    [
        "set data.over_length='split', or --config.near.mode=off; see mesh.* and data.train",
        f"python tools/plan.py --config=configs/llama7b.py --topology={GAP} and python -m sftjax.main --resume={GAP}",
        f"RUN/preflight.json, report.html, {GAP}/anything.json, configs/NAME.py, sys.argv, runs/mine/export, x.y()",
    ],
)
def test_what_exists_is_left_alone(text):
    checks = (wrong_settings, wrong_flags, wrong_files)
    assert not [problem for wrong in checks for problem in wrong(Text("here:1", text))]


def test_the_lists_hold_nothing_that_is_no_longer_named():
    said = " ".join(text.text for text in everything())
    assert not [name for name in (*OTHER_NAMES, *OTHER_FLAGS, *OTHER_FILES) if name not in said]
