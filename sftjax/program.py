"""From a model's record and settings to compiled steps with their shardings: used by training, planning, benchmarks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftjax import compat, tree
from sftjax import step as steps
from sftjax.errors import ConfigError
from sftjax.kernels import nf4
from sftjax.models.config import ModelConfig
from sftjax.models.decoder import Runtime
from sftjax.parallel import partition
from sftjax.peft import lora

BATCH_ARRAYS = ("tokens", "targets", "weights", "segment_ids", "positions")
SOURCE_IDS = "source_ids"  # beside them where the losses of several sources are told apart


@dataclasses.dataclass(frozen=True)
class Program:
    """A training job before any weights exist: what it would hold, where, and what it would run."""

    config: ModelConfig
    runtime: Runtime
    mesh: Mesh
    trainable_regex: str
    optimizer: optax.GradientTransformation
    abstract_state: steps.TrainState  # shapes, dtypes and shardings
    abstract_frozen: dict[str, Any]
    train_step: Any  # (state, frozen, batch [A, B, L]) -> (state, metrics); the state is donated
    eval_step: Any  # (trainable, frozen, batch [1, B, L]) -> sums by segment
    num_sources: int = 1  # whose losses are told apart in training

    def init_state(self, variables: dict[str, Any]) -> tuple[steps.TrainState, dict[str, Any]]:
        """Splits loaded variables into (fresh state, frozen leaves). The state takes the trainable arrays over."""
        trainable, frozen = tree.partition(variables, self.trainable_regex)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (self.abstract_state, self.abstract_frozen))
        state_shardings, frozen_shardings = shardings
        trainable = jax.device_put(trainable, state_shardings.trainable)
        opt_state = jax.jit(self.optimizer.init, out_shardings=state_shardings.opt_state)(trainable)
        step, nonfinite = (jax.device_put(np.int32(0), state_shardings.step) for _ in range(2))
        loss_scale = {}
        if self.abstract_state.loss_scale:
            first = {"scale": np.float32(steps.FIRST_LOSS_SCALE), "sound": np.int32(0)}
            loss_scale = jax.device_put(first, state_shardings.loss_scale)
        state = steps.TrainState(step, trainable, opt_state, nonfinite, loss_scale)
        return state, jax.device_put(frozen, frozen_shardings)

    @property
    def batch_arrays(self) -> tuple[str, ...]:
        """What a training batch consists of."""
        return BATCH_ARRAYS if self.num_sources == 1 else (*BATCH_ARRAYS, SOURCE_IDS)

    def put(self, batch: dict[str, np.ndarray], rows: Sequence[int], total_rows: int) -> steps.Batch:
        """Host arrays `[A, len(rows), L]` to global device arrays `[A, total_rows, L]`.

        Args:
          rows: which rows of the global batch the host arrays hold: at least those of `local_rows`.
        """
        sharding = partition.batch_sharding(self.mesh)
        place = {row: number for number, row in enumerate(rows)}

        def to_device(array: np.ndarray) -> jax.Array:
            def shard(index):
                chosen = [place[row] for row in range(total_rows)[index[1]]]
                return array[index[0], chosen, index[2]] if len(chosen) < len(rows) else array[index[0], :, index[2]]

            return jax.make_array_from_callback((array.shape[0], total_rows, array.shape[2]), sharding, shard)

        return {name: to_device(array) for name, array in batch.items() if name in self.batch_arrays}

    def local_rows(self, total_rows: int) -> tuple[int, ...]:
        """The rows of a global batch that this process's devices hold: decided by the mesh, not by process number."""
        sharding = partition.batch_sharding(self.mesh)
        indices = sharding.addressable_devices_indices_map((1, total_rows, 128)).values()
        return tuple(sorted({row for index in indices for row in range(total_rows)[index[1]]}))

    def count(self) -> dict[str, int]:
        """Numbers of parameters: "trainable", "adapter" and "base" (what the model has without the adapter)."""

        def size(part):
            counted = [
                leaf for path, leaf in tree.flatten(part).items() if path.rpartition("/")[2] not in lora.CONSTANTS
            ]
            return sum(leaf.size for leaf in counted)

        everything = tree.merge(self.abstract_state.trainable, self.abstract_frozen)
        return {
            "trainable": size(self.abstract_state.trainable),
            "adapter": size(everything.get("adapter", {})),
            "base": size(everything["params"]) + nf4.count_weights(everything.get("quant", {})),
        }


def build(
    config: ModelConfig,
    runtime: Runtime,
    mesh: Mesh,
    abstract_variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    *,
    trainable_regex: str,
    max_segments: int,
    seed: int,
    num_sources: int = 1,
    offload_optimizer: bool = False,
) -> Program:
    """Settles shapes and shardings; nothing is allocated and nothing compiled yet.

    Args:
      abstract_variables: collections of `ShapeDtypeStruct`s ("params", and "adapter" or "quant" where there are any).
      trainable_regex: over "<collection>/<path>".
      offload_optimizer: keep its state in the host's pinned memory between updates.

    Raises:
      ConfigError: a state that these devices can't offload.
    """
    shardings = partition.shardings(abstract_variables, mesh)
    abstract = jax.tree.map(_with_sharding, abstract_variables, shardings)
    trainable, frozen = tree.partition(abstract, trainable_regex)
    if not trainable:
        raise ValueError(f"no parameter matches the trainable regex {trainable_regex!r}")
    replicated = NamedSharding(mesh, PartitionSpec())
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    opt_shardings = partition.state_shardings(opt_state, trainable, mesh)
    opt_state = jax.tree.map(_with_sharding, opt_state, opt_shardings)
    if offload_optimizer:
        on_tpu = mesh.devices.flat[0].platform == "tpu"
        if on_tpu and any(leaf.dtype.itemsize == 1 for leaf in jax.tree.leaves(opt_state)):
            raise ConfigError(
                "train.offload_optimizer: the compiler for TPUs can't move moments of one byte between memories "
                "(libtpu 0.0.42): offload those of 32 bits, or leave it out"
            )
        opt_state = jax.tree.map(_in_host_memory, opt_state)
    loss_scale = {}
    if runtime.compute_dtype == "float16":
        loss_scale = {"scale": jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated), "sound": counter}
    state = steps.TrainState(counter, trainable, opt_state, counter, loss_scale)

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    static = {"config": config, "runtime": runtime}
    train_step = jax.jit(
        functools.partial(
            steps.train_step,
            **static,
            optimizer=optimizer,
            seed=seed,
            num_sources=num_sources,
            opt_shardings=opt_shardings if offload_optimizer else None,
        ),
        donate_argnums=0,
        out_shardings=(state_shardings, replicated),
    )
    eval_step = jax.jit(
        functools.partial(steps.eval_step, config=config, runtime=_deterministic(runtime), max_segments=max_segments),
        out_shardings=replicated,
    )
    return Program(config, runtime, mesh, trainable_regex, optimizer, state, frozen, train_step, eval_step, num_sources)


def _with_sharding(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _in_host_memory(leaf):
    return leaf if leaf.ndim == 0 else _with_sharding(leaf, leaf.sharding.with_memory_kind(compat.HOST_MEMORY))


def _deterministic(runtime: Runtime) -> Runtime:
    return dataclasses.replace(
        runtime,
        adapter_dropout=0.0,
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        neftune_alpha=0.0,
    )
