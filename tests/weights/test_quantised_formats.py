"""Checkpoints in fp8 and in bitsandbytes' forms: read as what they were made to mean, NF4 taken as it is."""

import hashlib
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax import tree
from sftjax.errors import ConfigError
from sftjax.kernels import nf4
from sftjax.models import decoder
from sftjax.weights import hf, quantised

BNB = Path(__file__).parents[1] / "golden" / "bnb4"


@pytest.mark.parametrize("kind", ["nf4_double", "nf4", "fp4"])
def test_four_bits_are_what_bitsandbytes_makes_of_them(kind):
    source, table = hf.open_source(hf.open_model(BNB / kind))
    digests = json.loads((BNB / kind / "dequantised.json").read_text())
    assert set(digests) == set(source.stored) and len(digests) == 7
    for tensor in table:
        if tensor.name in digests:
            values = np.empty(tensor.shape, np.float32)
            source.read(tensor.name, (), values)
            assert hashlib.sha256(values.astype(ml_dtypes.bfloat16).tobytes()).hexdigest() == digests[tensor.name]
            part = np.empty((3, 7), np.float32)
            source.read(tensor.name, (slice(5, 8), slice(11, 18)), part)
            np.testing.assert_array_equal(part, values[5:8, 11:18])
    assert hf.stored_dtypes(hf.open_model(BNB / kind)) == "bfloat16"


@pytest.mark.parametrize("kind", ["nf4_double", "nf4"])
def test_nf4_is_taken_bit_for_bit(kind):
    files, stored = hf.open_model(BNB / kind), load_file(BNB / kind / "model.safetensors")
    transform = nf4.make_transform("nf4", nf4.is_projection)
    kept, quant = hf.load_params(files, files.config, jnp.float32, None, transform, keep_nf4=True)
    flat = tree.flatten(quant)
    name = "model.layers.0.mlp.up_proj.weight"
    up = {leaf: np.asarray(flat[f"layers_0/0/mlp/up_proj/{leaf}"][0]) for leaf in ("codes", "absmax")}
    np.testing.assert_array_equal(up["codes"].reshape(-1), stored[name].reshape(-1))
    np.testing.assert_array_equal(up["absmax"].reshape(-1), stored[f"{name}.absmax"])
    if kind == "nf4_double":
        coarse = flat["layers_0/0/mlp/up_proj/absmax_scale"][0]
        np.testing.assert_array_equal(coarse, stored[f"{name}.nested_absmax"])
    plain = tree.flatten(hf.load_params(files, files.config, jnp.float32))
    whole = {leaf: flat[f"layers_0/0/mlp/up_proj/{leaf}"] for leaf in ("codes", "absmax")}
    whole |= {
        leaf: flat[path]
        for leaf in ("absmax_scale", "absmax_offset")
        if (path := f"layers_0/0/mlp/up_proj/{leaf}") in flat
    }
    values = nf4.dequantise(whole, jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(values, plain["layers_0/0/mlp/up_proj/weight"])
    expected = decoder.abstract_params(files.config, jnp.float32)
    given = hf.given_nf4(files)
    for found, abstract in zip(
        (kept, quant), nf4.abstract_split(expected, "nf4", nf4.is_projection, given), strict=True
    ):
        shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(abstract).items()}
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(found).items()} == shapes


