"""A training run, top to bottom: model, data, program, restore, loop, export.

setup      the run folder is locked, model and data are opened and checked, shapes are settled (`job.py`)
restore    weights are read; a run that was interrupted goes on from its newest sound checkpoint, bit for bit
loop       step, log (one step late, so that logging never holds up the device), evaluate, save
finish     the best checkpoint is exported, loaded again, compared; report and summary (`finish.py`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sftjax import (
    compat,
    digest,
    finish,
    finished,
    phases,
    plan,
    plan_fit,
    run_evaluation,
    runs,
    samples,
    stopping,
    topology,
    tree,
)
from sftjax import config as config_lib
from sftjax.data import pipeline as pipelines
from sftjax.errors import Diverged
from sftjax.evaluate import Patience
from sftjax.job import Job, check_finished, load_variables, sealed_identity, setup
from sftjax.phases import phase
from sftjax.runlog import RunLog
from sftjax.utils import storage


def run(config: config_lib.ConfigDict, *, allow: Sequence[str] = (), dry_run: bool = False, preflight: str = "") -> int:
    """Trains as the configuration says, from the start or from where the same run folder stands.

    Args:
      dry_run: everything up to the first step, and nothing is left behind, but the data's ledger in the file
        `preflight`, where one is given.

    Raises:
      UserError: with the exit code of its kind (see `errors`).
    """
    if jax.process_index() != 0:
        phases.be_quiet()
    if not dry_run:
        use_compile_cache()
    config_lib.check(config, num_devices=jax.device_count())
    with (
        runs.RunFolder.open(config.run_dir, primary=jax.process_index() == 0, dry_run=dry_run) as folder,
        stopping.StopSignal(before_exit=folder.release) as stop,
    ):
        with stop.nothing_to_lose("preparing"):
            summary = folder.read_derived(finished.SUMMARY)
            missing = finish.missing(folder, summary) if summary else []
            if summary:
                check_finished(config, folder)
            if summary and not missing:
                print(f"{folder.path}: this run is finished. Add --new to train again in a new folder.")
                return 0
            if missing:
                print(f"{folder.path}: this run is finished, but {', '.join(missing)} isn't there (whole): made again")
            job = setup(config, folder, allow)
            step = plan.step_of(config, job.program, topology.here())
            print(plan.summary(step))
            if too_large := plan_fit.warning(config, step):
                print(too_large)
            if dry_run:
                if preflight:
                    storage.write_text(preflight, json.dumps(job.ledger, indent=2) + "\n")
                return 0
            state, frozen, progress = restore(job)
        job = dataclasses.replace(job, stop=stop)
        try:
            state = loop(job, state, frozen, progress)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise plan_fit.out_of_memory(config, topology.here(), error) from error
        with stop.nothing_to_lose("exporting"):
            finish.finish(job, state, frozen)
    return 0


def resume(run_dir: str, *, config=None, allow: Sequence[str] = (), dry_run: bool = False, preflight: str = "") -> int:
    """Continues a run with the configuration saved in its folder.

    Raises:
      ConfigError: there is no run in that folder.
    """
    sealed = sealed_identity(runs.RunFolder.open(run_dir, dry_run=True))
    saved = config_lib.of_run(run_dir, sealed and sealed.settings)
    saved.run_dir = run_dir  # the folder may have been moved
    return run(saved if config is None else config, allow=allow, dry_run=dry_run, preflight=preflight)


def use_compile_cache() -> None:
    """Compiled programs are kept on disk: a second start of the same job doesn't compile again.

    Where JAX was told a folder of its own (JAX_COMPILATION_CACHE_DIR), its other settings are left alone too.
    """
    if not jax.config.jax_compilation_cache_dir:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "sftjax", "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    step: int = 0
    position: dict[str, Any] | None = None
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_examples: int = 0
    train_nll: float = 0.0
    train_weight: float = 0.0
    tokens_by_source: dict[str, int] = dataclasses.field(default_factory=dict)  # where there are several
    window: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float = math.inf
    waited: int = 0
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)  # what is trained, from what, on what
    lines: dict[str, int] = dataclasses.field(default_factory=dict)  # of each file that grows

    def to_json(self) -> dict[str, Any]:
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("step", "position")}
        return {**fields, "best": None if math.isinf(self.best) else self.best}

    @classmethod
    def from_json(cls, step: int, position: dict[str, Any], meta: dict[str, Any]) -> Progress:
        return cls(step=step, position=position, **{**meta, "best": math.inf if meta["best"] is None else meta["best"]})


# --- restore -------------------------------------------------------------------------------------------------------


def restore(job: Job):
    """Reads the weights, and the newest sound checkpoint if there is one.

    Returns:
      (state, frozen leaves, progress).
    """
    with finish.open_checkpoints(job) as checkpoints:
        if checkpoints.latest_step() is not None and job.measures and not run_evaluation.untrained_is_known(job):
            print("what the untrained model scored can't be read: evaluated again")
            state, frozen = job.program.init_state(load_variables(job))
            run_evaluation.evaluate_all(job, state, frozen, 0)
            del state, frozen  # before the trained ones take their place
        with phase("looking for a checkpoint"):
            restored = checkpoints.restore(job.program.abstract_state)
    if restored is None:
        job.folder.cut_back(None)
        with phase("reading the weights"):
            state, frozen = jax.block_until_ready(job.program.init_state(load_variables(job)))
        return state, frozen, Progress(identity=whole_identity(job, frozen))
    frozen = {}
    if job.program.abstract_frozen:
        with phase("reading the weights"):
            _, frozen = tree.partition(load_variables(job), job.program.trainable_regex)
    progress = Progress.from_json(restored.step, restored.position, restored.meta)
    identity = whole_identity(job, frozen)
    if (base := progress.identity.get("fingerprints", {}).get("base")) is not None:
        now = {"base": identity["fingerprints"]["base"]}
        for line in runs.check_resume({}, {}, {"base": base}, now, allow=job.allow):
            print(line)
    job.folder.check_lines(restored.step, progress.lines, allow=job.allow)
    job.folder.cut_back(restored.step)
    print(f"continuing from step {restored.step} of {job.total_steps}")
    return restored.state, frozen, dataclasses.replace(progress, identity=identity)


def whole_identity(job: Job, frozen) -> dict[str, Any]:
    """The run's identity, with a fingerprint of every bit of the frozen weights (computed where they are)."""
    leaves = digest.digest(tree.flatten(frozen))
    base = hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest() if leaves else ""
    return job.identity._replace(fingerprints={**job.identity.fingerprints, "base": base})._asdict()


