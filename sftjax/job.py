"""What a configuration means: model, data, adapter and program of a run, settled and checked before its first step.

Nothing large is in memory until `load_variables` reads the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sftjax import (
    checkpoint,
    compat,
    costs,
    finished,
    hardware,
    job_data,
    loading,
    optim,
    paths,
    program,
    runs,
    samples,
    stopping,
    tree,
)
from sftjax import config as config_lib
from sftjax.data import preflight as preflights
from sftjax.data import preview, rendering
from sftjax.data.mixture import Mixture
from sftjax.data.types import RowError
from sftjax.errors import ConfigError, StorageError, UserError
from sftjax.kernels import nf4
from sftjax.models import decoder
from sftjax.models.config import ModelConfig
from sftjax.parallel import mesh as meshes
from sftjax.peft import lora, merge
from sftjax.peft.spec import AdapterSpec, all_names, find_names
from sftjax.phases import phase
from sftjax.utils.storage import is_remote
from sftjax.weights import bottleneck_format, export, families, peft_format, peft_write, vocab


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
    batching: dict[str, Any]  # how samples become batches
    batch_rows: int  # rows of a micro-batch, over all devices
    prompts: list[list[dict[str, Any]]]  # conversations whose next answer is sampled
    plain_text: Mixture | None  # held out, to see what is forgotten
    preflight: preflights.Preflight | None  # whose ledger is completed while training runs
    ledger: dict[str, Any]  # what the preflight counted
    identity: runs.Identity
    allow: Sequence[str]  # differences that a continuation may have
    stop: stopping.StopSignal | None = None

    @property
    def measures(self) -> bool:
        """Whether anything was held out."""
        return self.held_out is not None or self.plain_text is not None


def setup(config: config_lib.ConfigDict, folder: runs.RunFolder, allow: Sequence[str]) -> Job:
    """Opens model and data, checks them, settles the program; nothing large is in memory yet."""
    job_data.check_sources(config)
    with phase("opening the model"):
        opened = open_model(config)
    model_config = grown(config, opened)
    spec = adapter_spec(config, model=model_config, grows=bool(opened.new_token_ids))
    if config.peft.adapter_path:
        check_scales(config.peft.adapter_path, spec, model_config)
    model_config = untied(config, model_config, spec)
    families.check_writable(model_config, opened.files.raw_config, text_only=config.export.text_only)
    if opened.files.is_wrapped and config.export.enabled and config.peft.method != "none" and not config.export.merge:
        raise ConfigError(
            "export.merge=False: an adapter beside a multimodal model would be named for its language model alone, and "
            "be dropped where the whole is loaded: set export.merge=True (with export.text_only=True for the former)"
        )
    if opened.files.ignored:
        print(f"config.json: no use of {', '.join(opened.files.ignored)}, here as in transformers")
    with phase("opening the data"):
        mixture, held_out = job_data.open_data(config, opened.tokenizer)
        plain_text = job_data.open_plain_text(config, opened.tokenizer)
        prints = fingerprints(opened, mixture)
    job_data.check_metric(config, held_out, plain_text)
    mesh = meshes.make({axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor", "context", "expert")})
    kinds = {memory.kind for device in mesh.local_devices for memory in device.addressable_memories()}
    if config.train.offload_optimizer and compat.HOST_MEMORY not in kinds:
        raise ConfigError(f"train.offload_optimizer: these devices reach no {compat.HOST_MEMORY} memory: leave it out")
    if config.model.compute_dtype == "bfloat16" and any(map(hardware.lacks_bfloat16, mesh.local_devices)):
        print("warning: this GPU has no bfloat16 arithmetic: model.compute_dtype='float16' is faster here")
    batching = job_data.batching_options(config, mesh)

    settings = runs.redact(json.loads(config_lib.to_json(config)))
    identity = runs.Identity(settings, prints, os.getcwd())
    ledger = settle_settings(folder, identity, allow)
    with phase("looking through the data"):
        report = preflights.run(
            mixture,
            opened.tokenizer,
            sample_rows=config.data.preflight_rows,
            max_lost=config.data.max_lost_fraction,
            max_steps=config.train.max_steps or (ledger or {}).get("steps", 0),
            **batching,
        )
    keep = ledger is not None and ledger["complete"]  # it may have taken the run a while to read everything
    if not keep:
        folder.write_json("preflight.json", report.to_dict())
    report.print()
    report.check()
    total_steps = config.train.max_steps or report.steps
    given = loading.given_nf4(opened, config.peft.quantization)
    with phase("settling the step"):
        job_program, schedule = build_program(config, model_config, spec, mesh, total_steps, len(mixture.names), given)
    announce(config, job_program, total_steps)
    check_adapter_export(config, opened, model_config, spec, job_program)
    check_room(config, folder, job_program, total_steps)
    if jax.process_index() == 0:
        write_masks(folder, mixture, opened.tokenizer)
        folder.write_json("model.json", describe_model(config, opened, job_program))
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
        batching,
        batching["flat_rows"] if config.data.packing == "padding_free" else batching["batch_size"],
        samples.choose_prompts(config.eval.prompts, held_out, config.eval.num_samples),
        plain_text,
        None if keep else report,
        ledger if keep else report.to_dict(),
        identity,
        allow,
    )


def open_model(config: config_lib.ConfigDict) -> loading.Opened:
    """The model that a configuration names, with its chat template."""
    return loading.open_model(
        config.model.path,
        chat_template=config.model.chat_template,
        end_of_turn=config.model.end_of_turn,
        template_kwargs=config.model.template_kwargs.to_dict(),
        add_tokens=config.model.add_tokens,
    )


def fingerprints(opened: loading.Opened, mixture: Mixture) -> dict[str, str]:
    """What a run's data, template, tokenizer and weights are known by."""
    return {
        "data": loading.digest(*(i.source.fingerprint() for i in mixture.ingredients)),
        "template": loading.digest(opened.tokenizer.renderer.source if opened.tokenizer.renderer else ""),
        "tokenizer": opened.tokenizer.fingerprint(),
        "weights": opened.fingerprint(),
    }


