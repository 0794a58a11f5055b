"""Which device keeps what: one table from a parameter's path to its sharding.

Rules name the *trailing* axes of a leaf; leading axes (`[repeat]`) stay whole, because a scan slices them.
A matrix has at most two cuts: `tensor` (Megatron's columns, then rows, so that a block needs one reduction) and
`fsdp`, which goes on the other axis, or on the larger one where nothing is cut by `tensor`. An axis that doesn't
divide a dimension is dropped for that leaf.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax import tree
from sftjax.parallel.mesh import BATCH_AXES

COLUMN, ROW = ("tensor", "fsdp"), ("fsdp", "tensor")
_COLUMNS = r"(?:q|k|v|gate|up)_proj"
_ROWS = r"(?:o|down)_proj"
_MATRIX = r"(?:weight|codes|absmax)"

# (regex on the whole path without its collection, trailing axes)
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (rf"(?:embed_tokens|lm_head)/{_MATRIX}", COLUMN),
    (r"lm_head/bias", ("tensor",)),
    # experts: [expert, out, in]
    (rf".*/experts/{_COLUMNS}/{_MATRIX}", ("expert", *COLUMN)),
    (rf".*/experts/{_ROWS}/{_MATRIX}", ("expert", *ROW)),
    (rf".*/experts/{_COLUMNS}/(?:bias|magnitude)", ("expert", "tensor")),
    (rf".*/experts/{_ROWS}/(?:bias|magnitude)", ("expert", None)),
    (rf".*/experts/{_COLUMNS}/(?:initial_)?lora_A", ("expert", None, "fsdp")),
    (rf".*/experts/{_COLUMNS}/(?:initial_)?lora_B", ("expert", "tensor", None)),
    (rf".*/experts/{_ROWS}/(?:initial_)?lora_A", ("expert", None, "tensor")),
    (rf".*/experts/{_ROWS}/(?:initial_)?lora_B", ("expert", "fsdp", None)),
    (r".*/router/weight", (None, "fsdp")),
    (r".*/router/(?:bias|e_score_correction_bias)", (None,)),
    (r".*/shared_expert_gate/weight", (None, "fsdp")),
    # projections: [out, in]
    (rf".*/{_COLUMNS}/{_MATRIX}", COLUMN),
    (rf".*/{_ROWS}/{_MATRIX}", ROW),
    (rf".*/{_COLUMNS}/(?:bias|magnitude)", ("tensor",)),
    (rf".*/{_ROWS}/(?:bias|magnitude)", (None,)),
    # int8 keeps a scale for each output, LoRA one for each layer: both are small
    (r".*/(?:scale|absmax_scale|absmax_offset)", ()),
    (r"(?:lm_head|embed_tokens)/trainable_tokens", (None, "fsdp")),
    (r"(?:lm_head|embed_tokens)/token_indices", (None,)),
    (rf"(?:.*/{_COLUMNS}|lm_head)/lora_bias", ("tensor",)),
    (rf".*/(?:{_ROWS}|router|shared_expert_gate)/lora_bias", (None,)),
    # adapters: A [rank, in] is cut as the base's input, B [out, rank] as its output
    (rf"(?:.*/{_COLUMNS}|lm_head|embed_tokens|.*/router|.*/shared_expert_gate)/(?:initial_)?lora_A", (None, "fsdp")),
    (rf"(?:.*/{_COLUMNS}|lm_head|embed_tokens)/(?:initial_)?lora_B", ("tensor", None)),
    (r"(?:.*/router|.*/shared_expert_gate)/(?:initial_)?lora_B", (None, None)),
    (r"(?:lm_head|embed_tokens|.*/router|.*/shared_expert_gate)/magnitude", (None,)),
    (rf".*/{_ROWS}/(?:initial_)?lora_A", (None, "tensor")),
    (rf".*/{_ROWS}/(?:initial_)?lora_B", ("fsdp", None)),
    (r".*/adapter_(?:attn|mlp)/down/weight", (None, "fsdp")),
    (r".*/adapter_(?:attn|mlp)/up/weight", ("fsdp", None)),
    (r".*/adapter_(?:attn|mlp)/(?:down|up)/bias", (None,)),
    (r".*/sinks", ("tensor",)),
    (r"(?:.*/)?(?:norm|\w+_norm)/(?:weight|bias)", (None,)),
)
_COLLECTION = re.compile(r"^(?:params|adapter|quant)/")


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The sharding of one leaf.

    Args:
      path: with or without its collection, `adapter/layers_0/0/self_attn/q_proj/lora_A`.

    Raises:
      KeyError: no rule covers the path.
    """
    axes = tree.first_match(RULES, _COLLECTION.sub("", path))
    axes = axes[max(0, len(axes) - len(shape)) :]
    lead = len(shape) - len(axes)
    cut: list[str | None] = [None] * len(shape)
    for i, axis in enumerate(axes, start=lead):
        if axis not in (None, "fsdp") and _divides(mesh, axis, shape[i]):
            cut[i] = axis
    if "fsdp" in axes and mesh.shape["fsdp"] > 1:
        named = lead + axes.index("fsdp")
        other = [lead + i for i, axis in enumerate(axes) if axis == "tensor" and cut[lead + i] is None]
        # By size where there is a choice; the named axis wins a tie.
        for i in sorted([named, *other], key=lambda i: -shape[i]):
            if _divides(mesh, "fsdp", shape[i]):
                cut[i] = "fsdp"
                break
    return P(*cut)


