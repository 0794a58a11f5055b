"""One optimizer step and one evaluation step, as pure functions of arrays.

Full tuning, LoRA and every other method are the same step: the optimizer sees the `trainable` leaves and nothing
else. A batch holds `[A, B, L]` arrays (DESIGN: A micro-batches of B rows of L tokens); the loss of a step is

    sum(weight * nll) / sum(weight)      over all micro-batches and devices,

with the denominator taken before the first micro-batch, so that accumulation changes memory and nothing else.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sftjax import optim, tree
from sftjax.models import decoder
from sftjax.models.config import ModelConfig

Batch = dict[str, jax.Array]
FIRST_LOSS_SCALE, LARGEST_LOSS_SCALE = 2.0**15, 2.0**24
LOSS_SCALE_STEPS = 2000  # without overflow, before it is doubled


class TrainState(flax.struct.PyTreeNode):
    """What training changes, and all of it."""

    step: jax.Array  # i32, optimizer steps taken or skipped
    trainable: dict[str, Any]
    opt_state: Any
    nonfinite: jax.Array  # i32, steps skipped in a row
    # float16 only: "scale" f32, by which the loss is multiplied so that small gradients don't vanish on their way back
    # (arXiv:1710.03740), and "sound" i32, steps since it last changed
    loss_scale: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


def loss_and_gradients(
    trainable,
    frozen,
    batch: Batch,
    rng,
    *,
    config: ModelConfig,
    runtime: decoder.Runtime,
    num_sources: int = 1,
    loss_scale: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], Any]:
    """Sums over the micro-batches, and the gradient of the step's loss.

    Args:
      loss_scale: the loss is multiplied by it before it is differentiated, and the gradient divided by it after.

    Returns:
      (sums, gradients): `sums` has scalars "nll" (weighted), "weight", "trained" and "correct" (tokens with weight
      above 0), and "moe_loss" (weighted, mean over micro-batches; 0 without experts). With several sources also
      "nll_by_source" and "weight_by_source", `[num_sources]`.
    """
    weight = jnp.sum(batch["weights"], dtype=jnp.float32)
    scale = 1.0 / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
    micro_batches = batch["tokens"].shape[0]

    def micro_loss(trainable, micro, rng):
        variables = tree.merge(trainable, frozen)
        hidden, aux = decoder.hidden_states(
            config,
            runtime,
            variables,
            micro["tokens"],
            micro["positions"],
            micro["segment_ids"],
            dropout_rng=rng,
            weights=micro["weights"],
        )
        nll, token = decoder.token_loss(
            config,
            runtime,
            variables,
            hidden,
            micro["targets"],
            micro["weights"],
            dropout_rng=None if rng is None else jax.random.fold_in(rng, 1),
        )
        trained = micro["weights"] > 0
        moe_loss = jnp.zeros((), jnp.float32)
        if config.experts is not None:
            moe_loss = config.experts.aux_loss_weight * aux["moe_loss"] / micro_batches
        sums = {
            "nll": nll,
            "trained": jnp.sum(trained),
            "correct": jnp.sum(token["correct"] & trained),
            "moe_loss": moe_loss,
        }
        if num_sources > 1:
            each = {"nll_by_source": jnp.where(trained, token["nll"], 0.0), "weight_by_source": 1.0}
            sums |= {
                name: jax.ops.segment_sum(
                    (value * micro["weights"]).ravel(), micro["source_ids"].ravel(), num_segments=num_sources
                )
                for name, value in each.items()
            }
        loss = nll * scale + moe_loss
        return loss if loss_scale is None else loss * loss_scale, sums

    gradient = jax.grad(micro_loss, has_aux=True)
    if micro_batches == 1:
        gradients, sums = gradient(trainable, jax.tree.map(lambda x: x[0], batch), rng)
    else:

        def accumulate(carry, inputs):
            index, micro = inputs
            new = gradient(trainable, micro, None if rng is None else jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, carry, new), None

        shapes = jax.eval_shape(gradient, trainable, jax.tree.map(lambda x: x[0], batch), rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, sums), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(micro_batches), batch))
    if loss_scale is not None:
        gradients = jax.tree.map(lambda gradient: gradient / loss_scale.astype(gradient.dtype), gradients)
    return {**sums, "weight": weight}, gradients


def train_step(
    state: TrainState,
    frozen,
    batch: Batch,
    *,
    config: ModelConfig,
    runtime: decoder.Runtime,
    optimizer: optax.GradientTransformation,
    seed: int,
    num_sources: int = 1,
    opt_shardings: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. A step whose loss or gradient isn't finite leaves parameters and optimizer as they were.

    Randomness (dropout, noise, the rounding of bfloat16 parameters) depends on the seed and the step's number alone, so
    that a run which is continued draws what it would have drawn.

    Args:
      opt_shardings: where the optimizer's state is worked on, if that isn't where it lies.

    Returns:
      (state, metrics): the sums of `loss_and_gradients`, and the scalars "grad_norm" and "finite"; with a loss scale
      also "loss_scale", and "overflow": the gradient alone isn't finite, and a smaller scale may help.
    """
    dropout_rng, rounding_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    sums, gradients = loss_and_gradients(
        state.trainable,
        frozen,
        batch,
        dropout_rng if runtime.is_stochastic else None,
        config=config,
        runtime=runtime,
        num_sources=num_sources,
        loss_scale=state.loss_scale.get("scale"),
    )
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(sums["nll"]) & jnp.isfinite(grad_norm)
    # A step without a single trained token changes nothing either: weight decay alone isn't training.
    apply = finite & (sums["weight"] > 0)
    before = state.opt_state if opt_shardings is None else jax.device_put(state.opt_state, opt_shardings)
    updates, opt_state = optimizer.update(gradients, before, state.trainable)
    trainable = optim.apply_updates(state.trainable, updates, rounding_rng=rounding_rng)

    def choose(new, old):
        return jnp.where(apply, new, old)

    metrics = {**sums, "grad_norm": grad_norm, "finite": finite}
    overflow = jnp.zeros((), jnp.bool_)
    if state.loss_scale:
        overflow = ~finite & jnp.isfinite(sums["nll"]) & (state.loss_scale["scale"] > 1)
        metrics |= {"loss_scale": state.loss_scale["scale"], "overflow": overflow}
    new_state = TrainState(
        step=state.step + 1,
        trainable=jax.tree.map(choose, trainable, state.trainable),
        opt_state=jax.tree.map(choose, opt_state, before),
        nonfinite=jnp.where(finite, 0, state.nonfinite + jnp.where(overflow, 0, 1)),
        loss_scale=next_loss_scale(state.loss_scale, overflow, finite),
    )
    return new_state, metrics