def check_finished(config: config_lib.ConfigDict, folder: runs.RunFolder) -> None:
    """Raises ConfigError where a finished run isn't the one that is asked for, in its settings or in its data."""
    settings, defaults = (json.loads(config_lib.to_json(one)) for one in (config, config_lib.defaults()))
    finished.check(folder, settings, defaults)
    try:
        opened = open_model(config)
        now = fingerprints(opened, job_data.open_data(config, opened.tokenizer)[0])
    except UserError:  # the files are gone, as they may be
        return
    finished.check(folder, settings, defaults, now)


def settle_settings(folder: runs.RunFolder, identity: runs.Identity, allow: Sequence[str]) -> dict[str, Any] | None:
    """Checks that a run that goes on is still the same, and writes down what it is. One that has saved nothing yet
    begins anew, whatever it was.

    Returns:
      The ledger that the run has, where nothing that it depends on has changed.
    """
    ledger = None
    saved = sealed_identity(folder)
    if saved is not None:
        before = {name: value for name, value in saved.fingerprints.items() if name != "base"}  # not loaded yet
        settings = paths.spelled_as(saved.settings, saved.working_folder, identity.settings)
        for line in runs.check_resume(saved.settings, settings, before, identity.fingerprints, allow=allow):
            print(line)
        changed = runs.changes(saved.settings, settings)
        if before == identity.fingerprints and all(change.verdict == "free" for change in changed):
            ledger = folder.read_derived("preflight.json")
    folder.write_json("config.json", identity.settings)
    folder.write_json("environment.json", runs.environment(identity.fingerprints))
    return ledger


