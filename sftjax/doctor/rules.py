"""The table of rules. Each is a function of a run's figures: None, or (evidence, remedy).

A remedy names the field of the configuration and a value for it. The order is that of causes before effects: of several
findings the first explains most. Thresholds are there to keep a healthy run silent; each is named where it is used.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sftjax.charts import number
from sftjax.curate.patterns import REFUSAL
from sftjax.doctor.figures import Figures, words
from sftjax.errors import ConfigError
from sftjax.scorers.statistics import repeated

Verdict = tuple[str, str] | None


class Finding(NamedTuple):
    rule: str
    evidence: str
    remedy: str


def diagnose(folder: str) -> list[Finding]:
    """What is wrong with a run, the likeliest cause first; empty for a healthy one. Files that aren't there (yet) leave
    out what would be read from them.

    Raises:
      ConfigError: it is no run's folder.
    """
    figures = Figures(str(folder))
    if not figures.run.config:
        raise ConfigError(f"{folder}: no config.json that can be read, so this is no run's folder")
    found = [(rule.__name__, rule(figures)) for rule in RULES]
    return [Finding(name, *verdict) for name, verdict in found if verdict]


def text(findings: Sequence[Finding]) -> str:
    """For a person."""
    if not findings:
        return "doctor: nothing found"
    lines = []
    for finding in findings:
        lines += [f"doctor:  {finding.rule.replace('_', ' ')}: {finding.evidence}", f"         -> {finding.remedy}"]
    return "\n".join(lines)


# --- training does not work -------------------------------------------------------------------------------------------


def learning_rate_too_high(run: Figures) -> Verdict:
    """The loss ends well above where it began, or steps weren't finite, with a learning rate above the usual."""
    rate, (_, high, _) = run.highest_rate or 0.0, run.usual_rates
    skipped = _skipped(run)
    if skipped and rate > high:
        seen = f"{skipped} steps had a loss or gradient that is not finite"
    elif run.training and run.training.last > 1.1 * run.train[0]["loss"] and not (run.held_out and run.held_out.fell):
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
    if run.falling is not False or rate is None or rate >= low:
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
    remedy = "data.train_on='all'" if train_on != "all" else "data.format=NAME (and data.fields) of these rows"
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


# --- the data and the end of answers ----------------------------------------------------------------------------------


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


def stop_token_untrained(run: Figures) -> Verdict:
    """A tenth of the conversations or more never train the token that ends an answer."""
    share = run.preflight.get("stop_trained")
    if share is None or share > 0.9:
        return None
    return (
        f"the token that ends an answer is trained in {share:.0%} of the conversations only",
        "data.train_on='all', and a {'path', 'format'} of its own in data.train for rows of another kind; "
        "tools/preview.py shows which rows train none",
    )


def stop_token_missing(run: Figures) -> Verdict:
    """generation_config.json doesn't name the token that the training taught to stop on: others would not stop."""
    taught = (run.model.get("stop_ids") or [None])[0]
    settings = run.base_files("generation_config.json")
    if taught is None or not settings or "eos_token_id" not in settings:
        return None
    named = settings["eos_token_id"]
    named = named if isinstance(named, list) else [named]
    if taught in named:
        return None
    return (
        f"answers end with token {taught}, but generation_config.json names {named}: other programs would not stop",
        f"export.merge=True (the export then names it), or add {taught} to eos_token_id there",
    )


def endless_answers(run: Figures) -> Verdict:
    """Two thirds of the answers don't stop within twice what the trained answers take."""
    if len(run.answers) < 3 or not run.preflight.get("samples"):
        return None
    usual = run.preflight["trained_tokens"] / run.preflight["samples"]  # of a conversation: an answer has fewer
    endless = [a for a in run.answers if a.get("finish_reason") == "length" and (a.get("num_tokens") or 0) > 2 * usual]
    if len(endless) < 2 / 3 * len(run.answers):
        return None
    remedy = f"train.num_train_epochs={max(2, round(2 * run.epochs))}"
    if run.preflight.get("truncated"):
        remedy = "data.over_length='drop' (a row that is cut loses its stop token)"
    return (
        f"{len(endless)} of {len(run.answers)} answers did not stop within {endless[0]['num_tokens']} tokens, where a "
        f"conversation has {usual:.0f} trained ones",
        remedy,
    )


# --- it learns the wrong thing ----------------------------------------------------------------------------------------


def _rising(run: Figures) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(the evaluation with the lowest held-out loss, the last one) where the last is clearly higher and the training
    loss isn't."""
    if len(run.evals) < 2 or (run.training and run.training.last > run.train[0]["loss"]):
        return None
    best, last = min(run.evals, key=lambda line: line["eval_loss"]), run.evals[-1]
    return (best, last) if last["eval_loss"] > 1.02 * best["eval_loss"] + 0.01 else None


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
    lost = {name: course for name, course in sources.items() if course.last > 1.02 * course.first + 0.02}
    if not lost or not any(course.fell for course in sources.values()):
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


