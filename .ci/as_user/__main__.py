"""Types what README, docs and notebooks tell people to type: python3 .ci/as_user [--nightly] [--keep FOLDER] [PAGE ...]

In a clean clone, with an empty home and relative paths, in the environment that each page tells people to make: the
quickstart's, with an extra from where a page says to install it. Beside it, at the same time, a wheel is built and used
in an empty environment and folder, and the notebooks are executed where nothing is installed, as on Colab.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import given
import pages
from shell import Failed, Shell

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "from pathlib import Path; from tests import tiny_run; "
    "Path('models').mkdir(exist_ok=True); tiny_run.model(Path('models/tiny'))"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="README.md, docs/guide.md, wheel, notebooks, ... (default: all)")
    parser.add_argument("--nightly", action="store_true", help="what takes minutes as well")
    parser.add_argument(
        "--keep", type=Path, help="folder to work in, which is left as it is (default: a temporary one)"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds a command may take (default: %(default)s)")
    args = parser.parse_args()
    Shell.limit = args.limit
    folder = args.keep or Path(tempfile.mkdtemp(prefix="as-a-user-"))
    start = time.monotonic()
    lanes = [
        Lane("pages", lambda lane: run_pages(lane, args.nightly, args.pages), folder),
        Lane("elsewhere", lambda lane: run_elsewhere(lane, args.pages), folder),
    ]
    try:
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
    finally:
        for lane in lanes:
            lane.shell.stop()
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    report_what_was_left_out(args.nightly)
    passed, failed = sum(lane.passed for lane in lanes), sum(lane.failed for lane in lanes)
    print(f"as a user: {time.monotonic() - start:.0f} s")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


class Lane(threading.Thread):
    """Commands one after the other, in a folder and with a home of their own."""

    def __init__(self, name: str, work, folder: Path):
        super().__init__(name=name, daemon=True)
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        self.shell = Shell(self.folder, given.environment(home))
        self.work, self.passed, self.failed = work, 0, 0
        self.serving = False  # a server for the pages that need one, not one that a page starts
        self.trained: set[str | None] = {"quickstart"}  # configurations whose run folder is taken

    def run(self):
        try:
            self.work(self)
        except Exception as error:  # also a fault of this program's own: it must not pass for success
            self.failed += 1
            print(f"FAILED {self.name}: {type(error).__name__}: {error}", flush=True)

    def step(self, place: str, command: str, shown: str = "", **options) -> bool:
        start = time.monotonic()
        try:
            self.shell.run(command, **options)
        except Failed as error:
            self.failed += 1
            print(f"FAILED {place}: {shown or command}\n{error}", flush=True)
            return False
        self.passed += 1
        print(f"{time.monotonic() - start:6.1f} s  {place}  {shown or command}", flush=True)
        return True

    def must(self, place: str, command: str, **options) -> None:
        if not self.step(place, command, **options):
            raise RuntimeError(f"nothing can go on without {place}")


def run_pages(lane: Lane, nightly: bool, chosen: list[str]) -> None:
    clone = lane.folder / "sftjax"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    lane.shell.folder = clone
    given.write_files(clone, pages.json_block(clone))
    commands = [command for page in pages.pages(clone) for command in pages.commands(clone, page)]
    if chosen and not any(page.endswith(".md") for page in chosen):
        return
    commands = by_environment(commands)
    made = False
    for command in commands:
        first = command.text in ("bash tools/quickstart.sh", "source .venv/bin/activate")
        if chosen and command.page not in chosen and not first:
            continue
        if reason := given.why(command.text, given.NOT_RUN) or (
            None if nightly else given.why(command.text, given.NIGHTLY)
        ):
            parse(lane, command, reason)
            continue
        if not made and not first:
            lane.must("tiny model", f'python -c "{TINY}"')
            made = True
        run_command(lane, command)
        if command.text == "bash tools/quickstart.sh":
            lane.shell.update("source .venv/bin/activate")


def by_environment(commands: list[pages.Command]) -> list[pages.Command]:
    """The quickstart makes the environment; what a page has behind installing an extra comes after all that does
    without, and what it has behind using a server (another extra's) last."""
    ranks: dict[str, int] = {}
    ranked = []
    for command in commands:
        rank = 2 if "localhost:8000" in command.text else 1 if command.text.startswith("pip install") else 0
        ranks[command.page] = max(rank, ranks.get(command.page, 0))
        ranked.append((ranks[command.page], command))
    return [command for _, command in sorted(ranked, key=lambda pair: pair[0])]


def run_command(lane: Lane, command: pages.Command) -> None:
    text = given.filled(command.text)
    if "localhost:8000" in text and not lane.serving:
        lane.must("a server", "python tools/serve.py --model runs/quickstart/export", server=True)
        lane.serving = True
    if "runs/one/export" in text:
        train = given.filled("python -m sftjax.main --config=configs/quickstart.py --config.model.path=DIR")
        train += " --config.export.merge=False --config.run_dir=runs/one"
        lane.must("an adapter", f"{train} && cp -r runs/one runs/two")
    config = re.search(r"--config=configs/(\w+)\.py", text) if "-m sftjax.main" in text else None
    if config and config[1] in lane.trained and "run_dir" not in text:  # a finished run's folder isn't another one's
        text += f" --config.run_dir=runs/{command.page.split('/')[-1]}-{command.line}"
    lane.trained.add(config and config[1])
    given_in = "Hello!\n" if "--interactive" in text else ""
    lane.serving = lane.serving and "tools/serve.py" not in text
    lane.step(command.place, text, stdin=given_in, server="tools/serve.py" in text)


def parse(lane: Lane, command: pages.Command, reason: str) -> None:
    """Reads the arguments of a command that isn't run, by the program's own parser."""
    text = command.text[command.text.find("python ") :].removesuffix('"').removesuffix("...").strip()
    ours = text.startswith(("python tools/", "python -m sftjax.main"))
    if not ours:
        for word in command.text.split():  # a script, or a package to install: it must be there
            if word.endswith((".sh", ".py")) and not (lane.shell.folder / word).exists():
                lane.step(command.place, f"ls {word}")
        return
    text = text.replace("--config=... ", "--config=configs/smollm2_135m.py ")
    parser = Path(__file__).with_name("parse_only.py")
    lane.step(command.place, f"python {parser} {given.filled(text).removeprefix('python ')}", f"(parsed only) {text}")


def run_elsewhere(lane: Lane, chosen: list[str]) -> None:
    """A wheel in an empty environment and folder; the notebooks where nothing but Jupyter's kernel is installed."""
    clone, python = lane.folder / "source", newest_python()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    if not chosen or "wheel" in chosen:
        run_wheel(lane, clone, python)
    if not chosen or "notebooks" in chosen:
        run_notebooks(lane, clone, python)


def run_wheel(lane: Lane, clone: Path, python: str) -> None:
    lane.must("wheel", f"{python} -m venv wheel-env")
    lane.must("wheel", "wheel-env/bin/pip wheel --quiet --no-deps --wheel-dir dist ./source")
    lane.must("wheel", "wheel-env/bin/pip install --quiet dist/*.whl")
    lane.must("wheel", f'cd source && ../wheel-env/bin/python -c "{TINY}" && mv models ..')
    given.write_files(lane.folder, pages.json_block(clone))
    (lane.folder / "mine.py").write_text(
        "from sftjax.config import defaults\n\n\ndef get_config(arg=''):\n    config = defaults()\n"
        "    config.model.path = 'models/tiny'\n    config.data.train = ('chats.jsonl',)\n    return config\n"
    )
    command = given.filled("wheel-env/bin/python -m sftjax.main --config=mine.py --config.run_dir=runs/mine")
    lane.step("wheel", f"{command} && ls runs/mine/export/config.json")


def run_notebooks(lane: Lane, clone: Path, python: str) -> None:
    lane.must("notebooks", f"{python} -m venv colab && colab/bin/pip install --quiet ipykernel nbclient")
    if not (lane.folder / "models").exists():
        lane.must("notebooks", "colab/bin/pip install --quiet ./source")
        lane.must("notebooks", f'cd source && ../colab/bin/python -c "{TINY}" && mv models ..')
        given.write_files(lane.folder, pages.json_block(clone))
    program = Path(__file__).with_name("notebook.py")
    for number, name in enumerate(path.stem for path in sorted((clone / "notebooks").glob("*.ipynb"))):
        place = f"notebooks/{name}.ipynb"
        lane.step(place, f"colab/bin/python {program} source/{place} source work-{number}")


def newest_python() -> str:
    """As tools/setup.sh finds it."""
    found = subprocess.run(
        ["bash", "-c", "source tools/setup.sh && require_python '' && printf %s \"$PYTHON_PATH\""],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return found.stdout


def report_what_was_left_out(nightly: bool) -> None:
    commands = [command for page in pages.pages(ROOT) for command in pages.commands(ROOT, page)]
    for title, table in (("never run here", given.NOT_RUN), ("left to --nightly", {} if nightly else given.NIGHTLY)):
        left = [command for command in commands if given.why(command.text, table)]
        print(f"{title}: {len(left)} of {len(commands)} commands, for {len(table)} reasons", flush=True)
        for pattern, reason in table.items():
            places = [command.place for command in left if given.why(command.text, {pattern: reason})]
            print(f"  {reason}: {', '.join(places)}", flush=True)
            if not places:
                print(f"  (nothing on the pages is of this kind any more: {pattern})", flush=True)


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
