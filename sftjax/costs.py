"""What a training step costs by rule, before anything is compiled: arithmetic, bytes on each device, and floors.

Model FLOPs, the numerator of MFU: each trained matrix costs 6 a parameter and token, a frozen one 4 (it has no weight
gradient), an adapter's 6; causal attention 6 · layers · heads · head_dim · context. Embedding look-ups cost nothing.
Packed rows count what their segments attend to, sum(l²) / sum(l), not the row's length.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sftjax import compat, tree
from sftjax.hardware import Chip
from sftjax.kernels import cross_entropy
from sftjax.models.config import LayerSpec, ModelConfig
from sftjax.program import Program

# --- arithmetic ----------------------------------------------------------------------------------------------------


def layer_matmuls(config: ModelConfig, spec: LayerSpec) -> int:
    """Parameters of one layer that a token is multiplied with (of its experts, those it goes to)."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * config.hidden_size
    if spec.experts is None:
        return heads + 3 * config.hidden_size * config.intermediate_size
    experts = spec.experts
    width = experts.per_token * experts.intermediate_size + experts.shared_intermediate_size
    return heads + config.hidden_size * (3 * width + experts.count)


def matmul_params(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with: all layers and the head, without the embedding's look-up."""
    return sum(layer_matmuls(config, spec) for spec in config.layers) + config.vocab_size * config.hidden_size


def attention_flops(config: ModelConfig, context: float) -> float:
    """Of attention proper, forward and backward, per token.

    Args:
      context: sum(l²) / sum(l) over the segments; a causal query sees half of it, a sliding window cuts that.
    """
    total = 0.0
    for spec in config.layers:
        seen = context / 2
        if spec.window is not None and spec.window < context:
            seen = spec.window * (1 - spec.window / (2 * context))
        total += 12 * seen * config.num_heads * config.head_dim
    return total


def model_flops(program: Program, context: float) -> float:
    """Per token of a training step, by the rule above."""
    config = program.config
    matmuls = matmul_params(config)
    trained = tree.flatten(program.abstract_state.trainable)
    base = sum(_matmul_size(config, path, leaf) for path, leaf in trained.items() if not path.startswith("adapter/"))
    adapter = sum(_matmul_size(config, path, leaf) for path, leaf in trained.items() if path.startswith("adapter/"))
    return 4 * matmuls + 2 * base + 6 * adapter + attention_flops(config, context)


def recomputed_flops(program: Program, context: float) -> float:
    """Per token, what the remat policy computes a second time."""
    config, remat = program.config, program.runtime.remat
    blocks = 2 * sum(layer_matmuls(config, spec) for spec in config.layers)
    attention = attention_flops(config, context) / 3
    return {"none": 0.0, "dots": attention, "attention": blocks, "full": blocks + attention}[remat]


def _matmul_size(config: ModelConfig, path: str, leaf: Any) -> float:
    """Parameters of a leaf that a token is multiplied with."""
    if path.endswith(("norm/weight", "bias", "magnitude", "sinks")):
        return 0.0
    if "embed_tokens" in path and not config.tie_word_embeddings:
        return 0.0
    used = config.experts.per_token / config.experts.count if "/experts/" in path else 1.0
    return leaf.size * used


# --- memory --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. What is held between steps is exact, the rest is an estimate."""

    trained: int  # parameters being trained, an adapter included
    optimizer: int  # its state, unless that waits in the host's memory
    offloaded: int  # that which does: it is here for the update only, when activations are gone
    frozen: int  # base weights or their codes
    gradients: int
    saved: int  # activations kept for the backward pass
    layer: int  # one layer at work: gathered weights, recomputed activations
    head: int  # a chunk of logits and their gradient, the head as it is used and its gradient

    @property
    def held(self) -> int:
        return self.trained + self.optimizer + self.frozen

    @property
    def peak(self) -> int:
        """The backward pass holds either a layer or the head at work, not both."""
        return self.held + self.gradients + max(self.saved + max(self.layer, self.head), self.offloaded)


def memory(program: Program, platform: str, *, rows: int, length: int, accumulation: int) -> Memory:
    """What a device holds.

    Args:
      platform: that it runs on: "tpu", "gpu" or "cpu".
      rows: sequences of a micro-batch, over all devices.
      length: tokens in a sequence.
    """
    config, mesh, state = program.config, program.mesh, program.abstract_state
    wide = jnp.dtype(program.runtime.compute_dtype).itemsize
    tensor = mesh.shape["tensor"]
    tokens = rows * length // math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "context"))
    gradients = local_bytes(state.trainable)
    offloaded = local_bytes(
        [x for x in jax.tree.leaves(state.opt_state) if x.sharding.memory_kind == compat.HOST_MEMORY]
    )
    kept, inside = _activations(config, program.runtime.remat, wide, tensor)
    trains_head = any("lm_head" in path or "embed_tokens" in path for path in tree.flatten(state.trainable))
    head = config.vocab_size * config.hidden_size // tensor
    head_copy = head * wide if mesh.shape["fsdp"] > 1 or trains_head else 0
    logits = 4 * tokens * config.vocab_size // tensor
    at_once = cross_entropy.LOGITS_BYTES.get(platform, cross_entropy.LOGITS_BYTES_ELSEWHERE)
    return Memory(
        trained=gradients,
        optimizer=local_bytes(state.opt_state) - offloaded,
        offloaded=offloaded,
        frozen=local_bytes(program.abstract_frozen),
        gradients=gradients * (2 if accumulation > 1 else 1),
        saved=tokens * kept,
        layer=_weights_at_work(program) + tokens * inside,
        head=min(logits, at_once) * 3 // 2 + head_copy + (4 * head if trains_head else 0),
    )


def local_bytes(leaves: Any) -> int:
    """Bytes of abstract arrays on each device, as their shardings cut them."""

    def size(leaf) -> int:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(map(size, jax.tree.leaves(leaves)))


def _weights_at_work(program: Program) -> int:
    """Bytes of weights beside those that are held: two gathered layers, one in use and the next on its way; and of
    weights that are stored in another type than they are used in, the largest one of a layer (codes become float32
    on their way)."""
    config, mesh = program.config, program.mesh
    wide = jnp.dtype(program.runtime.compute_dtype)
    variables = tree.flatten(tree.merge(program.abstract_state.trainable, program.abstract_frozen))
    layers = {path: leaf for path, leaf in variables.items() if "/layers_" in path and not path.startswith("adapter/")}
    largest = config.hidden_size * config.intermediate_size if config.experts is None else 0
    if config.experts is not None:
        largest = config.experts.count * config.hidden_size * config.experts.intermediate_size
    gathered = sum(leaf.size * min(wide.itemsize, np.dtype(leaf.dtype).itemsize) for leaf in layers.values())
    copied = wide.itemsize * any(leaf.dtype != wide for leaf in layers.values())
    copied += 4 * any(path.endswith("/codes") for path in layers)
    both = (2 * gathered // config.num_layers if mesh.shape["fsdp"] > 1 else 0) + copied * largest
    return both // mesh.shape["tensor"]


def _activations(config: ModelConfig, remat: str, wide: int, tensor: int) -> tuple[int, int]:
    """Bytes per token: (kept in all layers for the backward pass, of one layer at work)."""
    model = config.hidden_size
    heads = config.num_heads * config.head_dim // tensor
    keys = config.num_kv_heads * config.head_dim // tensor
    inner = config.intermediate_size // tensor
    if config.experts is not None:
        experts = config.experts
        inner = (experts.per_token * experts.intermediate_size + experts.shared_intermediate_size) // tensor
    products = heads + 2 * keys + 2 * inner + 2 * model
    kept = {
        "full": 0,
        "attention": heads + config.num_heads * 4 // (wide * tensor),
        "dots": products,
        "none": products + 2 * heads + 2 * keys + inner + 4 * model,
    }[remat]
    at_work = 2 * (products + heads + inner + 3 * model)  # values and their gradients
    return config.num_layers * (model + kept) * wide, at_work * wide


def network_bytes(program: Program, *, rows: int, length: int, accumulation: int) -> float:
    """Bytes that each device receives in an optimizer step, by rule; a compiled program's own figure is better.

    Weights cut by fsdp are gathered in the forward and in the backward pass of each micro-batch; gradients of weights
    are reduced in float32 once in each; with tensor parallelism activations are summed four times a layer.
    """
    config, mesh = program.config, program.mesh
    wide = jnp.dtype(program.runtime.compute_dtype).itemsize
    fsdp, tensor, batch = mesh.shape["fsdp"], mesh.shape["tensor"], mesh.shape["data"] * mesh.shape["fsdp"]
    trained, frozen = program.abstract_state.trainable, program.abstract_frozen
    gathered = sum(
        leaf.size * min(wide, np.dtype(leaf.dtype).itemsize)
        for leaf in jax.tree.leaves((trained, frozen))
        if "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec))
    )
    reduced = sum(leaf.size * 4 for leaf in jax.tree.leaves(trained))
    # cut by fsdp each device needs its part of the sum; over data it needs that part whole
    sums = (fsdp - 1) / fsdp + 2 * (mesh.shape["data"] - 1) / mesh.shape["data"] / fsdp
    weights = (2 * gathered * (fsdp - 1) / fsdp + reduced * sums) / tensor
    activations = 4 * config.num_layers * rows * length / batch * config.hidden_size * wide * 2 * (tensor - 1) / tensor
    return accumulation * (weights + activations)


# --- time ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds that a step can't go below, each limit by itself. Nothing here was measured."""

    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        """As if everything overlapped perfectly."""
        return max(self.compute, self.memory, self.network)

    @property
    def guess(self) -> float:
        """Half-way to no overlap at all: tells ways to run a step apart whose floors are the same."""
        return (self.step + self.compute + self.memory + self.network) / 2

    @property
    def limit(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def floor(
    program: Program,
    chip: Chip,
    *,
    rows: int,
    length: int,
    accumulation: int,
    context: float,
    network_bytes: float,
) -> Floor:
    """The roofline of one optimizer step on a chip.

    compute   model FLOPs and what is recomputed, at the chip's peak
    memory    each micro-batch reads the weights in its forward pass, its recomputation and its backward pass, in the
              type they are stored in or the compute type, whichever is smaller; the update reads and writes the state
    network   the bytes given, at the chip's links' full rate

    Args:
      network_bytes: that each device receives in a step.
    """
    devices = program.mesh.size
    flops = model_flops(program, context) + recomputed_flops(program, context)
    tokens = rows * length * accumulation
    passes = 2 if program.runtime.remat in ("none", "dots") else 3
    wide = jnp.dtype(program.runtime.compute_dtype).itemsize
    weights = tree.merge(program.abstract_state.trainable, program.abstract_frozen)
    read = sum(leaf.size * min(wide, np.dtype(leaf.dtype).itemsize) for leaf in jax.tree.leaves(weights))
    held = local_bytes((program.abstract_state.trainable, program.abstract_state.opt_state))
    moved = accumulation * passes * read / program.mesh.shape["tensor"] + 2 * held
    return Floor(
        compute=flops * tokens / devices / chip.flops,
        memory=moved / chip.memory_rate,
        network=network_bytes / chip.link_rate,
    )