def next_loss_scale(old: dict[str, jax.Array], overflow: jax.Array, finite: jax.Array) -> dict[str, jax.Array]:
    """Half of it after an overflow, twice after `LOSS_SCALE_STEPS` steps without one."""
    if not old:
        return {}
    sound = jnp.where(finite, old["sound"] + 1, 0)
    grown = sound >= LOSS_SCALE_STEPS
    scale = jnp.where(grown, jnp.minimum(2 * old["scale"], LARGEST_LOSS_SCALE), old["scale"])
    scale = jnp.where(overflow, jnp.maximum(old["scale"] / 2, 1.0), scale)
    return {"scale": scale, "sound": jnp.where(grown, 0, sound)}


def eval_step(
    trainable, frozen, batch: Batch, *, config: ModelConfig, runtime: decoder.Runtime, max_segments: int
) -> dict[str, jax.Array]:
    """Sums per segment of a `[1, B, L]` batch, so that the host can total them by example or by source.

    Returns:
      "nll", "weight", "trained", "correct": `[B, max_segments]`, column s for segment id s + 1.
    """
    variables = tree.merge(trainable, frozen)
    batch = jax.tree.map(lambda x: x[0], batch)
    hidden, _ = decoder.hidden_states(
        config, runtime, variables, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    _, token = decoder.token_loss(config, runtime, variables, hidden, batch["targets"], batch["weights"])
    trained = batch["weights"] > 0

    def by_segment(values_BxL):
        return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s - 1, max_segments))(values_BxL, batch["segment_ids"])

    return {
        "nll": by_segment(jnp.where(trained, token["nll"], 0.0) * batch["weights"]),
        "weight": by_segment(batch["weights"]),
        "trained": by_segment(trained.astype(jnp.int32)),
        "correct": by_segment((token["correct"] & trained).astype(jnp.int32)),
    }
