"""The config files themselves: one run as it stands on a tiny model, all traced at full size without weights."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from sftjax import job, job_data
from sftjax.parallel import mesh as meshes
from sftjax.weights import families, hf
from tests import tiny_run
from tests.weights import tiny as tiny_weights

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA2_7B = {
    **LLAMA,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA3_8B = {
    **LLAMA,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA3_70B = {
    **LLAMA3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
MISTRAL_7B = {
    **LLAMA3_8B,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
CASES = {
    "llama7b": (LLAMA2_7B, 6_738_415_616, 6_738_415_616),
    "llama7b_lora": (LLAMA2_7B, 39_976_960, 6_738_415_616),
    "llama7b_8bit_full": (LLAMA2_7B, 6_738_415_616, 6_738_415_616),
    "llama3_8b_lora": (LLAMA3_8B, 41_943_040, 8_030_261_248),
    "llama3_8b_qlora": (LLAMA3_8B, 41_943_040, 8_030_261_248),
    "llama3_70b_qlora": (LLAMA3_70B, 207_093_760, 70_553_706_496),
    "mistral7b_dora": (MISTRAL_7B, 41_943_040 + 32 * 43_008, 7_241_732_096),  # and a magnitude for each output
}  # config file: (config.json of its model, trainable parameters, parameters of the base)


def get_config(name: str):
    scope = {}
    path = tiny_run.ROOT / "configs" / f"{name}.py"
    exec(compile(path.read_text(), str(path), "exec"), scope)  # what config_flags does with it
    return scope["get_config"]()


def full_size(name: str, devices: int):
    """The program of a config file for its own model, on paper; and the shapes of its batches."""
    config = get_config(name)
    mesh = meshes.make({axis: config.mesh[axis] for axis in meshes.AXES}, jax.devices()[:devices])
    model = families.read_config(CASES[name][0])
    spec = job.adapter_spec(config, model=model, grows=False)
    program, _ = job.build_program(config, model, spec, mesh, total_steps=100)
    options = job_data.batching_options(config, mesh)
    shape = (options["accumulation"], options["batch_size"], options["length"])
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
    return config, program, {**batch, "weights": jax.ShapeDtypeStruct(shape, jnp.float32)}


@pytest.mark.parametrize("name", CASES)
def test_the_step_traces_at_full_size_on_eight_devices(name):
    _, program, batch = full_size(name, 8)
    state, metrics = jax.eval_shape(program.train_step, program.abstract_state, program.abstract_frozen, batch)
    assert all(jax.tree.leaves(jax.tree.map(same_kind, state, program.abstract_state)))
    assert metrics["nll"].shape == ()


def same_kind(one, other) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_start_line_counts_parameters(name, capsys):
    config, program, _ = full_size(name, 1)
    _, trainable, base = CASES[name]
    job.announce(config, program, 100)
    assert f"trainable parameters: {trainable:,} beside {base:,} in the base" in capsys.readouterr().out


def test_four_bits_are_what_a_qlora_base_takes():
    _, program, _ = full_size("llama3_70b_qlora", 1)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_frozen))
    projections = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    rest = 70_553_706_496 - projections
    # half a byte, a byte for each 64, four for each 64 x 256; embedding, head and norms in bfloat16
    assert held == pytest.approx(projections * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 2 * rest, rel=1e-4)
    moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state.opt_state))
    assert moments < 2.3 * 207_093_760  # blocks of B are as short as its rank


@pytest.mark.parametrize("name", CASES)
def test_the_step_lowers_for_cuda(name):
    _, program, batch = full_size(name, 1)
    traced = program.train_step.trace(program.abstract_state, program.abstract_frozen, batch)
    lowered = traced.lower(lowering_platforms=("cuda",))
    arguments = jax.tree.leaves((program.abstract_state, program.abstract_frozen, batch))
    assert len(jax.tree.leaves(lowered.args_info)) == len(arguments)


# --- llama7b.py as it stands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama2(tmp_path_factory) -> Path:
    """A Llama-2 folder as Meta's is: `tokenizer.model`, untied head; of one layer, eight wide."""
    folder = tmp_path_factory.mktemp("llama2")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(tiny_run.WORDS)] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": size}
    raw = {**LLAMA2_7B, **tiny, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    raw |= {"bos_token_id": 1, "eos_token_id": 2}
    return tiny_weights.write_model(folder, raw, tiny_weights.random_tensors(raw))


def llama7b(model: Path, data: Path, run_dir: Path) -> list[str]:
    """The command of the README: only the model, the data and the run folder are put in."""
    put_in = {"model.path": model, "data.train": f"('{data}',)", "run_dir": run_dir}
    flags = [f"--config.{name}={value}" for name, value in put_in.items()]
    return [sys.executable, "-m", "sftjax.main", "--config=configs/llama7b.py", *flags]


def test_llama7b_runs_up_to_its_first_step(llama2, tmp_path):
    data = tiny_run.conversations(tmp_path / "chats.jsonl", 300)
    done = tiny_run.run([*llama7b(llama2, data, tmp_path / "run"), "--dry_run"], devices=8)
    assert "trained in 100.0% of conversations" in done.stdout and "'fsdp': 8" in done.stdout


@pytest.mark.nightly  # 2.1 M tokens a step, as the file says: two CPU minutes even for five thousand parameters
def test_llama7b_itself_trains_and_exports(llama2, tmp_path):
    data, run = tiny_run.conversations(tmp_path / "chats.jsonl", 300), tmp_path / "run"
    tiny_run.run(llama7b(llama2, data, run), devices=8, timeout=1200)
    (line,) = [line for line in tiny_run.lines(run / "metrics.jsonl") if "loss" in line]
    assert line["epoch"] == 3.0 and line["num_examples"] == 3 * 297
    read = hf.load_params(run / "export", hf.load_config(run / "export"), np.float32)
    base = hf.load_params(llama2, hf.load_config(llama2), np.float32)
    # the first of the warm-up's steps has learning rate 0
    jax.tree.map(np.testing.assert_array_equal, read, base)
    out = tmp_path / "scores.jsonl"
    score = [sys.executable, "tools/score.py", "--model", str(llama2), "--template", "llama2"]
    tiny_run.run([*score, "--data", str(data), "--out", str(out)])
    scored = tiny_run.lines(out)
    nll, trained = (sum(row[key] for row in scored) for key in ("nll", "num_trained_tokens"))
    assert line["loss"] == pytest.approx(nll / trained, rel=1e-2)  # bfloat16, and without the held-out rows
