"""Cross-entropy fused with the output head: `[N, V]` logits never exist.

Tokens go through in chunks; each chunk's logits live once, in float32, and turn into the loss and (when something is
being trained) into the gradient of hidden states and head in the same pass, the way Liger does it: three products
instead of four. The backward pass only multiplies by the incoming scalar.

Letters: `N` tokens (any leading axes), `D` model, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sftjax import compat
from sftjax.kernels import linear

Array = jax.Array
# Bytes of float32 logits at a time. More amortises the running sum of the head's gradient; on a CPU less stays nearer.
LOGITS_BYTES = {"cpu": 2**27}
LOGITS_BYTES_ELSEWHERE = 2**30


@dataclasses.dataclass(frozen=True)
class _Options:
    logit_scale: float
    soft_cap: float | None
    chunk: int | None
    valid_vocab: int | None
    skip_unweighted: bool
    mesh: Mesh | None


def cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    weights: Array,
    *,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    chunk: int | None = None,
    valid_vocab: int | None = None,
    skip_unweighted: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Array, Array, Array]:
    """`sum(weights * -log softmax(soft_cap(logit_scale * hidden @ weight.T))[targets])`.

    Differentiable through the first result, in `hidden` and `weight`; a head that isn't trained costs nothing.

    Args:
      hidden: `[..., D]`; its type is the type of the products.
      weight: `[V, D]`, cast to `hidden.dtype` for the products.
      targets: `[...]` int, in `[0, V)`.
      weights: `[...]` float; 0: the token isn't trained.
      chunk: tokens whose logits exist at a time (on each device); None: as many as `LOGITS_BYTES` allows.
      valid_vocab: rows of `weight` from here on are padding and get probability 0.
      skip_unweighted: don't compute tokens of weight 0; their `nll` is then 0 and `correct` False.
      mesh: if given, each device works on its own tokens (first axis over data and fsdp, second over context) and on
        its own part of the vocabulary (axis tensor); one reduction at the end.

    Returns:
      the sum (float32 scalar), the negative log likelihood of each token (float32 `[...]`) and whether the target has
      the largest logit (bool `[...]`).
    """
    options = _Options(logit_scale, soft_cap, chunk, valid_vocab, skip_unweighted, mesh)
    return _cross_entropy(options, hidden, weight, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, hidden, weight, targets, weights):
    total, nll, correct, _, _ = _compute(options, hidden, weight, targets, weights, False, False)
    return total, nll, correct


def _forward(options, hidden, weight, targets, weights):
    total, nll, correct, d_hidden, d_weight = _compute(
        options, hidden.value, weight.value, targets.value, weights.value, hidden.perturbed, weight.perturbed
    )
    return (total, nll, correct), (d_hidden, d_weight)


def _backward(options, residuals, cotangents):
    d_total = cotangents[0]
    if isinstance(d_total, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    d_hidden, d_weight = (None if d is None else (d * d_total).astype(d.dtype) for d in residuals)
    return d_hidden, d_weight, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _compute(options: _Options, hidden, weight, targets, weights, want_hidden: bool, want_weight: bool):
    if options.mesh is None or options.mesh.size == 1:
        return _local(options, None, (), want_hidden, want_weight, hidden, weight, targets, weights)
    mesh = options.mesh
    sizes = dict(mesh.shape)

    def fits(dim: int, *axes: str):
        axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        size = 1
        for axis in axes:
            size *= sizes[axis]
        return axes if axes and dim % size == 0 else None

    rows = [fits(targets.shape[0], "data", "fsdp")]
    if targets.ndim > 1:
        rows += [fits(targets.shape[1], "context"), *[None] * (targets.ndim - 2)]
    tensor = "tensor" if fits(weight.shape[0], "tensor") else None
    token_axes = tuple(axis for entry in rows if entry for axis in entry)
    function = functools.partial(_local, options, tensor, token_axes, want_hidden, want_weight)
    tokens, head = P(*rows), P(tensor, None)
    return compat.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(*rows, None), head, tokens, tokens),
        out_specs=(P(), tokens, tokens, P(*rows, None) if want_hidden else None, head if want_weight else None),
    )(hidden, weight, targets, weights)


def _local(options, tensor, token_axes, want_hidden, want_weight, hidden, weight, targets, weights):
    """One device's tokens and its part of the vocabulary."""
    shape = targets.shape
    x_NxD = hidden.reshape(-1, hidden.shape[-1])
    targets_N, weights_N = targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)
    tokens = targets_N.shape[0]
    chunk = min(options.chunk or _chunk_size(options.mesh, weight.shape[0]), tokens)
    chunks = -(-tokens // chunk)
    w_VxD = weight.astype(x_NxD.dtype)
    first = 0 if tensor is None else jax.lax.axis_index(tensor) * weight.shape[0]

    # Rows in the order in which they are worked on; `tokens` marks filling, which weighs nothing and is dropped.
    order = jnp.argsort(weights_N == 0, stable=True) if options.skip_unweighted else jnp.arange(tokens)
    order = jnp.concatenate([order, jnp.full(chunks * chunk - tokens, tokens, order.dtype)]).reshape(chunks, chunk)
    needed = -(-jnp.sum(weights_N != 0) // chunk) if options.skip_unweighted else chunks

    def step(i, carry):
        total, nll, correct, d_x, d_w = carry
        rows = order[i]
        x = x_NxD.at[rows].get(mode="clip")
        target = targets_N.at[rows].get(mode="clip")
        token_weight = jnp.where(rows < tokens, weights_N.at[rows].get(mode="clip"), 0.0)
        nll_n, correct_n, d_logits = _chunk(options, tensor, first, x, w_VxD, target, token_weight)
        # An unweighted token's loss may be infinite (its target lies in the padding, say); 0 * inf would spoil the sum.
        total = total + jnp.sum(jnp.where(token_weight == 0, 0.0, nll_n * token_weight))
        nll = nll.at[rows].set(nll_n, mode="drop")
        correct = correct.at[rows].set(correct_n, mode="drop")
        if want_hidden or want_weight:
            d_logits = d_logits.astype(x.dtype)
        if want_hidden:
            d_rows = linear.input_product(d_logits, w_VxD, jnp.float32)
            d_rows = d_rows if tensor is None else jax.lax.psum(d_rows, tensor)
            d_x = d_x.at[rows].set(d_rows.astype(d_x.dtype), mode="drop")
        if want_weight:
            d_w = d_w + linear.weight_product(d_logits, x, jnp.float32)
        return total, nll, correct, d_x, d_w

    carry = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(tokens, jnp.float32),
        jnp.zeros(tokens, bool),
        jnp.zeros_like(x_NxD) if want_hidden else None,
        jnp.zeros(weight.shape, jnp.float32) if want_weight else None,
    )
    total, nll, correct, d_x, d_w = jax.lax.fori_loop(0, needed, step, carry)
    if options.skip_unweighted:  # the last chunk may have held some
        nll, correct = jnp.where(weights_N == 0, 0.0, nll), correct & (weights_N != 0)
    if token_axes:
        total = jax.lax.psum(total, token_axes)
        d_w = None if d_w is None else jax.lax.psum(d_w, token_axes)
    d_x = None if d_x is None else d_x.reshape(hidden.shape)
    d_w = None if d_w is None else d_w.astype(weight.dtype)
    return total, nll.reshape(shape), correct.reshape(shape), d_x, d_w


def _chunk_size(mesh: Mesh | None, vocab: int) -> int:
    """A power of two, at least 128."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    fitting = LOGITS_BYTES.get(platform, LOGITS_BYTES_ELSEWHERE) // (4 * vocab)
    return 2 ** max(7, fitting.bit_length() - 1)


def _chunk(options, tensor, first, x, w_VxD, target, token_weight):
    """Loss, hit and weighted gradient of the raw logits for a chunk; collectives over `tensor` if sharded."""
    vocab = w_VxD.shape[0]
    raw = linear.forward_product(x, w_VxD, jnp.float32) * options.logit_scale
    if options.soft_cap is None:
        logits, slope = raw, options.logit_scale
    else:
        squashed = jnp.tanh(raw / options.soft_cap)
        logits, slope = squashed * options.soft_cap, (1.0 - squashed * squashed) * options.logit_scale
    column = first + jnp.arange(vocab)[None, :]
    if options.valid_vocab is not None:
        logits = jnp.where(column < options.valid_vocab, logits, -jnp.inf)
    top = jnp.max(logits, axis=1)
    top = top if tensor is None else jax.lax.pmax(top, tensor)
    exps = jnp.exp(logits - top[:, None])
    norm = jnp.sum(exps, axis=1)
    is_target = column == target[:, None]
    hit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
    if tensor is not None:
        norm, hit = jax.lax.psum((norm, hit), tensor)
    nll = jnp.log(norm) + top - hit
    d_logits = (exps / norm[:, None] - is_target) * token_weight[:, None] * slope
    return nll, hit >= top, d_logits