def sealed_identity(folder: runs.RunFolder) -> runs.Identity | None:
    """What the run was begun as, by its newest checkpoint; None where nothing was saved yet."""
    newest = checkpoint.newest_meta(folder.checkpoints)
    if newest is None and not folder.has_checkpoints():
        return None
    if newest is not None and "identity" in newest[1]:
        return runs.Identity(**newest[1]["identity"])
    # all of them are damaged, or were saved before identities were sealed
    settings, environment = folder.read_json("config.json"), folder.read_json("environment.json")
    if settings is None or environment is None:
        raise StorageError(
            f"{folder.path}: config.json or environment.json is gone, so nobody knows what its checkpoints belong to: "
            "put it back from a copy, or choose another run_dir"
        )
    return runs.Identity(settings, environment["fingerprints"], paths.working_folder(folder.path))


def grown(config: config_lib.ConfigDict, opened: loading.Opened) -> ModelConfig:
    """The model with room for the tokens that the chat template adds; says so."""
    size = max(opened.config.vocab_size, opened.tokenizer.rows)
    rows = vocab.padded_size(size, config.model.pad_vocab_to_multiple_of)
    if opened.new_token_ids:
        print(
            f"vocabulary: {opened.config.vocab_size} -> {size} for {', '.join(opened.tokenizer.added_tokens)}; "
            "the rows of new tokens start as the mean of the others and are trained"
            + ("" if config.peft.method == "none" else ", with the whole embedding, beside the adapter")
        )
    if rows == opened.config.vocab_size:
        return opened.config
    return opened.config.replace(vocab_size=rows, valid_vocab=size if rows > size else opened.config.valid_vocab)


def adapter_spec(config: config_lib.ConfigDict, *, model: ModelConfig, grows: bool) -> AdapterSpec:
    """What is trained. New tokens are of no use untrained, so with an adapter the embedding is trained in full."""
    peft = config.peft

    def names(value: Sequence[str]) -> str | tuple[str, ...]:
        """One may be a regex, as in PEFT."""
        return value[0] if len(value) == 1 else tuple(value)

    saved = tuple(peft.modules_to_save)
    if grows and peft.method != "none":
        needed = ("embed_tokens",) if model.tie_word_embeddings else ("embed_tokens", "lm_head")
        saved += tuple(name for name in needed if name not in saved)
    return AdapterSpec(
        method=peft.method,
        rank=peft.r,
        alpha=peft.lora_alpha,
        dropout=peft.lora_dropout,
        target_modules=names(peft.target_modules),
        exclude_modules=names(peft.exclude_modules),
        target_parameters=tuple(peft.target_parameters),
        layers_to_transform=tuple(peft.layers_to_transform),
        layers_pattern=tuple(peft.layers_pattern),
        rank_pattern=tuple(peft.rank_pattern),
        alpha_pattern=tuple(peft.alpha_pattern),
        use_rslora=peft.use_rslora,
        init=peft.init_lora_weights,
        lora_bias=peft.lora_bias,
        modules_to_save=saved,
        trainable_token_indices=tuple(peft.trainable_token_indices),
        bias=peft.bias,
        also_train=peft.also_train,
        bottleneck_size=peft.bottleneck_size,
        bottleneck_activation=peft.bottleneck_activation,
    )


def untied(config: config_lib.ConfigDict, model: ModelConfig, spec: AdapterSpec) -> ModelConfig:
    """The model with a head of its own, where the adapter changes the embedding and its tied head apart; says so."""
    apart = spec.method == "lora" and (
        spec.targets("model.embed_tokens") or spec.targets("lm_head") or bool(spec.token_rows("lm_head"))
    )
    if config.peft.adapter_path:
        apart = apart or peft_format.fitted_config(config.peft.adapter_path, model) != model
    if not (model.tie_word_embeddings and apart):
        return model
    print("embedding and output head are one weight in this model; the adapter changes them apart, as PEFT does")
    return model.replace(tie_word_embeddings=False)


