import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from sftjax import tree
from sftjax.models import decoder
from sftjax.weights import families, rules
from sftjax.weights.load import compose

LAYOUTS = [(name, None) for name in tiny.FAMILIES] + [
    ("mixtral", "fused_experts"), ("qwen3_moe", "fused_experts"), ("gpt_oss", "mxfp4"),
]  # fmt: skip


def table_of(name, layout):
    raw = tiny.config_dict(name)
    config = families.read_config(raw)
    return config, rules.tensors(config, layout or families.FAMILIES[raw["model_type"]].layout)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_number_of_every_parameter_has_one_place(name, layout):
    """Numbering all elements of all tensors and importing them gives every number once, and every leaf is full."""
    config, table = table_of(name, layout)
    leaves = {path: np.full(shape, -1) for path, shape in rules.leaf_shapes(config).items()}
    first = 0
    for tensor in table:
        numbers = first + np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
        first += numbers.size
        for part in tensor.parts:
            piece = numbers[part.select]
            leaves[part.path][part.index] = piece.T if part.transpose else piece
    found = np.concatenate([leaf.reshape(-1) for leaf in leaves.values()])
    assert np.array_equal(np.sort(found), np.arange(first))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_tree_is_the_decoder_s(name):
    config, _ = table_of(name, None)
    theirs = {path: leaf.shape for path, leaf in tree.flatten(decoder.abstract_params(config, "float32")).items()}
    assert rules.leaf_shapes(config) == theirs


def test_gpt_oss_experts_are_interleaved_and_transposed():
    """[E, D, 2 F]: columns g0 u0 g1 u1 ... become the rows of gate and of up."""
    _, table = table_of("gpt_oss", None)
    tensor = next(t for t in table if t.name == "model.layers.1.mlp.experts.gate_up_proj")
    assert tensor.shape == (4, 32, 96)
    numbers = np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
    gate, up = [part for part in tensor.parts if part.index[-1] == 2]
    assert (gate.path.split("/")[-2], up.path.split("/")[-2]) == ("gate_proj", "up_proj")
    assert np.array_equal(numbers[gate.select].T, numbers[2, :, 0::2].T)
    assert np.array_equal(numbers[up.select].T, numbers[2, :, 1::2].T)


def test_phi_fuses_rows():
    """qkv_proj: rows 0:32 are q, 32:48 k, 48:64 v."""
    _, table = table_of("phi3", None)
    tensor = next(t for t in table if t.name == "model.layers.0.self_attn.qkv_proj.weight")
    assert [part.select for part in tensor.parts] == [(slice(0, 32),), (slice(32, 48),), (slice(48, 64),)]


@pytest.mark.parametrize("transpose", [False, True])
def test_compose_is_indexing_twice(transpose):
    whole = np.arange(3 * 8 * 10).reshape(3, 8, 10)
    part = rules.Part("x", (), (), (1, slice(None), slice(1, None, 2)), transpose)
    piece = whole[part.select].T if transpose else whole[part.select]
    spans = [range(1, 4), range(2, 5)]
    expected = piece[1:4, 2:5]
    found = whole[compose(part, whole.shape, spans)]
    assert np.array_equal(found.T if transpose else found, expected)
