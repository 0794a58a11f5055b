"""The end of a run: the best checkpoint exported, loaded again and compared; what came of it, in words and a page."""

from __future__ import annotations

import functools
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sftjax import doctor, held_out, loading, report, run_evaluation, runs, tree
from sftjax.checkpoint import Checkpointer
from sftjax.data import pipeline as pipelines
from sftjax.errors import Diverged
from sftjax.models import decoder
from sftjax.parallel import partition
from sftjax.peft import merge
from sftjax.phases import phase
from sftjax.utils import storage
from sftjax.weights import bottleneck_format, companions, export, families, hf, peft_format

VERIFY_TOKENS = 512
MAX_RELATIVE_DIFFERENCE = 1e-5  # reloaded against the same weights in memory, float32; 0 but for the order of sums


def finish(job, state, frozen) -> None:
    """Exports and verifies, writes summary, findings and report, and prints what a person wants to know.

    Raises:
      Diverged: the model that would be exported has no finite loss.
    """
    config = job.config
    with phase("choosing the checkpoint, comparing it with the start"):
        state, step = chosen_state(job, state)
        summary: dict[str, Any] = {"steps": int(state.step), "exported_step": step}
        summary |= held_out_summary(compare(job, "evaluation", state, frozen, step))
        summary |= plain_text_summary(compare(job, "plain-text", state, frozen, step))
    if not math.isfinite(summary.get("eval_loss_after", 0.0)):
        report.write(job.folder.path)
        raise Diverged(
            f"the held-out loss after step {step} is not finite, so nothing is exported: lower train.learning_rate and "
            f"train again in another run_dir; {job.folder.file('report.html')} shows where it went wrong"
        )
    if config.export.enabled:
        summary["export"] = job.folder.file("export")
        summary["verification"] = export_and_verify(job, state, frozen, summary["export"])
    if "adapter" in state.trainable:
        summary["adapters"] = count_adapters(tree.merge(state.trainable, frozen)["adapter"], job.program.mesh)
    with phase("writing the report"):
        findings = doctor.diagnose(job.folder.path, summary)
        job.folder.write_json("doctor.json", {"findings": [finding._asdict() for finding in findings]})
        report.write(job.folder.path, summary)
    if config.export.enabled:
        storage.write_text(os.path.join(summary["export"], "README.md"), report.model_card(job.folder.path, summary))
    job.folder.write_json("summary.json", summary)  # last: it says that the run is finished
    say(job, summary)
    if findings:
        print(doctor.text(findings))


def missing(folder: runs.RunFolder, summary: dict[str, Any]) -> list[str]:
    """What a run that says it is finished should have left, and hasn't: names of files, missing or empty."""
    wanted = ["report.html", "doctor.json"]
    if "export" in summary:
        wanted += ["verification.json", "export/verification.json", "export/README.md"]
    return [name for name in wanted if not folder.size(name)]


def open_checkpoints(job) -> Checkpointer:
    """The run's checkpoints, with the metric that says which one is best."""
    return Checkpointer(
        job.folder.checkpoints,
        keep=job.config.checkpoint.save_total_limit,
        metric=job.config.eval.metric_for_best_model,
        greater_is_better=job.config.eval.greater_is_better,
        record=job.folder.file("committed.json"),
    )


def chosen_state(job, state):
    """The state to export, and its step: the best by `eval.metric_for_best_model`, or the last."""
    last, metric = int(state.step), job.config.eval.metric_for_best_model
    if job.config.export.checkpoint == "last" or not job.measures:
        return state, last
    with open_checkpoints(job) as saved:
        best = saved.best_step()
        if best is None or best == last:
            return state, last
        what = {"eval_loss": "lowest held-out loss"}.get(metric, f"best {metric}")
        print(f"step {best} had the {what} and is exported (the last is {last})")
        return saved.restore(job.program.abstract_state, best).state, best