def check_scales(folder: str, spec: AdapterSpec, model: ModelConfig) -> None:
    """Makes sure that an adapter to go on from is used as it was trained: what the run records is what it does.

    Raises:
      ConfigError: the settings give a module another rank or scale.
    """
    theirs = peft_format.read_spec(folder)
    for name in dict.fromkeys(name for names in find_names(decoder.abstract_params(model)).values() for name in names):
        if not (spec.targets(name) and theirs.targets(name)):
            continue
        names = all_names(name)
        ranks, scales = zip(*((one.rank_of(*names), one.scale_of(*names)) for one in (theirs, spec)), strict=True)
        if ranks[0] != ranks[1] or not math.isclose(*scales, rel_tol=1e-6):
            raise ConfigError(
                f"{folder}: {name} has rank {ranks[0]} and was trained with B·A times {scales[0]:.6g}; the settings "
                f"make that rank {ranks[1]}, times {scales[1]:.6g}: set peft.r={theirs.rank} "
                f"peft.lora_alpha={float(theirs.alpha)} peft.use_rslora={theirs.use_rslora} and the patterns as "
                "adapter_config.json has them"
            )


def check_adapter_export(config, opened: loading.Opened, model: ModelConfig, spec: AdapterSpec, built) -> None:
    """Makes sure before the first step that what is trained can leave as the settings want it.

    Raises:
      ConfigError: naming the modules that PEFT would drop; or what can't be merged; with the setting that helps.
    """
    adapter = built.abstract_state.trainable.get("adapter")
    if adapter is None or not config.export.enabled:
        return
    if spec.bottleneck:
        bottleneck_format.check(tree.flatten(adapter) | tree.flatten(built.abstract_state.trainable.get("params", {})))
        return
    whole = tree.merge(built.abstract_state.trainable, built.abstract_frozen)
    if config.export.merge:
        jax.eval_shape(lambda v: merge.merge(v["params"], v["adapter"], quant=v.get("quant"), dtype=jnp.float32), whole)
        return
    leaves = tree.flatten(whole["adapter"]) | tree.flatten(built.abstract_state.trainable.get("params", {}))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    try:
        peft_write.check(spec, shapes, model, opened.files.family.layout)
    except ConfigError as error:
        raise ConfigError(f"{error}; or set export.merge=True, which gives a whole model") from error


def build_program(
    config,
    model_config: ModelConfig,
    spec: AdapterSpec,
    mesh,
    total_steps: int,
    num_sources: int = 1,
    given: Mapping[str, str] | None = None,
):
    """The compiled steps (not compiled yet) and the schedule.

    Args:
      given: forms of weights that the base has in NF4 already; see `loading.given_nf4`.
    """
    adapting = spec.method != "full"
    dtype = config.model.frozen_dtype if adapting else config.model.params_dtype
    abstract = {"params": decoder.abstract_params(model_config, dtype)}
    if config.peft.quantization != "none":
        params, quant = nf4.abstract_split(abstract["params"], config.peft.quantization, nf4.is_projection, given)
        abstract = {"params": params, "quant": quant}
    if adapting:
        abstract["adapter"] = jax.eval_shape(lambda base: new_adapter(base, spec, seed=0), abstract)
    optimizer, schedule = optim.make_optimizer(
        name=config.train.optim,
        learning_rate=config.train.learning_rate,
        total_steps=total_steps,
        schedule=config.train.lr_scheduler_type,
        warmup_steps=config.train.warmup_steps,
        warmup_ratio=config.train.warmup_ratio,
        min_lr_ratio=config.train.min_lr_ratio,
        decay_ratio=config.train.decay_ratio,
        weight_decay=config.train.weight_decay,
        weight_decay_regex=config.train.weight_decay_regex or optim.DECAY_REGEX,
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
        bottleneck_activation=spec.bottleneck_activation,
        max_segments=job_data.batching_options(config, mesh)["max_segments"],
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
        num_sources=num_sources,
        offload_optimizer=config.train.offload_optimizer,
    )
    return built, schedule


