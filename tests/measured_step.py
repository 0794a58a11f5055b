"""Runs a planned step on this machine and prints its predicted and measured peak: `python -m tests.measured_step LORA`.

A process of its own, because memory that anything else freed before would be used again unseen.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from sftjax import config as config_lib
from sftjax import plan, topology

MODEL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def resident(field: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most since `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        config = config_lib.defaults()
        config.model.path = folder
        config.data.train = ("unread.jsonl",)
        config.data.max_length = 1024
        config.train.batch_size = 4
        config.peft.method = method
        step = plan.settle(config, topology.find("cpu"))
    executable = plan.compile_step(step)
    predicted = plan.read(step, executable)["bytes"]["peak"]
    forget_peak()
    before = resident("VmRSS")
    values = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), step.arguments)
    jax.block_until_ready(executable(*values))
    print(json.dumps({"predicted": predicted, "measured": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1])
