"""A tiny chat model and conversations on disk, and the main program run on them as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sftjax.data import tokenizer as tokenizers
from sftjax.models import decoder
from sftjax.models.config import LayerSpec, ModelConfig, Rope
from sftjax.weights import export
from tests.data import tiny

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the a red blue small cat dog sees likes finds old new tree house river and then of with under".split()  # noqa: SIM905


def model(folder: Path, **changes) -> Path:
    """A Llama of two layers with a ChatML tokenizer, as an HF folder."""
    source = tiny.byte_level(folder.with_name(folder.name + "-tokenizer"))
    tokenizer = tokenizers.load(source)
    config = ModelConfig(
        **{
            "vocab_size": -(-tokenizer.vocab_size // 16) * 16,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "layers": (LayerSpec(rope=Rope(10000.0, 16)),) * 2,
            "max_position": 4096,
            "norm_eps": 1e-5,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    params = decoder.init_params(jax.random.key(0), config, jnp.float32)
    params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, params)
    beside = dict(tokenizer=tokenizer.files(), stop_ids=tokenizer.stop_ids)
    export.export_model(folder, config, params, dtype=jnp.float32, **beside)
    return folder


def conversations(path: Path, count: int = 60, seed: int = 0) -> Path:
    """JSONL with `messages`: one to three exchanges of made-up sentences; the answer repeats the question's end."""
    rng = np.random.default_rng(seed)

    def sentence(low, high):
        return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))

    with open(path, "w") as file:
        for _ in range(count):
            messages = []
            for _ in range(int(rng.integers(1, 4))):
                question = sentence(3, 12)
                messages.append({"role": "user", "content": question})
                messages.append(
                    {"role": "assistant", "content": " ".join(question.split()[-2:]) + " " + sentence(1, 9)}
                )
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def environment(devices: int = 1) -> dict[str, str]:
    # As in conftest.py: on a loaded machine the simulated devices wait for each other for more than 40 s.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}


def command(model_path, data_path, run_dir, **fields) -> list[str]:
    """The command line of a small run; fields are given as train__learning_rate=1e-3."""
    settings = {
        "model.path": model_path,
        "model.compute_dtype": "float32",
        "data.train": f"('{data_path}',)",
        "data.max_length": 128,
        "data.max_segments": 8,
        "data.eval_fraction": 0.1,
        "train.batch_size": 4,
        "train.learning_rate": 3e-3,
        "eval.max_new_tokens": 8,
        "eval.num_samples": 2,
        "run_dir": run_dir,
        **{name.replace("__", "."): value for name, value in fields.items()},
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "sftjax.main", "--config=configs/smollm2_135m.py", *flags]


def run(arguments: list[str], *, devices: int = 1, code: int = 0, timeout: float = 300) -> subprocess.CompletedProcess:
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
