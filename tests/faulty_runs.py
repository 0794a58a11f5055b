"""Runs of a tiny model with one thing wrong in each, and healthy ones; made by the product, as a user would."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests import tiny_run

NEW = tiny_run.WORDS[11:]  # what a run is to speak of; the base speaks of all the words
COMMON = {
    "model.compute_dtype": "float32",
    "data.max_length": 128,
    "data.max_segments": 16,
    "train.batch_size": 4,
    "train.max_steps": 40,
    "train.learning_rate": 3e-3,
    "train.warmup_ratio": 0.1,
    "peft.method": "lora",
    "peft.r": 8,
    "eval.max_new_tokens": 16,
    "eval.num_samples": 4,
    "eval.temperature": 0.7,
    "log.tensorboard": False,
    "checkpoint.save_total_limit": 1,
}


def rows(path: Path, count: int, answer=None, *, words=NEW, turns=1, seed=0) -> str:
    """Conversations about `words`. `answer(rng, question)` makes the answers; without it some words follow."""
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        for _ in range(count):
            messages = []
            for _ in range(turns):
                question = " ".join(rng.choice(words, rng.integers(3, 9)))
                said = answer(rng, question) if answer else " ".join(rng.choice(words, rng.integers(3, 9)))
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def make_base(folder: Path) -> Path:
    """A model that answers in the words of `tiny_run`, in ChatML; returns its folder."""
    tiny_run.model(folder / "random")
    fields = {
        "run_dir": str(folder / "learning_rate_unusual"),
        "model.path": str(folder / "random"),
        "data.train": [rows(folder / "old.jsonl", 400, words=tiny_run.WORDS)],
        "data.eval": [rows(folder / "old-eval.jsonl", 30, words=tiny_run.WORDS, seed=1)],
        "peft.method": "none",
        "train.max_steps": 200,
        "export.dtype": "float32",
    }
    train(folder, [fields])
    return folder / "learning_rate_unusual" / "export"


def train(folder: Path, runs: list[dict], **environment) -> dict[str, str]:
    """Trains them one after the other in another process, whose output is kept in a text file beside the first one's
    folder; returns what failed, and why."""
    (folder / "runs.json").write_text(json.dumps([{**COMMON, **fields} for fields in runs]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.many_runs", str(folder / "runs.json"), str(folder / "compiled")],
        cwd=tiny_run.ROOT,
        env={**tiny_run.environment(), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    Path(f"{runs[0]['run_dir']}.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def settings(folder: Path, base: Path) -> dict[str, dict]:
    """Fields of each run, by the rule that should be named first ("healthy_..." for none)."""

    def say(text, low=1, high=2):
        return lambda rng, question: " ".join([text] * int(rng.integers(low, high)))

    new = rows(folder / "new.jsonl", 300)
    new_eval = rows(folder / "new-eval.jsonl", 30, seed=1)
    old_eval = str(folder / "old-eval.jsonl")
    data = {"data.train": [new], "model.path": str(base), "export.enabled": False}
    full = {"peft.method": "none", "train.learning_rate": 5e-4}

    def of(name, answer, count=300, **options):
        return {"data.train": [rows(folder / f"{name}.jsonl", count, answer, **options)]}

    few = rows(folder / "few.jsonl", 12)
    with open(folder / "copies.jsonl", "w") as file:
        file.write(Path(few).read_text() * 10)
    with open(folder / "texts.jsonl", "w") as file:
        lines = Path(new).read_text().splitlines()
        rng = np.random.default_rng(0)
        tokens = [json.dumps({"input_ids": rng.integers(300, 400, 12).tolist()}) for _ in lines]  # end with no token
        file.write("\n".join([*lines[:60], *tokens[60:]]))
    mute = folder / "mute"
    shutil.copytree(base, mute)
    generation = json.loads((mute / "generation_config.json").read_text())
    (mute / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [0]}))

    evals = {"data.eval": [new_eval]}
    longer = {"train.max_steps": 120, "eval.eval_steps": 40}
    told = {"data.eval_fraction": 0.1, "eval.temperature": 0.0, "eval.max_new_tokens": 40}
    both = {"data.eval": [new_eval, old_eval]}

    def long(rng, question):
        return " ".join(rng.choice(NEW, rng.integers(60, 110)))

    def mixed(rng, question):
        return " ".join(rng.choice(NEW, 40 if rng.random() < 0.1 else 3))

    def spiky(rng, question):
        return "".join(map(chr, rng.integers(33, 400, 12))) if rng.random() < 0.06 else "a red cat"

    def refuse(rng, question):
        return "I'm sorry, but I can't help with " + " ".join(rng.choice(NEW, 3))

    def opening(rng, question):
        return "the old tree " + " ".join(rng.choice(NEW, 6))

    found = {
        "healthy_lora": {**evals, "eval.eval_steps": 20},
        "healthy_full": {**evals, **full},
        "healthy_two_sources": {**both, "peft.method": "dora", "data.train": [new, str(folder / "old.jsonl")]},
        "learning_rate_too_low": {"train.learning_rate": 0.0},
        "learning_rate_too_high": {**full, "train.learning_rate": 1.0},
        "steps_not_finite": {"data.train": [{"path": new, "loss_weight": 3e38}]},
        "template_mismatch": {"model.chat_template": "llama2"},
        "mask_leaves_little": {
            "data.train_on": "last",
            "data.max_length": 512,
            "train.batch_size": 1,
            **of("turns", None, 40, turns=14),
        },
        "dead_adapters": {"peft.loraplus_lr_ratio": 0.0},
        "loss_not_falling": {"data.train": [str(folder / "old.jsonl")], "train.learning_rate": 1e-4},
        "length_too_short": of("long", long),
        "stop_token_untrained": {"data.train": [str(folder / "texts.jsonl")]},
        "stop_token_missing": {"model.path": str(mute)},
        "duplicates": {**evals, "data.train": [str(folder / "copies.jsonl")], **longer},
        "validation_rising": {**evals, "data.train": [few], **longer},
        "forgetting": both,
        "full_for_a_small_change": {**full, **both},
        "adapter_too_small": {"peft.r": 1, "peft.target_modules": ["q_proj"], "peft.layers_to_transform": [0]},
        "empty_answers": {**told, **of("empty", say("\u200b"))},
        "garbled_answers": {**told, **of("garbled", say("[INST] \ufffd\ufffd"))},
        "refusals": {**told, **longer, **of("refusals", refuse)},
        "loops": {**told, **of("loops", say("red cat", 7, 9))},
        "style_collapse": {**told, **of("style", opening)},
        "endless_answers": {
            **evals,
            "model.path": str(folder / "random"),
            "eval.max_new_tokens": 48,
            "train.learning_rate": 1e-3,
        },
        "gradient_spikes": {**of("spiky", spiky), "train.batch_size": 1, "train.max_steps": 90},
        "padding_waste": {**of("mixed", mixed), "data.packing": "none", "data.static_lengths": 1},
        "data_bound": {"slow_rows": 0.3},
        "slow_device": {
            "train.max_steps": 100_000_000,
            "train.warmup_ratio": 0.0,
            "train.lr_scheduler_type": "constant",
            "stop_after": 30,
        },
    }
    return {name: {**data, "run_dir": str(folder / name), **fields} for name, fields in found.items()}
