import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
import tiny

from sftjax import convert, tree
from sftjax.errors import ConfigError
from sftjax.peft import lora, merge
from sftjax.peft.spec import AdapterSpec
from sftjax.weights import hf, peft_format

ROOT = Path(__file__).parents[2]


def make(folder):
    raw = tiny.config_dict("llama", attention_bias=False, mlp_bias=False)
    return hf.open_model(tiny.write_model(folder, raw, tiny.random_tensors(raw)))


def same(folder, params, dtype="bfloat16"):
    model = hf.open_model(folder)
    loaded = tree.flatten(hf.load_params(model, model.config, "float32"))
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(loaded[path], np.asarray(leaf).astype(np.dtype(dtype)).astype(np.float32))


def test_command_line(tmp_path):
    model = make(tmp_path / "in")
    tool = [sys.executable, str(ROOT / "tools" / "convert.py")]
    done = subprocess.run(
        [*tool, "--from", model.path, "--to", str(tmp_path / "out"), "--dtype", "float32"], check=True
    )
    assert done.returncode == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    failed = subprocess.run([*tool, "--from", "/nowhere", "--to", "x"], capture_output=True, text=True)
    assert failed.returncode == 78 and "Traceback" not in failed.stderr and "/nowhere" in failed.stderr


def test_keeps_the_source_s_dtype(tmp_path):
    model = make(tmp_path / "in")
    convert.convert(model.path, str(tmp_path / "out"))
    assert hf.stored_dtypes(hf.open_model(tmp_path / "out")) == "bfloat16"
    same(tmp_path / "out", hf.load_params(model, model.config, "float32"))


def test_merges_an_adapter_in_float32(tmp_path):
    model = make(tmp_path / "in")
    params = hf.load_params(model, model.config, "float32")
    spec = AdapterSpec(method="lora", rank=4, alpha=8.0)
    adapter = lora.init(jax.random.key(0), params, spec)
    adapter = tree.map_paths(lambda path, leaf: leaf + 0.1 if path.endswith("lora_B") else leaf, adapter)
    peft_format.save_adapter(tmp_path / "adapter", adapter, spec, model.config, layout="plain")
    convert.convert(model.path, str(tmp_path / "out"), adapter=str(tmp_path / "adapter"), dtype="bfloat16")
    same(tmp_path / "out", merge.merge(params, adapter, dtype=jnp.float32))


def test_a_run_isn_t_given_another_adapter(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter"):
        convert.convert(str(tmp_path), str(tmp_path / "out"), adapter="x")


def test_q8_0_is_for_gguf_only(tmp_path):
    model = make(tmp_path / "in")
    with pytest.raises(ConfigError, match="gguf"):
        convert.convert(model.path, str(tmp_path / "out"), dtype="q8_0")
    with pytest.raises(ConfigError, match="float32"):
        convert.convert(model.path, str(tmp_path / "out.gguf"), dtype="float32")