def compare(job, kind: str, state, frozen, step: int) -> tuple[held_out.Evaluation, held_out.Evaluation] | None:
    """What was held out ("evaluation" or "plain-text"), before training and after `step`; None where there is nothing
    to compare."""
    before = run_evaluation.evaluation(job, kind, 0)
    after = run_evaluation.evaluation(job, kind, step, state, frozen)
    if before is None or after is None:
        return None
    if not np.array_equal(before.keys, after.keys):
        print(f"{kind}: what is held out has changed since the run began, so before and after can't be compared")
        return None
    return before, after


def held_out_summary(pair: tuple[held_out.Evaluation, held_out.Evaluation] | None) -> dict[str, Any]:
    """Held-out loss before and after, with the interval of the difference over conversations."""
    if pair is None:
        return {}
    return _compared("", held_out.compare(*pair)) | {
        "held_out_examples": len(pair[1].keys),
        "held_out_trained_tokens": int(pair[1].trained.sum()),
    }


def plain_text_summary(pair: tuple[held_out.Evaluation, held_out.Evaluation] | None) -> dict[str, Any]:
    """Loss on held-out plain text before and after: what was forgotten."""
    return {} if pair is None else _compared("plain_text_", held_out.compare(*pair))


def _compared(prefix: str, found: held_out.Difference) -> dict[str, Any]:
    loss = prefix or "eval_"
    return {
        f"{loss}loss_before": found.before,
        f"{loss}loss_after": found.after,
        f"{prefix}difference": found.after - found.before,
        f"{prefix}difference_95": [found.low, found.high],
    }


def export_and_verify(job, state, frozen, folder: str) -> dict[str, Any]:
    """Writes the export and compares it, loaded again, with the model in memory.

    Returns:
      The figures of `verification.json`.

    Raises:
      RuntimeError: what was read back isn't what was trained.
    """
    config, opened, merged_into, versions = job.config, job.opened, None, None
    variables = tree.merge(state.trainable, frozen)
    adapting = "adapter" in variables
    dtype = jnp.dtype(config.export.dtype)
    if adapting and not config.export.merge:
        with phase("exporting"), export.whole_folder(folder, adapter=True) as place:
            versions = write_adapter(job, place, with_trained_params(variables["adapter"], state.trainable))
            beside = companions.files(
                None, source=opened.files, tokenizer=opened.tokenizer.files(), stop_ids=opened.tokenizer.stop_ids
            )
            for name, content in beside.items() if jax.process_index() == 0 else ():
                storage.write_bytes(f"{place}/{name}", content)
        with phase("reading the export back"):
            reloaded = {**variables, "adapter": read_back(job, folder, variables["adapter"])}
        expected, against = variables, "the base weights in memory with the adapter read back"
    else:
        with phase("exporting"):
            params, merged_into = plain_params(job, variables)
            export.export_model(
                folder,
                job.model_config,
                params,
                dtype=dtype,
                source=opened.files,
                tokenizer=opened.tokenizer.files(),
                stop_ids=opened.tokenizer.stop_ids,
                text_only=config.export.text_only,
            )
        expected = {"params": jax.tree.map(lambda leaf: leaf.astype(dtype), params)}
        read = hf.load_config(folder)
        places = partition.shardings({"params": decoder.abstract_params(read)}, job.program.mesh)
        with phase("reading the export back"):
            reloaded = {"params": hf.load_params(folder, read, dtype, places["params"])}
        against = f"the weights in memory, rounded to {dtype.name}"
    with phase("verifying the export"):
        figures = compare_logits(job, expected, reloaded)
        figures["rounding"] = compare_logits(job, variables, reloaded)  # against what was trained
    figures["compared_with"] = against
    if versions is not None:  # names and shapes are those that PEFT looks for, under these of transformers
        figures["loads_in_peft_with_transformers"] = versions
    if merged_into:
        figures["merged_into"] = merged_into
    figures["step"] = int(state.step)
    passed = figures["max_relative_difference"] <= MAX_RELATIVE_DIFFERENCE
    figures["passed"] = bool(passed)
    for path in (os.path.join(folder, "verification.json"), job.folder.file("verification.json")):
        storage.write_text(path, json.dumps(figures, indent=2))
    if not passed:
        raise RuntimeError(f"{folder}: the exported model differs from the trained one: {figures}")
    return figures