# --- loop ----------------------------------------------------------------------------------------------------------


def loop(job: Job, state, frozen, progress: Progress):
    """Steps until the end of the data, the last step, early stopping, or a request to stop.

    Raises:
      StopRequested: asked to; everything is saved.
      Diverged: losses stayed non-finite; what is saved is sound.
    """
    config = job.config
    rows = job.program.local_rows(job.batch_rows)
    patience = Patience(config.eval.early_stopping_patience, progress.best, progress.waited)
    with (
        finish.open_checkpoints(job) as checkpoints,
        ledger_completed(job),
        open_log(job, progress.step) as log,
        train_pipeline(job, rows, progress.position) as pipeline,
    ):
        if progress.step == 0:
            with job.stop.nothing_to_lose("evaluating the untrained model"):
                measure(job, state, frozen, log, 0)
        pending = None
        stop_early = done = compiled = False
        items = iter(pipeline)
        while not (done or stop_early) and progress.step < job.total_steps:
            item = next_item(items, pending, log)
            if item is None:
                break
            batch = job.program.put(item.batch, item.info.rows, job.batch_rows)
            if compiled:
                state, figures = compat.in_turn(job.program.train_step(state, frozen, batch))
            else:
                with job.stop.nothing_to_lose("compiling"), log.phase("compiling, and the first step"):
                    state, figures = jax.block_until_ready(job.program.train_step(state, frozen, batch))
                compiled = True
            checkpoints.poll()
            if pending:
                record(job, progress, pending, log)
            progress.step += 1
            storage.moment("step", progress.step)
            progress.position = item.position
            step = progress.step
            pending = (step, figures, item)
            done = step == job.total_steps
            stopping_now = job.stop.reached(step)
            evaluating = done or (config.eval.eval_steps and step % config.eval.eval_steps == 0)
            saving = config.checkpoint.save_steps and step % config.checkpoint.save_steps == 0
            if evaluating or saving or stopping_now:
                record(job, progress, pending, log)
                pending = None
                stop_early = save(job, checkpoints, state, frozen, progress, patience, log, evaluating)
            if stopping_now and not done:
                checkpoints.wait()
                raise stopping.StopRequested(
                    f"stopped after step {step}, which is saved; the same command continues the run"
                )
        if pending:  # the data ended before the number of steps that was foreseen
            record(job, progress, pending, log)
            save(job, checkpoints, state, frozen, progress, patience, log, True)
        with log.phase("writing the checkpoint"):
            checkpoints.wait()
    return state


