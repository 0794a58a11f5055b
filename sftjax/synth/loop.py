"""Does it help? A task that a model fails; fine-tuning, best of N with its verifier, fine-tuning again; measured.

    before --SFT--> first --SFT--> second        SFT on right answers; then on these and its own to new prompts, best
      |               |              |           of n, that the verifier finds right
      +---------------+--------------+---------- accuracy on the same held-out items, none of which is trained on

Tasks are reasoning-gym's, made from seeds. Each training is the main program in a process of its own. What is done is
kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sftjax import chat
from sftjax.curate.output import write_lines
from sftjax.errors import ConfigError, DataError, StorageError
from sftjax.scorers.make import make_scorer
from sftjax.scorers.statistics import bootstrap_mean
from sftjax.synth import run
from sftjax.synth.memory import check_settings
from sftjax.synth.teacher import Sampling
from sftjax.utils.storage import write_text

_MAY_CHANGE = ("output", "seeds", "control")  # between two runs in one folder
ROOT = Path(__file__).resolve().parents[2]
# Of the task's generator. Its item n under seed s is item n - 1 under s + 1: seeds have to lie far apart.
HELD_OUT_SEED, SEED_DISTANCE = 1_000_000_000, 1_000_000
STAGES = {
    "before": "before",
    "first": "after SFT",
    "control": "SFT for longer instead",
    "second": "after best of N, SFT again",
}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """One experiment.

    Attributes:
      model, output: the start, and the folder for everything made.
      task, task_settings: of reasoning-gym.
      system: system message of every prompt.
      scorer: counts a held-out answer as right where it gives 1; the task's own verifier is reported beside it.
      held_out, first, second: items to measure on; rows of the first training; prompts answered for the second one.
      n, temperature, max_new_tokens: of answers.
      train: further fields of the training's config, the same for every stage.
      control: also train on with the first rows only, for as many steps as the second training has.
    """

    model: str
    output: str
    task: str = "chain_sum"
    task_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    scorer: str = "numeric"
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int = 500
    first: int = 500
    second: int = 600
    n: int = 8
    temperature: float = 0.7
    max_new_tokens: int = 48
    train: tuple[str, ...] = ()
    control: bool = False


def improve(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the experiment, or what is left of it; writes `improve.json` and `improve.md` into the output folder."""
    folder = Path(settings.output)
    _make(folder)
    fixed = {key: value for key, value in dataclasses.asdict(settings).items() if key not in _MAY_CHANGE}
    check_settings(folder, fixed)
    held_out = make_items(settings, HELD_OUT_SEED, settings.held_out, set())
    known = {item["question"] for item in held_out}
    base = _measured(folder / "before.json", settings, settings.model, held_out, say)
    seeds = []
    for seed in settings.seeds:
        items = make_items(settings, 1 + SEED_DISTANCE * seed, settings.first + settings.second, known)
        stages = {"before": base} | _one_seed(settings, folder / f"seed-{seed}", seed, items, held_out, say)
        seeds.append({"seed": seed, **stages})
    result = {"settings": dataclasses.asdict(settings), "seeds": seeds, "gains": _gains(seeds)}
    write_text(folder / "improve.json", orjson.dumps(result, option=orjson.OPT_INDENT_2).decode() + "\n")
    write_text(folder / "improve.md", "\n".join(table(result)) + "\n")
    return result