def test_a_layer_that_was_left_as_it_was_stays_so(tmp_path):
    raw = json.loads((BNB / "nf4" / "config.json").read_text())
    stored = load_file(BNB / "nf4" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {key: value for key, value in stored.items() if not key.startswith(name)}
    tensors[name] = np.random.default_rng(0).normal(size=(320, 64)).astype(ml_dtypes.bfloat16)
    files = hf.open_model(tiny.write_model(tmp_path, raw, tensors))
    assert hf.given_nf4(files)["layers_0/0/mlp/up_proj/weight"] == "kept"
    twice = {key: value for key, value in tensors.items() if "layers" not in key}
    for number, layer in enumerate((stored, tensors)):
        twice |= {key.replace(".0.", f".{number}."): value for key, value in layer.items() if "layers" in key}
    files = hf.open_model(tiny.write_model(tmp_path / "two", raw | {"num_hidden_layers": 2}, twice))
    assert hf.given_nf4(files)["layers_0/0/mlp/up_proj/weight"] == "kept"
    transform = nf4.make_transform("nf4", nf4.is_projection)
    kept, _ = hf.load_params(files, files.config, jnp.float32, None, transform, keep_nf4=True)
    up = tree.flatten(kept)["layers_0/0/mlp/up_proj/weight"]
    np.testing.assert_array_equal(up[1], tensors[name].astype(np.float32))


def fp8(weight, block, scale_dtype=np.float32):
    """(codes, scales) in blocks; scales alone where `block` is None."""
    rows, columns = weight.shape
    sizes = block or weight.shape
    grid = tuple(-(-size // each) for size, each in zip(weight.shape, sizes, strict=True))
    scales = np.random.default_rng(1).uniform(0.5, 2.0, grid).astype(scale_dtype)
    spread = np.repeat(np.repeat(scales.astype(np.float32), sizes[0], 0), sizes[1], 1)[:rows, :columns]
    codes = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales if block else scales.reshape(()), codes.astype(np.float32) * spread


@pytest.mark.parametrize(
    ("block", "scale_dtype"),
    [((128, 128), np.float32), ((16, 16), ml_dtypes.bfloat16), ((20, 24), np.float32), (None, np.float32)],
)
def test_fp8_is_codes_times_scales(tmp_path, block, scale_dtype):
    raw = tiny.config_dict("qwen3")
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    raw["quantization_config"] = settings
    tensors, expected = tiny.random_tensors(raw), {}
    for name in [name for name in tensors if "_proj." in name]:
        codes, scales, expected[name] = fp8(tensors[name].astype(np.float32), block, scale_dtype)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        if block is None:
            tensors[f"{name.removesuffix('weight')}activation_scale"] = np.float32(0.1)
    files = hf.open_model(tiny.write_model(tmp_path, raw, tensors))
    source, _ = hf.open_source(files)
    assert set(source.stored) == set(expected)
    for name, values in expected.items():
        found = np.empty(values.shape, np.float32)
        source.read(name, (), found)
        np.testing.assert_array_equal(found, values)
        part = np.empty((9, 5), np.float32)
        source.read(name, (slice(14, 23), slice(15, 20)), part)
        np.testing.assert_array_equal(part, values[14:23, 15:20])
        row = np.empty(values.shape[1], np.float32)
        source.read(name, (3,), row)
        np.testing.assert_array_equal(row, values[3])
    hf.fingerprint(files)
    loaded = tree.flatten(hf.load_params(files, files.config, "float32"))
    np.testing.assert_array_equal(
        loaded["layers_0/0/mlp/up_proj/weight"][1], expected["model.layers.1.mlp.up_proj.weight"]
    )


def test_int8_of_bitsandbytes():
    codes = np.random.default_rng(0).integers(-127, 128, (6, 8)).astype(np.int8)
    largest = np.arange(1, 7, dtype=np.float32)

    class Source:
        where, tensors = "here", {"a.weight": codes, "a.SCB": largest, "a.weight_format": np.zeros((), np.uint8)}

        def shapes(self):
            return {name: (tensor.shape, tensor.dtype.name) for name, tensor in self.tensors.items()}

        def read(self, name, index, out):
            out[...] = self.tensors[name][index]

    source = quantised.DequantisedSource(Source(), None)
    assert source.shapes() == {"a.weight": ((6, 8), "float16")}
    found = np.empty((2, 3), np.float32)
    source.read("a.weight", (slice(2, 4), slice(1, 4)), found)
    np.testing.assert_allclose(found, codes[2:4, 1:4] * largest[2:4, None] / 127, rtol=1e-6)


def test_a_form_that_is_not_read_is_refused_by_name(tmp_path):
    raw = tiny.config_dict("llama") | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    with pytest.raises(ConfigError, match=r"'awq'.*only fp8, bitsandbytes, mxfp4 are"):
        hf.open_model(tiny.write_model(tmp_path, raw, {}))


@pytest.mark.parity
def test_fp8_blocks_are_what_transformers_makes_of_them():
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales, ours = fp8(np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32), (16, 16))
    theirs = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn), torch.from_numpy(scales), torch.float32
    )
    np.testing.assert_array_equal(ours, theirs.numpy())