@contextlib.contextmanager
def ledger_completed(job: Job) -> Iterator[None]:
    """While training runs, the rows that the preflight left out are read, and the ledger is written down again."""
    thread = None
    if job.preflight is not None and jax.process_index() == 0:
        thread = job.preflight.finish(lambda report: job.folder.write_json("preflight.json", report.to_dict()))
    try:
        yield
    finally:
        if thread is not None:
            thread.close()


def open_log(job: Job, step: int) -> RunLog:
    return RunLog(
        job.folder.path,
        continued_from=step or None,
        total_steps=job.total_steps,
        tensorboard=job.config.log.tensorboard,
        wandb_project=job.config.log.wandb_project,
        config=runs.redact(job.config.to_dict()),
    )


def train_pipeline(job: Job, rows: Sequence[int], position: dict[str, Any] | None) -> pipelines.Pipeline:
    return pipelines.build(
        job.mixture,
        pad_id=job.opened.tokenizer.pad_id,
        rows=rows,
        reduction=job.config.train.loss_reduction,
        workers=job.config.data.workers,
        position=position,
        **job.batching,
    )


def next_item(items: Iterator, pending, log) -> pipelines.Item | None:
    """The next batch, None at the end. The wait for it counts where the step before is finished already: then the
    device stood idle for it."""
    began = time.monotonic()
    item = next(items, None)
    if pending is None or pending[1]["finite"].is_ready():
        log.throughput.waited(time.monotonic() - began)
    return item


