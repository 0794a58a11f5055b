"""What a run holds out: evaluated, and kept per example in files of the run folder.

    evaluation-STEP.npz           sums of each held-out conversation (an `Evaluation`)
    plain-text-STEP.npz           the same of plain text, to see what is forgotten
    base-log-probabilities.npy    what the untrained model says at the first answer tokens

They are derived: one that can't be read is made again from the weights (step 0) or a checkpoint.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import fsspec
import jax
import numpy as np

from sftjax import divergence, held_out, runs, samples, tree
from sftjax.data import pipeline as pipelines
from sftjax.errors import ConfigError
from sftjax.evaluate import evaluate
from sftjax.held_out import Evaluation
from sftjax.utils import storage

BASE = "base-log-probabilities.npy"


def evaluate_all(job, state, frozen, step: int) -> dict[str, float]:
    """Evaluates all that was held out, keeps it in files, and returns the figures to be logged."""
    figures: dict[str, float] = {}
    if job.held_out is not None:
        figures |= _evaluate(job, job.held_out, state, frozen, f"evaluation-{step}").metrics()
    if job.plain_text is not None:
        metrics = _evaluate(job, job.plain_text, state, frozen, f"plain-text-{step}").metrics()
        figures |= {f"plain_text_{name}": metrics[f"eval_{name}"] for name in ("loss", "perplexity")}
    return figures | _drift(job, tree.merge(state.trainable, frozen), step)


def untrained_is_known(job) -> bool:
    """Whether the figures of the untrained model, which only the run's start has by itself, are there."""
    wanted = {"evaluation-0.npz": held_out.load} if job.held_out is not None else {}
    wanted |= {"plain-text-0.npz": held_out.load} if job.plain_text is not None else {}
    wanted |= {BASE: np.load} if job.held_out is not None and job.config.eval.kl_tokens else {}
    return all(_read(job, name, load) is not None for name, load in wanted.items())


def evaluation(job, kind: str, step: int, state=None, frozen=None) -> Evaluation | None:
    """What "evaluation" or "plain-text" came to after `step`; made again from the state if need be."""
    found = _read(job, f"{kind}-{step}.npz", held_out.load)
    if found is not None:
        return found
    mixture = {"evaluation": job.held_out, "plain-text": job.plain_text}[kind]
    if mixture is None or state is None:
        return None
    return _evaluate(job, mixture, state, frozen, f"{kind}-{step}")


def _evaluate(job, mixture, state, frozen, name: str) -> Evaluation:
    """Loss in rows of `max_length` tokens: figures are by example, so packing doesn't change them."""
    rows = job.config.eval.batch_size or job.batching["batch_size"]
    strategy = job.batching["packing_strategy"]
    pipeline = pipelines.build_eval(
        mixture,
        batch_size=rows,
        packing_strategy="best_fit" if strategy == "padding_free" else strategy,
        max_segments=job.config.data.max_segments,
        rows=job.program.local_rows(rows),
        **{name: job.batching[name] for name in ("length", "static_lengths", "overlong")},
    )
    with pipeline:
        found = evaluate(job.program, state.trainable, frozen, pipeline, mixture.names)
    _write(job, f"{name}.npz", found.save)
    return found


def _drift(job, variables, step: int) -> dict[str, float]:
    """KL to the base at the first answer tokens of the held-out samples; what the base says there is kept."""
    count = job.config.eval.kl_tokens
    if not count or job.held_out is None:
        return {}
    base = _read(job, BASE, np.load) if step else None
    if step and base is None:
        if job.config.eval.metric_for_best_model == "kl_to_base":
            raise ConfigError(
                "eval.metric_for_best_model='kl_to_base' must be set from a run's start: the base is gone"
            )
        return {}
    program = job.program
    chosen = samples.first_samples(job.held_out, count)
    values = divergence.log_probabilities(
        program.config, program.runtime, variables, chosen, count, max_length=job.config.data.max_length
    )
    if base is None:
        _write(job, BASE, lambda file: np.save(file, values))
        return {"kl_to_base": 0.0}
    return {"kl_to_base": divergence.kl(base, values)}


def _write(job, name: str, save: Callable[[BinaryIO], None]) -> None:
    if jax.process_index() == 0:
        with storage.whole_file(job.folder.file(name)) as file:
            save(file)
        storage.moment("evaluation written", name)


def _read(job, name: str, load: Callable[[BinaryIO], Any]) -> Any:
    """What a file of the run holds; None where there is none. One that can't be read is put aside."""
    path = job.folder.file(name)
    try:
        with fsspec.open(path, "rb") as file:
            return load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if jax.process_index() == 0:
            runs.put_aside(path, str(error))
        return None
