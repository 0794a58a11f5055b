"""A training run, top to bottom: model, data, program, restore, loop, export.

setup      the run folder is locked, model and data are opened and checked (preflight), shapes are settled
restore    weights are read; a run that was interrupted goes on from its newest sound checkpoint, bit for bit
loop       step, log (one step late, so that logging never holds up the device), evaluate, save
finish     the best checkpoint is exported, loaded again, compared; report and summary (`finish.py`)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sftjax import config as config_lib
from sftjax import finish, loading, optim, program, runs, samples, stopping, tree
from sftjax.checkpoint import Checkpointer
from sftjax.data import pipeline as pipelines
from sftjax.data import preflight as preflights
from sftjax.data import preview, subsets
from sftjax.data.encode import RowEncoder
from sftjax.data.mixture import Ingredient, Mixture
from sftjax.data.sources import open_source
from sftjax.data.types import RowError
from sftjax.errors import ConfigError, Diverged
from sftjax.evaluate import Evaluation, Patience, evaluate
from sftjax.models import decoder
from sftjax.models.config import ModelConfig
from sftjax.parallel import mesh as meshes
from sftjax.peft import lora
from sftjax.peft.spec import AdapterSpec
from sftjax.runlog import RunLog
from sftjax.weights import hf, peft_format, vocab


def run(config: config_lib.ConfigDict, *, allow: Sequence[str] = (), dry_run: bool = False) -> int:
    """Trains as the configuration says, from the start or from where the same run folder stands.

    Raises:
      UserError: with the exit code of its kind (see `errors`).
    """
    use_compile_cache()
    config_lib.check(config, num_devices=jax.device_count())
    with (
        runs.RunFolder.open(config.run_dir, primary=jax.process_index() == 0) as folder,
        stopping.StopSignal(before_exit=folder.release) as stop,
    ):
        with stop.nothing_to_lose("preparing"):
            if folder.read_json("summary.json"):
                print(f"{folder.path}: this run is finished. Give another run_dir to train again.")
                return 0
            job = setup(config, folder, allow)
            if dry_run:
                return 0
            state, frozen, progress = restore(job)
        job = dataclasses.replace(job, stop=stop)
        state = loop(job, state, frozen, progress)
        with stop.nothing_to_lose("exporting"):
            finish.finish(job, state, frozen)
    return 0


def resume(run_dir: str, *, config=None, allow: Sequence[str] = (), dry_run: bool = False) -> int:
    """Continues a run with the configuration saved in its folder.

    Raises:
      ConfigError: there is no run in that folder.
    """
    path = os.path.join(run_dir, "config.json")
    if not os.path.exists(path):
        raise ConfigError(f"{run_dir}: no config.json, so there is no run to resume; start one with --config=FILE")
    with open(path, encoding="utf-8") as file:
        saved = config_lib.from_json(file.read())
    saved.run_dir = run_dir  # the folder may have been moved
    return run(saved if config is None else config, allow=allow, dry_run=dry_run)


def use_compile_cache() -> None:
    """Compiled programs are kept on disk: a second start of the same job doesn't compile again."""
    if not jax.config.jax_compilation_cache_dir:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "sftjax", "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


# --- setup ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is settled before the first step and never changes."""

    config: config_lib.ConfigDict
    folder: runs.RunFolder
    opened: loading.Opened
    model_config: ModelConfig  # of what is trained: the vocabulary may have grown
    spec: AdapterSpec
    program: program.Program
    schedule: Any
    mixture: Mixture
    held_out: Mixture | None
    total_steps: int
    micro_rows: int
    prompts: list[list[dict[str, Any]]]  # conversations whose next answer is sampled
    stop: stopping.StopSignal | None = None


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
    window: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float = math.inf
    waited: int = 0

    def to_json(self) -> dict[str, Any]:
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("step", "position")}
        return {**fields, "best": None if math.isinf(self.best) else self.best}

    @classmethod
    def from_json(cls, step: int, position: dict[str, Any], meta: dict[str, Any]) -> Progress:
        return cls(step=step, position=position, **{**meta, "best": math.inf if meta["best"] is None else meta["best"]})