def record(job: Job, progress: Progress, pending, log) -> None:
    """Takes in the figures of a finished step; at the end of a logging window writes them down.

    Raises:
      Diverged: too many steps in a row weren't finite.
    """
    step, figures, item = pending
    figures = {name: np.asarray(value, np.float64) for name, value in jax.device_get(figures).items()}
    by_source = [figures.pop(name) for name in ("nll_by_source", "weight_by_source") if name in figures]
    figures = {name: float(value) for name, value in figures.items()}
    info = item.info
    log.finished(info, figures["trained"])
    progress.num_tokens += info.real_tokens
    progress.num_examples += info.num_examples
    for name, counts in info.tokens_by_source.items() if by_source else ():
        progress.tokens_by_source[name] = progress.tokens_by_source.get(name, 0) + counts["tokens"]
    window = progress.window
    if figures["finite"]:
        for name, nll, weight in zip(info.tokens_by_source, *by_source, strict=True) if by_source else ():
            window[f"nll/{name}"] = window.get(f"nll/{name}", 0.0) + float(nll)
            window[f"weight/{name}"] = window.get(f"weight/{name}", 0.0) + float(weight)
        progress.num_trained_tokens += int(figures["trained"])
        progress.train_nll += figures["nll"]
        progress.train_weight += figures["weight"]
        for name in ("nll", "weight", "trained", "correct"):
            window[name] = window.get(name, 0.0) + figures[name]
        window["skipped_in_a_row"] = 0
    elif figures.get("overflow"):
        log.say(f"step {step}: a gradient overflowed float16; the step is skipped, and the loss scale halved")
    else:
        window["skipped"] = window.get("skipped", 0) + 1
        window["skipped_in_a_row"] = window.get("skipped_in_a_row", 0) + 1
        log.not_finite(step, figures, [key for micro in info.examples for row in micro for key in row])
        if window["skipped_in_a_row"] >= job.config.train.max_nonfinite_steps:
            raise Diverged(
                f"{int(window['skipped_in_a_row'])} steps in a row had a loss or gradient that is not finite, the last "
                f"is step {step}; none was applied. The rows are in nonfinite.jsonl. Lower "
                "train.learning_rate, look at those rows, or compute in float32"
            )
    if step % job.config.train.logging_steps == 0 or step == job.total_steps:
        log.figures(
            step,
            {
                "loss": window["nll"] / window["weight"] if window.get("weight") else math.nan,
                "grad_norm": figures["grad_norm"],
                "learning_rate": float(job.schedule(step - 1)),
                "epoch": info.epoch,
                "num_tokens": progress.num_tokens,
                "num_trained_tokens": progress.num_trained_tokens,
                "num_examples": progress.num_examples,
                "loss_weight": window.get("weight", 0.0),
                "mean_token_accuracy": window["correct"] / window["trained"] if window.get("trained") else math.nan,
                "skipped_steps": int(window.get("skipped", 0)),
                **{name: figures[name] for name in ("loss_scale",) if name in figures},
                **source_figures(progress),
            },
        )
        progress.window = {"skipped_in_a_row": window.get("skipped_in_a_row", 0)}
    log.progress(step)


def source_figures(progress: Progress) -> dict[str, float]:
    """Of each of several sources: its tokens so far, and its loss in the window, if it was in it."""
    figures: dict[str, float] = {}
    for name, tokens in progress.tokens_by_source.items():
        if weight := progress.window.get(f"weight/{name}"):
            figures[f"loss/{name}"] = progress.window[f"nll/{name}"] / weight
        figures[f"num_tokens/{name}"] = tokens
    return figures


def save(job: Job, checkpoints, state, frozen, progress: Progress, patience: Patience, log, evaluating: bool) -> bool:
    """Evaluates if it is time to, and saves. Returns whether to stop early."""
    stop_early, figures = False, {}
    if evaluating and job.measures:
        figures = measure(job, state, frozen, log, progress.step)
        value = figures[job.config.eval.metric_for_best_model]
        stop_early = patience.update(-value if job.config.eval.greater_is_better else value)
        progress.best, progress.waited = patience.best, patience.waited
    log.flush()
    progress.lines = log.counts()
    with log.throughput.pause():
        checkpoints.save(progress.step, state, progress.position, progress.to_json(), figures)
    return stop_early


def measure(job: Job, state, frozen, log, step: int) -> dict[str, float]:
    """What was held out, evaluated and written down, with sampled answers; the evaluation's figures."""
    if not job.measures:
        return {}
    with log.throughput.pause():
        variables = tree.merge(state.trainable, frozen)
        with log.phase("evaluating" if step else "evaluating the untrained model"):
            figures = run_evaluation.evaluate_all(job, state, frozen, step)
        log.evaluation(step, figures)
        with log.phase("answering the sample prompts"):
            answers = samples.answer(job.program, variables, job.opened.tokenizer, job.prompts, job.config.eval)
        log.samples(step, answers)
    return figures