def write_adapter(job, folder: str, adapter: dict[str, Any]) -> list[str] | None:
    """The adapter's folder, as PEFT reads it, or a bottleneck's as the `adapters` library does.

    Returns:
      the major versions of transformers with which PEFT loads it.
    """
    family, base = job.opened.files.family, job.config.model.path
    if job.spec.bottleneck:
        bottleneck_format.save_adapter(
            folder,
            adapter,
            job.spec,
            job.model_config,
            model_type=families.family_of(job.opened.files.raw_config),
            model_class=family.architecture,
            base_model=base,
        )
        return None
    return peft_format.save_adapter(folder, adapter, job.spec, job.model_config, layout=family.layout, base_model=base)


def with_trained_params(adapter: dict[str, Any], trainable: dict[str, Any]) -> dict[str, Any]:
    """The adapter with those parameters of the base that were trained beside it (`peft.also_train`)."""
    return tree.unflatten(tree.flatten(trainable.get("params", {})) | tree.flatten(adapter))


def read_back(job, folder: str, adapter: dict[str, Any]) -> dict[str, Any]:
    """The adapter as the folder has it, where the run had its own: rows that only pad the vocabulary are put back."""
    model = job.model_config
    if job.spec.bottleneck:
        return bottleneck_format.load_adapter(folder, model)[0]
    if model.valid_vocab is not None:
        model = model.replace(vocab_size=model.valid_vocab, valid_vocab=None)
    found, _ = peft_format.load_adapter(folder, model, layout=job.opened.files.family.layout)
    flat, own = tree.flatten(found), tree.flatten(adapter)
    for path in own.keys() & flat.keys():
        if path.startswith(("embed_tokens/", "lm_head/")) and flat[path].ndim:
            missing = own[path].shape[0] - flat[path].shape[0]
            flat[path] = np.pad(flat[path], [(0, missing)] + [(0, 0)] * (flat[path].ndim - 1))
    return tree.unflatten(flat)


def count_adapters(adapter: dict[str, Any], mesh) -> dict[str, int]:
    """How many adapters there are, and how many of them still add nothing: their last matrix is as it began, 0."""
    leaves = tree.flatten(adapter)
    last = {path: leaf for path, leaf in leaves.items() if path.endswith(("/lora_B", "/up/weight"))}

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def used(leaves):
        return jax.tree.map(lambda leaf: jnp.any(leaf != 0, axis=(-2, -1)), leaves)

    count = zero = 0
    for path, flags in used(last).items():
        scale = leaves.get(path.removesuffix("/lora_B") + "/scale")
        # a scale of 0 is that of a layer without this adapter
        there = np.ones(len(flags), bool) if scale is None else np.asarray(scale) != 0
        count, zero = count + np.asarray(flags)[there].size, zero + int((~np.asarray(flags)[there]).sum())
    return {"count": count, "zero": zero}


def plain_params(job, variables) -> tuple[Any, str | None]:
    """The parameters of a full export, an adapter folded in; and into which base, in words (None without an adapter).

    A merge is computed in float32, and rounded once: when it is written.
    """
    base, adapter, quant = (variables.get(name) for name in ("params", "adapter", "quant"))
    if adapter is None:
        return base, None
    into = "the weights that it was trained beside"
    if quant is not None:
        kind = job.config.peft.quantization
        into = f"the dequantised {kind} weights that it was trained beside"
        if job.config.export.merge_into == "original":
            into = f"the original weights, where it was trained beside their {kind} form"
            original = loading.load_base(job.opened, job.model_config, jnp.float32, job.program.mesh)["params"]
            trained = tree.flatten(job.program.abstract_state.trainable.get("params", {}))
            kept = {path: leaf for path, leaf in tree.flatten(base).items() if path in trained}
            base, quant = tree.unflatten(tree.flatten(original) | kept), None
    return merge.merge(base, adapter, quant=quant, dtype=jnp.float32), into