def gathered_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`param_spec` with the `fsdp` cuts undone: how a layer's weight is *used*."""
    return P(*(None if axis == "fsdp" else axis for axis in param_spec(path, shape, mesh)))


def gather(weight: jax.Array, path: str, mesh: Mesh) -> jax.Array:
    """A layer's weight as it is used, so that the compiler gathers weights, never activations.

    Its gradient is cut again where it arises. A constraint alone would ask for the gradient whole: every device would
    receive the sum of all of it, twice the bytes of the part that it keeps (compiled for v5e:4x4: 1,205 against 868 GB
    a step of Llama-2-7B).
    """
    used, kept = gathered_spec(path, weight.shape, mesh), param_spec(path, weight.shape, mesh)
    if not jnp.issubdtype(weight.dtype, jnp.floating):  # codes have no gradient
        return constrain(weight, used, mesh)

    @jax.custom_vjp
    def place(weight):
        return constrain(weight, used, mesh)

    place.defvjp(lambda weight: (place(weight), None), lambda _, gradient: (constrain(gradient, kept, mesh),))
    return place(weight)


def _divides(mesh: Mesh, axis: str, size: int) -> bool:
    return mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0


def shardings(abstract: tree.Tree, mesh: Mesh) -> dict[str, Any]:
    """`NamedSharding` for each leaf of `{collection: {...}}` (or of one collection's tree)."""
    return tree.map_paths(lambda path, leaf: NamedSharding(mesh, param_spec(path, leaf.shape, mesh)), abstract)


def state_shardings(abstract_state: Any, params: tree.Tree, mesh: Mesh) -> Any:
    """Shardings for an optimizer state (any pytree): moments lie as their parameters do.

    A leaf belongs to the parameter whose path its own path ends with. One of another shape (factored or blocked
    moments) is cut by `fsdp` along its largest dimension behind the first, if that divides; scalars are replicated.

    Args:
      params: the tree that the optimizer was given (arrays or shapes).
    """
    shapes = {path: leaf.shape for path, leaf in tree.flatten(params).items()}

    def of(key_path, leaf):
        names = [_key_name(key) for key in key_path]
        for start in range(len(names)):
            path = "/".join(names[start:])
            if path in shapes:
                if leaf.shape == shapes[path]:
                    return NamedSharding(mesh, param_spec(path, leaf.shape, mesh))
                break
        return NamedSharding(mesh, _largest(leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of, abstract_state)


def _key_name(key) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def _largest(shape: tuple[int, ...], mesh: Mesh) -> P:
    options = [i for i in range(1, len(shape)) if _divides(mesh, "fsdp", shape[i])]
    if not options:
        return P()
    best = max(options, key=lambda i: shape[i])
    return P(*("fsdp" if i == best else None for i in range(len(shape))))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For `[A, B, L]` arrays: rows over data and fsdp, the sequence over context."""
    return NamedSharding(mesh, P(None, BATCH_AXES, "context" if mesh.shape["context"] > 1 else None))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch's rows are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain(x: jax.Array, spec: P, mesh: Mesh | None) -> jax.Array:
    """`with_sharding_constraint`, nothing on one device; axes that don't divide are dropped."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit(spec, x.shape, mesh)))


def fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`spec` without the axes that don't divide their dimension."""

    def keep(entry, size):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        return entry if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return P(*(keep(entry, size) for entry, size in zip(spec, shape, strict=False)))


def by_path(shardings_tree: Mapping[str, Any]) -> dict[str, P]:
    """`{path: spec}`, for printing and tests."""
    return {path: sharding.spec for path, sharding in tree.flatten(shardings_tree).items()}
