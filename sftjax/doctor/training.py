"""Rules about training itself: that the loss falls, and what it falls on."""

from __future__ import annotations

import math
from typing import Any

from sftjax.charts import number
from sftjax.doctor.figures import Figures, Verdict


def learning_rate_too_high(run: Figures) -> Verdict:
    """The loss ends well above where it began, or steps weren't finite, with a learning rate above the usual."""
    rate, (_, high, _) = run.highest_rate or 0.0, run.usual_rates
    skipped = _skipped(run)
    if skipped and rate > 1.001 * high:
        seen = f"{skipped} steps had a loss or gradient that is not finite"
    elif run.training and run.training.rose_from(run.train[0]["loss"]) and not (run.held_out and run.held_out.fell):
        seen = f"the training loss rose from {run.train[0]['loss']:.3g} to {run.training.last:.3g}"
    else:
        return None
    return (
        f"{seen}, with a learning rate of {rate:.2g} (usual for this method: up to {high:.2g})",
        f"train.learning_rate={run.lower_rate():g}",
    )


def steps_not_finite(run: Figures) -> Verdict:
    """Steps were skipped, because their loss or gradient was not finite."""
    skipped = _skipped(run)
    if not skipped or learning_rate_too_high(run):
        return None
    return (
        f"{skipped} steps had a loss or gradient that is not finite (their rows are in nonfinite.jsonl)",
        f"train.learning_rate={run.lower_rate():g}, or model.compute_dtype='float32'; look at those rows",
    )


def learning_rate_too_low(run: Figures) -> Verdict:
    """The loss doesn't fall, and the learning rate never came up to the usual range."""
    rate, (low, _, start) = run.highest_rate, run.usual_rates
    if run.falling is not False or rate is None or rate >= 0.9 * low:
        return None
    return (
        f"{_not_falling(run)}; the learning rate was {rate:.2g} at most (usual for this method: from {low:.2g})",
        f"train.learning_rate={start:g}" + _warm_up(run),
    )


def _warm_up(run: Figures) -> str:
    wanted = run.setting("train.learning_rate") or 0.0
    return ", train.warmup_steps=0 (it never ended)" if wanted >= run.usual_rates[0] else ""


def template_mismatch(run: Figures) -> Verdict:
    """The model has a chat template, and the run wrote its turns in another way."""
    around = run.model.get("around_an_answer") or {}
    ours, own = around.get("in_training"), around.get("in_the_base")
    if not ours or not own or [part.strip() for part in ours] == [part.strip() for part in own]:
        return None
    field = "model.chat_template" if run.setting("model.chat_template") else "model.end_of_turn"
    start = f"; held-out loss {run.evals[0]['eval_loss']:.3g} before training" if run.evals else ""
    return (
        f"an answer stood between {ours[0]!r} and {ours[1]!r}; the model was made for {own[0]!r} and {own[1]!r}{start}",
        f"{field}='' (the model's own)",
    )


def mask_leaves_little(run: Figures) -> Verdict:
    """Few tokens have a loss: because only some turns are trained, or in a run whose loss doesn't fall."""
    share, train_on = run.preflight.get("trained_share"), run.setting("data.train_on")
    if share is None or share >= 0.05 or (train_on == "all" and run.falling is not False):
        return None
    remedy = "data.train_on='all'" if train_on != "all" else "data.format=NAME (or the source's 'fields') of them"
    return (
        f"{share:.1%} of the tokens are trained, {run.preflight['trained_tokens'] / run.preflight['samples']:.1f} a "
        f"sample (data.train_on={train_on!r})",
        f"{remedy}; tools/preview.py shows what is trained",
    )


def dead_adapters(run: Figures) -> Verdict:
    """Adapters whose last matrix is still the zero it began as: they add nothing to the model."""
    counts = run.summary.get("adapters") or {}
    if not counts.get("zero"):
        return None
    ratio = run.setting("peft.loraplus_lr_ratio")
    if ratio == 0:
        remedy = "peft.loraplus_lr_ratio=1.0 (at 0, B is never trained)"
    elif not run.setting("train.learning_rate"):
        remedy = f"train.learning_rate={run.usual_rates[2]:g}"
    else:
        remedy = f"peft.target_modules=('all-linear',), and train.learning_rate={run.higher_rate():g}"
    return f"{counts['zero']} of {counts['count']} adapters still add nothing (B is 0)", remedy


def loss_not_falling(run: Figures) -> Verdict:
    """Neither training nor held-out loss falls, for none of the reasons above."""
    if run.falling is not False:
        return None
    if any(rule(run) for rule in (learning_rate_too_high, learning_rate_too_low, dead_adapters)):
        return None  # said already
    rate, high = run.setting("train.learning_rate") or 0.0, run.usual_rates[1]
    if rate < high / 1.5:
        return _not_falling(run), f"train.learning_rate={run.higher_rate():g}"
    epochs = max(1, round(3 * run.epochs))
    return _not_falling(run), f"train.num_train_epochs={epochs}; look at the data with tools/preview.py"


def length_too_short(run: Figures) -> Verdict:
    """More than a twentieth of the trained tokens are cut off or dropped because samples are longer than a row."""
    get = run.preflight.get
    lost = (get("lost_trained_tokens") or 0) / max(1, get("trained_tokens") or 0)
    if lost <= 0.05:
        return None
    cut = ", and an answer that is cut off ends without its stop token" if get("truncated") else ""
    return (
        f"{lost:.0%} of the trained tokens are lost: {get('coverage') or 0:.0%} of the samples fit into "
        f"{get('max_length')} tokens{cut}",
        f"data.max_length={max(get('proposed_length') or 0, 2 * get('max_length'))}, or data.over_length='split'"
        if (get("proposed_length") or 0) <= get("max_length")
        else f"data.max_length={get('proposed_length')}, or data.over_length='split'",
    )