def compare_logits(job, expected, reloaded) -> dict[str, Any]:
    """Logits of two sets of variables on the first tokens of the data, in float32."""
    tokens = verification_tokens(job)
    runtime = job.program.runtime.replace(compute_dtype="float32", remat="none")

    # Replicated, so that each of several processes holds all of them.
    @functools.partial(jax.jit, out_shardings=NamedSharding(job.program.mesh, PartitionSpec()))
    def logits(variables):
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        ones = jnp.ones_like(tokens)
        hidden, _ = decoder.hidden_states(job.program.config, runtime, variables, tokens, positions, ones)
        return decoder.logits(job.program.config, runtime, variables, hidden)

    first, second = np.asarray(logits(expected)), np.asarray(logits(reloaded))
    difference = np.abs(first - second)
    return {
        "tokens": int(tokens.size),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "max_relative_difference": float(difference.max() / np.abs(first).max()),
        "top1_agreement": float(np.mean(first.argmax(-1) == second.argmax(-1))),
    }


def verification_tokens(job) -> np.ndarray:
    """i32 `[1, VERIFY_TOKENS]`: a row of the training data."""
    pipeline = pipelines.build(
        job.mixture, length=VERIFY_TOKENS, batch_size=1, packing_strategy="none", overlong="split", prefetch=0
    )
    with pipeline:
        return next(iter(pipeline)).batch["tokens"][0]


def say(job, summary: dict[str, Any]) -> None:
    """The end of the run, for a person."""
    print()
    if found := report.difference(summary):
        print(
            f"held-out response loss: {found.before:.4f} before, {found.after:.4f} after (difference {found}, over "
            f"{summary['held_out_examples']} conversations never trained on)"
        )
    if found := report.difference(summary, "plain_text_"):
        print(
            f"plain text loss: {found.before:.4f} before, {found.after:.4f} after (difference {found}): "
            "above 0 is what was forgotten"
        )
    say_samples(job)
    if "export" in summary:
        figures = summary["verification"]
        print(
            f"export:  {summary['export']}  (read back: largest logit difference {figures['max_difference']:.2g}, "
            f"top-1 agreement {figures['top1_agreement']:.2%})"
        )
        if figures.get("loads_in_peft_with_transformers") == ["5"]:
            print("peft:    loads with transformers 5, not with 4 (export.merge=True gives a model for both)")
        if "merged_into" in figures:
            trained = figures["rounding"]
            print(
                f"merged:  into {figures['merged_into']} (against what was trained: largest logit difference "
                f"{trained['max_difference']:.2g}, mean {trained['mean_difference']:.2g}, top-1 agreement "
                f"{trained['top1_agreement']:.2%})"
            )
    print(f"report:  {job.folder.file('report.html')}")
    if "export" in summary:
        adapter = "adapter" in tree.merge(job.program.abstract_state.trainable, job.program.abstract_frozen)
        alone = not adapter or job.config.export.merge
        model = (
            f"--model {summary['export']}"
            if alone
            else f"--model {job.config.model.path} --adapter {summary['export']}"
        )
        print(f"chat:    python tools/generate.py {model} --interactive")


def say_samples(job) -> None:
    """The fixed prompts, answered before and after."""
    path = job.folder.file("samples.jsonl")
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(json.dumps(line["messages"]), []).append(line)
    for answers in by_prompt.values():
        if len(answers) < 2:
            continue
        print(f"  user    {answers[0]['messages'][-1]['content']}")
        print(f"  before  {answers[0]['answer']}")
        print(f"  after   {answers[-1]['answer']}")
        print()