# --- what it answers --------------------------------------------------------------------------------------------------


def _worse(run: Figures, test: Callable[[str], bool], share: float) -> tuple[int, int] | None:
    """(answers with a flaw, answers) where it is at least a share of three or more, and more than before training."""
    flawed = sum(test(answer["answer"]) for answer in run.answers)
    if len(run.answers) < 3 or flawed < share * len(run.answers):
        return None
    before = sum(test(answer["answer"]) for answer in run.answers_before)
    if run.answers_before and flawed / len(run.answers) <= before / len(run.answers_before):
        return None
    return flawed, len(run.answers)


MARKUP = re.compile(
    r"<\|?(?:im_start|im_end|start_header_id|end_header_id|eot_id|start_of_turn|end_of_turn|endoftext|user|assistant|system)"
    r"\|?>|\[/?INST\]|<</?SYS>>|^\s*(?:### ?(?:Instruction|Response|Human|Assistant)\b|(?:user|assistant|system)\n)",
    re.I | re.M,
)


def empty_answers(run: Figures) -> Verdict:
    """Half of the answers or more have nothing in them."""
    if not (found := _worse(run, lambda answer: not answer.strip(), 0.5)):
        return None
    remedy = "data.train=('FILE',) without rows whose answers are empty or blank (tools/curate.py)"
    if run.setting("model.chat_template"):
        remedy = f"model.chat_template='' (the model's own), or {remedy}"
    return f"{found[0]} of {found[1]} answers are empty", remedy


def garbled_answers(run: Figures) -> Verdict:
    """A third of the answers or more hold template markup, or characters that are no text."""

    def garbled(answer: str) -> bool:
        odd = sum(character == "�" or (ord(character) < 32 and character not in "\n\t\r") for character in answer)
        return bool(MARKUP.search(answer)) or odd > 0.02 * len(answer)

    if not (found := _worse(run, garbled, 1 / 3)):
        return None
    remedy = f"train.learning_rate={run.lower_rate():g}"
    if run.setting("model.chat_template"):
        remedy = "model.chat_template='' (the model's own)"
    return f"{found[0]} of {found[1]} answers hold template markup, or characters that are no text", remedy


def loops(run: Figures) -> Verdict:
    """A third of the answers or more repeat themselves: half of their four-word runs were there before."""
    if not (found := _worse(run, lambda answer: len(words(answer)) >= 12 and repeated(words(answer)) > 0.5, 1 / 3)):
        return None
    return (
        f"{found[0]} of {found[1]} answers go round in circles",
        f"train.learning_rate={run.lower_rate():g}, and data.train without rows that repeat themselves "
        "(tools/curate.py); eval.repetition_penalty=1.1 hides it",
    )


def refusals(run: Figures) -> Verdict:
    """A third of the answers or more refuse, and more than before."""
    if not (found := _worse(run, lambda answer: bool(REFUSAL.search(answer)), 1 / 3)):
        return None
    return (
        f"{found[0]} of {found[1]} answers refuse",
        "data.train=('FILE',) with what tools/curate.py leaves of it (its rule `refusal` lists such rows)",
    )


def style_collapse(run: Figures) -> Verdict:
    """Three quarters of at least four answers begin with the same three words."""

    def opening(answer: dict[str, Any]) -> str:
        said = words(answer["answer"])[:3]
        return " ".join(said).lower() if len(said) == 3 else ""

    if len(run.answers) < 4 or len({json.dumps(answer.get("messages")) for answer in run.answers}) < 4:
        return None
    (common, count), *_ = Counter(map(opening, run.answers)).most_common(1)
    before = sum(opening(answer) == common for answer in run.answers_before)
    if not common or count < 0.75 * len(run.answers) or before >= count:
        return None
    return (
        f"{count} of {len(run.answers)} answers begin with {common!r} ({before} did before)",
        "data.train=('FILE',) balanced by tools/curate.py, and train.num_train_epochs=1",
    )


# --- how it runs ------------------------------------------------------------------------------------------------------