def make_items(settings: Settings, seed: int, count: int, without: set[str]) -> list[Row]:
    """Different items of the task, as prompts with what its verifier needs; none with a question in `without`.

    Raises:
      ConfigError: no such task or setting, or it hasn't so many items; the package isn't there.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError("the tasks need the package reasoning-gym: pip install 'sftjax[eval]'") from None
    try:
        source = reasoning_gym.create_dataset(settings.task, seed=seed, size=20 * count, **settings.task_settings)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"task {settings.task}: {error}") from error
    seen, items = set(without), []
    for entry in source:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            items.append(_item(entry, settings.system))
            if len(items) == count:
                return items
    raise ConfigError(f"task {settings.task}: only {len(items)} of {count} different items; widen its settings")


def _item(entry: Mapping[str, Any], system: str) -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    return {**entry, "messages": [*messages, {"role": "user", "content": entry["question"]}]}


def _one_seed(
    settings: Settings,
    folder: Path,
    seed: int,
    items: Sequence[Row],
    held_out: Sequence[Row],
    say: Callable[[str], None],
) -> dict[str, Any]:
    _make(folder)
    first, prompts = items[: settings.first], items[settings.first :]
    rows = [{"messages": [*item["messages"], {"role": "assistant", "content": item["answer"]}]} for item in first]
    write_lines(folder / "first.jsonl", rows)
    write_lines(folder / "prompts.jsonl", prompts)
    say(f"seed {seed}: training on {len(rows)} right answers")
    model, seconds = _train(settings, folder / "first", settings.model, (folder / "first.jsonl",), seed, say)
    stages = {"first": _measured(folder / "first.json", settings, model, held_out, say) | {"train_seconds": seconds}}
    started = time.monotonic()
    report = run.synthesize(
        "rejection",
        output=str(folder / "rejection"),
        teacher=run.TeacherSettings(model=model, batch_size=64),
        sampling=Sampling(settings.temperature, max_new_tokens=settings.max_new_tokens),
        seed=seed,
        chunk=100,
        input=str(folder / "prompts.jsonl"),
        reward=f"reasoning_gym:{settings.task}",
        second=settings.scorer,
        n=settings.n,
        threshold=1.0,
    )
    kept = folder / "rejection" / run.ROWS
    say(f"seed {seed}: the verifier kept an answer to {report['rows']} of {len(prompts)} prompts")
    if not report["rows"]:
        raise DataError(f"task {settings.task}: no answer was right, so there is nothing to go on with: raise --first")
    stages["rejection"] = {
        "prompts": len(prompts),
        "kept": report["rows"],
        "mean_reward": report["reward"]["answers"].get("mean"),
        "seconds": round(time.monotonic() - started, 1),
    }
    second, seconds = _train(settings, folder / "second", model, (folder / "first.jsonl", kept), seed, say)
    stages["second"] = _measured(folder / "second.json", settings, second, held_out, say) | {"train_seconds": seconds}
    if settings.control:
        steps = orjson.loads((folder / "second" / "summary.json").read_bytes())["steps"]
        extra = (f"--config.train.max_steps={steps}",)
        longer, seconds = _train(settings, folder / "control", model, (folder / "first.jsonl",), seed, say, extra)
        found = _measured(folder / "control.json", settings, longer, held_out, say)
        stages["control"] = found | {"train_seconds": seconds}
    return stages


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"--output {folder}: can't be written ({error.strerror})") from None


# --- stages ------------------------------------------------------------------------------------------------------


def _train(
    settings: Settings,
    folder: Path,
    model: str,
    data: tuple[Path, ...],
    seed: int,
    say: Callable[[str], None],
    extra: Sequence[str] = (),
) -> tuple[str, float]:
    """The main program in a child process, unless it has run; returns (the exported model, seconds it took)."""
    export, started = folder / "export", time.monotonic()
    if not (export / "config.json").exists():
        fields = {"model.path": model, "data.train": repr(tuple(map(str, data))), "run_dir": str(folder), "seed": seed}
        command = [sys.executable, "-m", "sftjax.main", f"--config={ROOT / 'configs' / 'improve.py'}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        done = subprocess.run([*command, *settings.train, *extra], cwd=ROOT)
        if done.returncode or not (export / "config.json").exists():
            raise ConfigError(f"the training in {folder} ended with exit code {done.returncode}: see above")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes, and the export is checked
    seconds = round(time.monotonic() - started, 1)
    say(f"{folder}: trained in {seconds:.0f} s")
    return str(export), seconds


def _measured(
    path: Path, settings: Settings, model: str, held_out: Sequence[Row], say: Callable[[str], None]
) -> dict[str, Any]:
    """Greedy accuracy on the held-out items, from `path` where it was measured before."""
    if path.exists():
        return orjson.loads(path.read_bytes())
    started = time.monotonic()
    generator = chat.load(model, batch_size=64)
    outputs = generator.generate([item["messages"] for item in held_out], max_new_tokens=settings.max_new_tokens)
    found: dict[str, Any] = {"model": model, "items": len(held_out)}
    for name, spec in (("right", settings.scorer), ("verified", f"reasoning_gym:{settings.task}")):
        scorer = make_scorer(spec)
        found[name] = [scorer(item, output.text) >= 1 for item, output in zip(held_out, outputs, strict=True)]
    found |= {"accuracy": float(np.mean(found["right"])), "interval": wilson(sum(found["right"]), len(held_out))}
    found["verified_accuracy"] = float(np.mean(found["verified"]))
    found["examples"] = [output.text for output in outputs[:5]]
    found["seconds"] = round(time.monotonic() - started, 1)
    write_text(path, orjson.dumps(found).decode())
    say(f"{path}: {_percent(found)} right")
    return found


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


# --- the table ---------------------------------------------------------------------------------------------------


def _gains(seeds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Differences of stages on the same items, averaged over seeds, with 95 % intervals over items."""
    gains = {}
    for name, before, after in (
        ("SFT", "before", "first"),
        ("best of N", "first", "second"),
        ("best of N over training for longer", "control", "second"),
    ):
        if all(before in each and after in each for each in seeds):
            rights = [np.subtract(each[after]["right"], each[before]["right"], dtype=float) for each in seeds]
            mean, low, high = bootstrap_mean(np.mean(rights, axis=0))
            gains[name] = {"mean": mean, "low": low, "high": high}
    return gains


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as Markdown."""
    seeds = result["seeds"]
    stages = {stage: name for stage, name in STAGES.items() if stage in seeds[0]}
    yield f"| seed | {' | '.join(stages.values())} | prompts with a verified answer |"
    yield f"|{' --- |' * (len(stages) + 2)}"
    for each in seeds:
        cells = [_percent(each[stage]) for stage in stages]
        kept = f"{each['rejection']['kept']} of {each['rejection']['prompts']}"
        yield f"| {each['seed']} | {' | '.join(cells)} | {kept} |"
    means = [f"{np.mean([each[stage]['accuracy'] for each in seeds]):.1%}" for stage in stages]
    yield f"| mean | {' | '.join(means)} | |"
    yield ""
    for name, gain in result["gains"].items():
        yield f"- {name}: {100 * gain['mean']:+.1f} points ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"


def _percent(stage: Mapping[str, Any]) -> str:
    low, high = stage["interval"]
    return f"{stage['accuracy']:.1%} ({low:.1%} to {high:.1%})"