def _rising(run: Figures) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(the evaluation with the lowest held-out loss, the last one) where the last is clearly higher and the training
    loss isn't; or (before training, what is exported) where the report says that it rose."""
    if len(run.evals) < 2:
        return None
    best, last = min(run.evals, key=lambda line: line["eval_loss"]), run.evals[-1]
    tested = run.difference("evaluation", best["step"], last["step"])
    higher = last["eval_loss"] > 1.02 * best["eval_loss"] + 0.01 and (tested is None or tested.rose)
    if higher and not (run.training and run.training.last > run.train[0]["loss"]):
        return best, last
    if run.reported and run.reported.rose and not learning_rate_too_high(run):
        exported = [line for line in run.evals if line["step"] == run.summary.get("exported_step")]
        return run.evals[0], (exported or [last])[0]
    return None


def _said_rising(run: Figures, best: dict[str, Any], last: dict[str, Any]) -> str:
    return (
        f"held-out loss was lowest at step {best['step']} ({best['eval_loss']:.3f}) and rose to "
        f"{last['eval_loss']:.3f} at step {last['step']}, after {run.epochs:.1f} epochs"
    )


def duplicates(run: Figures) -> Verdict:
    """Held-out loss rises, and a tenth or more of the training samples are there twice."""
    rising, copies, samples = _rising(run), run.preflight.get("duplicates") or 0, run.preflight.get("samples") or 0
    if not rising or copies < 0.1 * samples or not copies:
        return None
    return (
        f"{_said_rising(run, *rising)}; {copies:,} of {samples:,} samples are copies of others",
        "data.train=('FILE',) with what tools/curate.py leaves of it, and train.num_train_epochs=1",
    )


def validation_rising(run: Figures) -> Verdict:
    """Held-out loss rises again while training loss falls: the data is learnt by heart."""
    rising = _rising(run)
    if not rising:
        return None
    best, last = rising
    epochs = run.epochs * best["step"] / max(1, last["step"])
    remedy = f"train.max_steps={best['step'] or max(1, last['step'] // 4)}"
    if not run.setting("train.max_steps") and epochs >= 1:
        remedy = f"train.num_train_epochs={epochs:.0f}"
    if run.setting("export.checkpoint") != "best":
        remedy += ", export.checkpoint='best'"
    return _said_rising(run, best, last), f"{remedy}, or eval.early_stopping_patience=2 with eval.eval_steps"


def forgetting(run: Figures) -> Verdict:
    """The held-out loss of one source rises while that of another falls: what the model could before is lost."""
    sources = run.sources()
    lost = {
        name: course
        for name, course in sources.items()
        if course.last > 1.02 * course.first + 0.02 and (course.tested is None or course.tested.rose)
    }
    if not lost or not (run.falling or any(course.fell for course in sources.values())):
        return None
    name, course = max(lost.items(), key=lambda item: item[1].last - item[1].first)
    remedy = f"train.learning_rate={run.lower_rate():g}"
    if run.method == "full":
        remedy += " or peft.method='lora'"
    return (
        f"held-out loss of {name} rose from {course.first:.3f} to {course.last:.3f} while others fell",
        f"{remedy}; or mix in such rows: another entry of data.train with weight=0.1",
    )


def full_for_a_small_change(run: Figures) -> Verdict:
    """All parameters were trained with few tokens, and the model got worse on what it didn't see."""
    trainable = (run.model.get("parameters") or {}).get("trainable")
    tokens = run.preflight.get("trained_tokens")
    if run.method != "full" or not trainable or not tokens or tokens > trainable / 10:
        return None
    if not (_rising(run) or forgetting(run)):
        return None
    return (
        f"{number(trainable)} parameters were trained with {number(tokens)} tokens, and what was not trained got worse",
        "peft.method='lora' with train.learning_rate=2e-4",
    )


def adapter_too_small(run: Figures) -> Verdict:
    """More to learn than the adapter holds: over two trained tokens a parameter (about a bit a token, arXiv:2404.05405
    finds two bits a parameter), in more than half an epoch of data that isn't learnt by heart."""
    trainable = (run.model.get("parameters") or {}).get("trainable")
    tokens = run.preflight.get("trained_tokens")
    seen = run.train[-1].get("num_trained_tokens") if run.train else None
    if run.method == "full" or not trainable or not tokens or not seen or _rising(run):
        return None
    unlike = min(tokens, seen)
    if unlike <= 2 * trainable:
        return None
    rank = run.setting("peft.r") or 1
    wanted = 2 ** math.ceil(math.log2(rank * unlike / (2 * trainable)))
    remedy = f"peft.r={wanted}, peft.lora_alpha={2 * wanted}" if wanted <= 256 else "peft.method='none'"
    return f"{number(unlike)} trained tokens for an adapter of {number(trainable)} parameters", remedy


def _skipped(run: Figures) -> int:
    return max(len(run.run.nonfinite), sum(line.get("skipped_steps") or 0 for line in run.run.train))


def _not_falling(run: Figures) -> str:
    parts = []
    if run.training:
        parts.append(f"training loss {run.training.first:.3f} at first, {run.training.last:.3f} at the end")
    if run.held_out:
        tested = f" ({run.held_out.tested})" if run.held_out.tested else ""
        parts.append(f"held-out loss {run.held_out.first:.3f} before, {run.held_out.last:.3f} after{tested}")
    return "; ".join(parts)