def gradient_spikes(run: Figures) -> Verdict:
    """Gradients of ten times the usual norm, in two steps and one of a hundred, after the first tenth of the run."""
    norms = [(line["step"], line["grad_norm"]) for line in run.train if line.get("grad_norm") is not None]
    norms = norms[len(norms) // 10 :]
    if len(norms) < 20:
        return None
    usual = statistics.median(norm for _, norm in norms)
    spikes = [(step, norm) for step, norm in norms if norm > 10 * usual]
    if len(spikes) < max(2, 0.01 * len(norms)):
        return None
    step, norm = max(spikes, key=lambda spike: spike[1])
    clip = run.setting("train.max_grad_norm") or 0.0
    clip = f"train.max_grad_norm={_short(2 * usual)}, " if not clip or clip > 4 * usual else ""
    return (
        f"{len(spikes)} of {len(norms)} steps had a gradient over ten times the usual norm of {number(usual)} (step "
        f"{step}: {number(norm)})",
        f"{clip}train.learning_rate={run.lower_rate():g}",
    )


def learning_rate_unusual(run: Figures) -> Verdict:
    """The learning rate is out of the range that is usual for the method."""
    rate, (low, high, start) = run.setting("train.learning_rate"), run.usual_rates
    if rate is None or 0.999 * low <= rate <= 1.001 * high:
        return None
    return (
        f"a learning rate of {rate:g}, where {low:g} to {high:g} is usual for "
        f"{'full tuning' if run.method == 'full' else 'adapters'} of such a model",
        f"train.learning_rate={start:g}",
    )


def padding_waste(run: Figures) -> Verdict:
    """Less than 70 % of what is computed are real tokens."""
    share, length = run.preflight.get("packing_efficiency"), run.preflight.get("max_length") or 1
    if share is None or share >= 0.7:
        return None
    mean = (run.preflight.get("length") or {}).get("mean") or 1
    slots = length * (run.setting("train.batch_size") or 1)
    if run.setting("data.packing") == "none":
        remedy = "data.packing='best_fit'"
    elif (run.preflight.get("tokens_to_come") or slots) < 0.7 * slots:
        remedy = f"train.batch_size={max(1, round(run.preflight['tokens_to_come'] / length))} (the data is less)"
    elif (run.setting("data.max_segments") or 0) * mean < length:
        remedy = f"data.max_segments={2 * math.ceil(length / mean)}"
    else:
        remedy = f"data.max_length={max(128, 128 * math.ceil(2 * mean / 128))}"
    return f"{share:.0%} of the tokens in a batch are real, the rest is padding (mean sample: {mean:.0f})", remedy


def data_bound(run: Figures) -> Verdict:
    """A third of the time or more the device waits for data."""
    shares = run.timing("waiting_share")
    if not shares or statistics.median(shares) < 1 / 3:
        return None
    workers = run.setting("data.workers") or 0
    return (
        f"the device waited for data in {statistics.median(shares):.0%} of the time",
        f"data.workers={max(2, 2 * workers)}",
    )


def slow_device(run: Figures) -> Verdict:
    """A run of more than a day on a CPU, or one whose steps came to take twice as long."""
    seconds, rates = run.timing("step_seconds"), run.timing("padded_tokens_per_second")
    if not seconds:
        return None
    hours = statistics.median(seconds) * (run.preflight.get("steps") or 0) / 3600
    if run.run.environment.get("backend") == "cpu" and hours > 24:
        steps = max(1, round(8 * 3600 / statistics.median(seconds)))
        return (
            f"{hours:,.0f} hours for the whole run on a CPU, at {number(statistics.median(rates))} tokens/s",
            f"train.max_steps={steps} (8 hours), or peft.method='lora', or a GPU or TPU",
        )
    third = len(rates) // 3
    if third >= 20 and statistics.median(rates[-third:]) < 0.5 * statistics.median(rates[:third]):
        first, last = (number(statistics.median(part)) for part in (rates[:third], rates[-third:]))
        return (
            f"{first} tokens/s at first, {last} at the end: the machine is throttled, or others use it",
            "data.workers=0 if the machine is short of cores or memory; else look at its temperature and neighbours",
        )
    return None


RULES: tuple[Callable[[Figures], Verdict], ...] = (
    learning_rate_too_high,
    steps_not_finite,
    learning_rate_too_low,
    template_mismatch,
    mask_leaves_little,
    dead_adapters,
    loss_not_falling,
    length_too_short,
    stop_token_untrained,
    stop_token_missing,
    duplicates,
    validation_rising,
    forgetting,
    full_for_a_small_change,
    adapter_too_small,
    empty_answers,
    garbled_answers,
    refusals,
    loops,
    style_collapse,
    endless_answers,
    gradient_spikes,
    learning_rate_unusual,
    padding_waste,
    data_bound,
    slow_device,
)


# --- small things -----------------------------------------------------------------------------------------------------


def _skipped(run: Figures) -> int:
    return max(len(run.run.nonfinite), sum(line.get("skipped_steps") or 0 for line in run.run.train))


def _not_falling(run: Figures) -> str:
    parts = []
    if run.training:
        parts.append(f"training loss {run.training.first:.3f} at first, {run.training.last:.3f} at the end")
    if run.held_out:
        parts.append(f"held-out loss {run.held_out.first:.3f} before, {run.held_out.last:.3f} at best after")
    return "; ".join(parts)


def _short(value: float) -> str:
    return f"{value:.1g}"