def setup(config: config_lib.ConfigDict, folder: runs.RunFolder, allow: Sequence[str]) -> Job:
    """Opens model and data, checks them, settles the program; nothing large is in memory yet."""
    opened = loading.open_model(
        config.model.path, chat_template=config.model.chat_template, end_of_turn=config.model.end_of_turn
    )
    mixture, held_out = open_data(config, opened.tokenizer)
    mesh = meshes.make({axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor", "context", "expert")})
    accumulation = config.train.gradient_accumulation_steps
    micro_rows = config_lib.rows_per_step(config) // accumulation

    fingerprints = {
        "data": loading.digest(*(i.source.fingerprint() for i in mixture.ingredients)),
        "template": loading.digest(opened.tokenizer.template.text),
        "tokenizer": opened.tokenizer.fingerprint(),
        "weights": opened.fingerprint(),
    }
    saved = folder.read_json("config.json")
    if saved is not None:
        environment = folder.read_json("environment.json") or {}
        notes = runs.check_resume(
            saved,
            json.loads(config_lib.to_json(config)),
            environment.get("fingerprints", {}),
            fingerprints,
            allow=allow,
        )
        print(*notes, sep="\n")
    folder.write_json("config.json", json.loads(config_lib.to_json(config)))
    folder.write_json("environment.json", runs.environment(fingerprints))

    report = preflight(config, mixture, opened.tokenizer, micro_rows)
    folder.write_json("preflight.json", report.to_dict())
    report.print()
    report.check()
    total_steps = config.train.max_steps or report.steps
    model_config = grown(config, opened)
    spec = adapter_spec(config, model=model_config, grows=opened.new_tokens > 0)
    job_program, schedule = build_program(config, model_config, spec, mesh, total_steps)
    announce(config, job_program, total_steps)
    if jax.process_index() == 0:
        write_masks(folder, mixture, opened.tokenizer)
    return Job(
        config,
        folder,
        opened,
        model_config,
        spec,
        job_program,
        schedule,
        mixture,
        held_out,
        total_steps,
        micro_rows,
        samples.choose_prompts(config.eval.prompts, held_out, config.eval.num_samples),
    )


def source_spec(entry: Any) -> dict[str, Any]:
    return {"path": entry} if isinstance(entry, str) else dict(entry)


def open_data(config: config_lib.ConfigDict, tokenizer) -> tuple[Mixture, Mixture | None]:
    """The training mixture and the held-out one (None without)."""

    def ingredient(entry: Any, *, rows: str = "", **options: Any) -> Ingredient:
        spec = source_spec(entry)
        if rows:
            spec["rows"] = rows
        encode = RowEncoder(
            tokenizer,
            format=spec.pop("format", config.data.format),
            fields=spec.pop("fields", {}),
            train_on=config.data.train_on,
            on_mask_error=config.data.on_mask_error,
        )
        weight, loss_weight = spec.pop("weight", 1.0), spec.pop("loss_weight", 1.0)
        return Ingredient(open_source(spec), encode, weight=weight, loss_weight=loss_weight, **options)

    train_entries, eval_entries = config.data.train, config.data.eval
    epochs = None if config.train.max_steps else config.train.num_train_epochs
    train_sources = [ingredient(entry) for entry in train_entries]
    held_sources = [ingredient(entry) for entry in eval_entries]
    if config.data.eval_fraction and not held_sources:
        train_sources, held_sources = subsets.hold_out(train_sources, config.data.eval_fraction, config.seed)
    if config.data.max_eval_rows:
        held_sources = subsets.first_rows(held_sources, config.data.max_eval_rows)
    mixture = Mixture(train_sources, seed=config.seed, shuffle=config.data.shuffle, epochs=epochs)
    held_out = Mixture(held_sources, shuffle=False, epochs=1) if held_sources else None
    return mixture, held_out


def grown(config: config_lib.ConfigDict, opened: loading.Opened) -> ModelConfig:
    """The model with room for the tokens that the chat template adds; says so."""
    size = max(opened.config.vocab_size, opened.tokenizer.vocab_size)
    rows = vocab.padded_size(size, config.model.pad_vocab_to_multiple_of)
    if size > opened.config.vocab_size:
        print(
            f"vocabulary: {opened.config.vocab_size} -> {size} for {', '.join(opened.tokenizer.added_tokens)}; "
            "the new rows start as the mean of the others and are trained"
        )
    if rows == opened.config.vocab_size:
        return opened.config
    return opened.config.replace(vocab_size=rows, valid_vocab=size if rows > size else opened.config.valid_vocab)


def adapter_spec(config: config_lib.ConfigDict, *, model: ModelConfig, grows: bool) -> AdapterSpec:
    """What is trained. New tokens are of no use untrained, so with an adapter the embedding is trained in full."""
    peft = config.peft
    targets = tuple(peft.target_modules)
    saved = tuple(peft.modules_to_save)
    if grows and peft.method != "none":
        needed = ("embed_tokens",) if model.tie_word_embeddings else ("embed_tokens", "lm_head")
        saved += tuple(name for name in needed if name not in saved)
    return AdapterSpec(
        method=peft.method,
        rank=peft.r,
        alpha=peft.lora_alpha,
        dropout=peft.lora_dropout,
        target_modules=targets[0] if len(targets) == 1 else targets,
        rank_pattern=tuple(peft.rank_pattern),
        alpha_pattern=tuple(peft.alpha_pattern),
        use_rslora=peft.use_rslora,
        init=peft.init_lora_weights,
        modules_to_save=saved,
        bias=peft.bias,
        also_train=peft.also_train,
        bottleneck_size=peft.bottleneck_size,
    )


def build_program(config, model_config: ModelConfig, spec: AdapterSpec, mesh, total_steps: int):
    """The compiled steps (not compiled yet) and the schedule."""
    adapting = spec.method != "full"
    dtype = config.model.frozen_dtype if adapting else config.model.params_dtype
    abstract = {"params": decoder.abstract_params(model_config, dtype)}
    if adapting:
        initialise = functools.partial(lora.init, spec=spec)
        abstract["adapter"] = jax.eval_shape(initialise, jax.random.key(0), abstract["params"])
    optimizer, schedule = optim.make_optimizer(
        name=config.train.optim,
        learning_rate=config.train.learning_rate,
        total_steps=total_steps,
        schedule=config.train.lr_scheduler_type,
        warmup_steps=config.train.warmup_steps,
        warmup_ratio=config.train.warmup_ratio,
        weight_decay=config.train.weight_decay,
        b1=config.train.adam_beta1,
        b2=config.train.adam_beta2,
        eps=config.train.adam_epsilon,
        max_grad_norm=config.train.max_grad_norm,
        loraplus_lr_ratio=config.peft.loraplus_lr_ratio,
        seed=config.seed,
    )
    runtime = decoder.Runtime(
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        attention=config.model.attention or None,
        unroll=config.model.scan_unroll,
        mesh=mesh,
        adapter_dropout=spec.dropout if adapting else 0.0,
        attention_dropout=config.model.attention_dropout,
        residual_dropout=config.model.residual_dropout,
        embedding_dropout=config.model.embedding_dropout,
        neftune_alpha=config.train.neftune_noise_alpha,
    )
    built = program.build(
        model_config,
        runtime,
        mesh,
        abstract,
        optimizer,
        trainable_regex=lora.trainable_regex(spec),
        max_segments=config.data.max_segments,
        seed=config.seed,
    )
    return built, schedule


def preflight(config, mixture: Mixture, tokenizer, micro_rows: int):
    return preflights.run(
        mixture,
        tokenizer,
        length=config.data.max_length,
        batch_size=micro_rows,
        accumulation=config.train.gradient_accumulation_steps,
        packing_strategy=config.data.packing,
        max_segments=config.data.max_segments,
        packing_bins=config.data.packing_bins or None,
        overlong=config.data.over_length,
        max_dropped=config.data.max_dropped_fraction,
        sample_rows=config.data.preflight_rows,
        max_steps=config.train.max_steps,
    )


def write_masks(folder: runs.RunFolder, mixture: Mixture, tokenizer, count: int = 6) -> None:
    """The first samples with what is trained in them, for the report."""
    lines = []
    for ingredient in mixture.ingredients:
        for row in range(min(count, len(ingredient.source))):
            try:
                made = ingredient.encode(ingredient.source[row], row)
            except RowError:
                continue
            for sample in made[:1]:
                pieces = [{"text": text, "weight": weight} for text, weight in preview.runs(tokenizer, sample)]
                lines.append(
                    {"source": ingredient.source.name, "index": row, "sample": sample.sample, "pieces": pieces}
                )
    runs.write_text(folder.file("masks.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))


def announce(config, job_program: program.Program, total_steps: int) -> None:
    """Two lines: what is trained, and what it runs on."""
    count = job_program.count()
    total = count["base"] + count["adapter"]
    print(
        f"trainable parameters: {count['trainable']:,} beside {count['base']:,} in the base "
        f"({100 * count['trainable'] / total:.3g} %)"
    )
    device = jax.devices()[0]
    print(
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), mesh "
        f"{dict(job_program.mesh.shape)}, compute in {config.model.compute_dtype}, {total_steps} steps"
    )


# --- restore -------------------------------------------------------------------------------------------------------


def checkpointer(job: Job) -> Checkpointer:
    return Checkpointer(job.folder.checkpoints, keep=job.config.checkpoint.save_total_limit, metric="eval_loss")


def restore(job: Job):
    """Reads the weights, and the newest sound checkpoint if there is one.

    Returns:
      (state, frozen leaves, progress).
    """
    with checkpointer(job) as checkpoints:
        restored = checkpoints.restore(job.program.abstract_state)
    if restored is None:
        job.folder.cut_back(None)
        state, frozen = job.program.init_state(load_variables(job))
        return state, frozen, Progress()
    frozen = {}
    if job.program.abstract_frozen:
        _, frozen = tree.partition(load_variables(job), job.program.trainable_regex)
    job.folder.cut_back(restored.step)
    print(f"continuing from step {restored.step} of {job.total_steps}")
    return restored.state, frozen, Progress.from_json(restored.step, restored.position, restored.meta)


def load_variables(job: Job) -> dict[str, Any]:
    """The base weights and a fresh (or given) adapter, where the program wants them."""
    abstract = tree.merge(job.program.abstract_state.trainable, job.program.abstract_frozen)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    dtype = next(iter(tree.flatten(abstract["params"]).values())).dtype
    own = job.opened.config
    if job.model_config == own:
        params = hf.load_params(job.opened.files, own, dtype, shardings["params"])
    else:
        params = hf.load_params(job.opened.files, own, dtype)
        params, _ = vocab.resize_vocab(
            params,
            own,
            job.model_config.valid_vocab or job.model_config.vocab_size,
            job.config.model.pad_vocab_to_multiple_of,
        )
        params = jax.device_put(params, shardings["params"])
    variables = {"params": params}
    if "adapter" in abstract:
        if job.config.peft.adapter_path:
            adapter, _ = peft_format.load_adapter(job.config.peft.adapter_path, job.model_config)
        else:
            adapter = lora.init(jax.random.key(job.config.seed), variables["params"], job.spec)
        variables["adapter"] = jax.device_put(adapter, shardings["adapter"])
    return variables


# --- loop ----------------------------------------------------------------------------------------------------------


def loop(job: Job, state, frozen, progress: Progress):
    """Steps until the end of the data, the last step, early stopping, or a request to stop.

    Raises:
      StopRequested: asked to; everything is saved.
      Diverged: losses stayed non-finite; what is saved is sound.
    """
    config = job.config
    rows = job.program.local_rows(job.micro_rows)
    patience = Patience(config.eval.early_stopping_patience, progress.best, progress.waited)
    with (
        checkpointer(job) as checkpoints,
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
            item = next(items, None)
            if item is None:
                break
            batch = job.program.put(item.batch, item.info.rows, job.micro_rows)
            if compiled:
                state, figures = job.program.train_step(state, frozen, batch)
            else:
                with job.stop.nothing_to_lose("compiling"):
                    state, figures = jax.block_until_ready(job.program.train_step(state, frozen, batch))
                compiled = True
            if pending:
                record(job, progress, pending, log)
            progress.step += 1
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
    return state


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
    config = job.config
    return pipelines.build(
        job.mixture,
        length=config.data.max_length,
        batch_size=job.micro_rows,
        accumulation=config.train.gradient_accumulation_steps,
        packing_strategy=config.data.packing,
        max_segments=config.data.max_segments,
        packing_bins=config.data.packing_bins or None,
        overlong=config.data.over_length,
        max_dropped=config.data.max_dropped_fraction,
        pad_id=job.opened.tokenizer.pad_id,
        rows=rows,
        workers=config.data.workers,
        position=position,
    )


def record(job: Job, progress: Progress, pending, log) -> None:
    """Takes in the figures of a finished step; at the end of a logging window writes them down.

    Raises:
      Diverged: too many steps in a row weren't finite.
    """
    step, figures, item = pending
    figures = {name: float(value) for name, value in jax.device_get(figures).items()}
    info = item.info
    log.finished(info, figures["trained"])
    progress.num_tokens += info.real_tokens
    progress.num_examples += info.num_examples
    window = progress.window
    if figures["finite"]:
        progress.num_trained_tokens += int(figures["trained"])
        progress.train_nll += figures["nll"]
        progress.train_weight += figures["weight"]
        for name in ("nll", "weight", "trained", "correct"):
            window[name] = window.get(name, 0.0) + figures[name]
        window["skipped_in_a_row"] = 0
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
            },
        )
        progress.window = {"skipped_in_a_row": window["skipped_in_a_row"]}
    log.progress(step)


def save(job: Job, checkpoints, state, frozen, progress: Progress, patience: Patience, log, evaluating: bool) -> bool:
    """Evaluates if it is time to, and saves. Returns whether to stop early."""
    stop_early, figures = False, {}
    if evaluating and job.held_out is not None:
        figures = measure(job, state, frozen, log, progress.step)
        stop_early = patience.update(figures["eval_loss"])
        progress.best, progress.waited = patience.best, patience.waited
    log.flush()
    with log.throughput.pause():
        checkpoints.save(progress.step, state, progress.position, progress.to_json(), figures)
    return stop_early


def measure(job: Job, state, frozen, log, step: int) -> dict[str, float]:
    """Held-out loss and sampled answers, written down; the evaluation's figures."""
    if job.held_out is None:
        return {}
    with log.throughput.pause():
        evaluation = evaluate_held_out(job, state, frozen)
        evaluation_to_file(job, evaluation, step)
        log.evaluation(step, evaluation.metrics())
        variables = tree.merge(state.trainable, frozen)
        log.samples(step, samples.answer(job.program, variables, job.opened.tokenizer, job.prompts, job.config.eval))
    return evaluation.metrics()


def evaluate_held_out(job: Job, state, frozen) -> Evaluation:
    config = job.config
    rows = config.eval.batch_size or job.micro_rows
    pipeline = pipelines.build_eval(
        job.held_out,
        length=config.data.max_length,
        batch_size=rows,
        packing_strategy=config.data.packing,
        max_segments=config.data.max_segments,
        overlong=config.data.over_length,
        rows=job.program.local_rows(rows),
    )
    with pipeline:
        return evaluate(job.program, state.trainable, frozen, pipeline, job.held_out.names)


def evaluation_to_file(job: Job, evaluation: Evaluation, step: int) -> None:
    """Per-example sums, so that the difference to the end can be judged after a resume too."""
    if jax.process_index() == 0:
        path = job.folder.file(f"evaluation-{step}.npz")
        np.savez(path, **{f.name: getattr(evaluation, f.name) for f in dataclasses.fields(evaluation)})