def check_room(config, folder: runs.RunFolder, job_program: program.Program, total_steps: int) -> None:
    """Refuses a run whose export couldn't take its place, or whose files wouldn't fit on the disk.

    Raises:
      ConfigError: something other than an export is where the export goes.
      StorageError: there isn't room for what the run keeps at most.
    """
    if is_remote(folder.path):
        return
    trained = [leaf.size for leaf in jax.tree.leaves(job_program.abstract_state.trainable)]
    exported = 0
    if config.export.enabled:
        adapter = "adapter" in job_program.abstract_state.trainable and not config.export.merge
        export.check_replaceable(folder.file("export"), adapter=adapter)
        count = job_program.count()
        exported = 4 * sum(trained) if adapter else count["base"] * jnp.dtype(config.export.dtype).itemsize
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job_program.abstract_state))
    saves = 1 + sum(total_steps // every for every in (config.checkpoint.save_steps, config.eval.eval_steps) if every)
    copies = min(saves, config.checkpoint.save_total_limit + 2)  # those kept, the best one, and one being written
    what = f"{copies} checkpoints of {state / 1e9:.2f} GB and the export"
    runs.check_space(folder.path, copies * state + exported, what)


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
                    {
                        "row": ingredient.source.location(row),
                        "source": ingredient.source.name,
                        "index": row,
                        "sample": sample.sample,
                        "pieces": pieces,
                    }
                )
    folder.write_text("masks.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def describe_model(config, opened: loading.Opened, job_program: program.Program) -> dict[str, Any]:
    """What the doctor wants to know about the model: sizes (bytes are those of a device), stop tokens, and what stands
    around an answer, in the template of the run and (where the run has another one) in the model's own."""

    def around(tokenizer) -> list[str] | None:
        with contextlib.suppress(rendering.TemplateError):
            return list(rendering.around_the_answer(tokenizer.renderer)) if tokenizer.renderer else None
        return None

    trained_with = own = around(opened.tokenizer)
    if config.model.chat_template or config.model.end_of_turn:
        own = around(loading.open_model(config.model.path).tokenizer)
    return {
        "parameters": job_program.count(),
        "bytes": {
            "trained": costs.local_bytes(job_program.abstract_state.trainable),
            "optimizer": costs.local_bytes(job_program.abstract_state.opt_state),
            "frozen": costs.local_bytes(job_program.abstract_frozen),
        },
        "stop_ids": list(opened.tokenizer.stop_ids),
        "around_an_answer": {"in_training": trained_with, "in_the_base": own},
    }


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


def load_variables(job: Job) -> dict[str, Any]:
    """The base weights and a fresh (or given) adapter, where the program wants them."""
    abstract = tree.merge(job.program.abstract_state.trainable, job.program.abstract_frozen)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    dtype = next(iter(tree.flatten(abstract["params"]).values())).dtype
    variables = loading.load_base(
        job.opened, job.model_config, dtype, job.program.mesh, quantization=job.config.peft.quantization
    )
    if "adapter" in abstract:
        folder = job.config.peft.adapter_path
        if folder:
            layout = job.opened.files.family.layout
            variables["adapter"], _ = peft_format.load_adapter(folder, job.model_config, layout=layout)
            check_adapter(variables["adapter"], abstract["adapter"], folder)
        else:
            variables["adapter"] = new_adapter(variables, job.spec, job.config.seed)
    return jax.device_put(variables, shardings)


def new_adapter(variables: dict[str, Any], spec: AdapterSpec, seed: int) -> dict[str, Any]:
    """The adapter that training starts from, beside a base of "params" (and "quant")."""
    return lora.init(jax.random.key(seed), variables["params"], spec, quant=variables.get("quant"))


def check_adapter(adapter: dict[str, Any], abstract: dict[str, Any], folder: str) -> None:
    """Raises ConfigError where an adapter to go on from isn't the one that the settings describe."""
    found, wanted = tree.flatten(adapter), tree.flatten(abstract)
    for path in {**wanted, **found}:
        shapes = [tuple(leaves[path].shape) if path in leaves else None for leaves in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{folder}: its {path} is {shapes[0] or 'missing'}, where the peft settings make it "
                f"{shapes[1] or 'nothing'}: set method, r, target_modules and modules_to_save as the adapter has them"
            )
