"""Which Hugging Face tensor is which parameter: one table, read both ways.

`tensors(config, layout)` lists every tensor of a checkpoint with its shape and the parameters inside it. A `Part`
says where the parameter lives in the tree (path, and the index on the leading `[repeat]` or `[repeat, expert]` axes)
and which slice of the tensor it is, so importing and exporting are the same loop with the arrow turned:

    model.layers.5.self_attn.q_proj.weight [q, D]   <->  layers_0/0/self_attn/q_proj/weight[5]
    model.layers.5.self_attn.qkv_proj.weight        <->  rows 0:q        of it: .../q_proj/weight[5]
      [q + 2 kv, D]  (Phi-3)                             rows q:q+kv     of it: .../k_proj/weight[5], ...
    model.layers.5.mlp.experts.gate_up_proj         <->  [e, :, 0::2].T  of it: .../experts/gate_proj/weight[5, e]
      [E, D, 2 F]  (GPT-OSS, interleaved)                [e, :, 1::2].T  of it: .../experts/up_proj/weight[5, e]

Legend: D hidden, F ffn, E experts, H heads, q = heads x head_dim, kv = kv heads x head_dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from sftjax.models.config import Experts, LayerSpec, ModelConfig, layer_address, layer_plan

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter (or one layer's, or one expert's, slice of a stacked one) inside a tensor."""

    path: str
    index: tuple[int, ...]  # on the leaf's leading axes: (), (repeat,) or (repeat, expert)
    shape: Shape  # without the leading axes
    select: tuple[int | slice, ...] = ()  # of the tensor; (): all of it
    transpose: bool = False  # the slice is [in, out]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]


def tensors(config: ModelConfig, layout: str = "plain") -> list[Tensor]:
    """Every tensor of a checkpoint, in the order in which transformers writes them.

    Args:
      layout: "plain"; "phi3" (q, k, v and gate, up fused); "mixtral" (expert names w1, w3, w2); "gpt_oss" (experts
        fused, interleaved and transposed); "fused_experts" (as transformers 5 holds Mixtral and Qwen in memory:
        experts stacked, gate above up); "stacked" (as in GGUF: `[E, out, in]` each); "mxfp4" (GPT-OSS as released,
        after dequantisation).
    """
    return list(_tensors(config, layout))


def leaf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """`{path: shape}` of the whole parameter tree, leading axes included."""
    shapes = {part.path: part.shape for tensor in _tensors(config, "plain") for part in tensor.parts if not part.index}
    repeats = {f"layers_{run}": count for run, (_, count) in enumerate(layer_plan(config.layers))}
    for tensor in _tensors(config, "plain"):
        for part in tensor.parts:
            if part.index:
                leading = (repeats[part.path.split("/")[0]],)
                if len(part.index) == 2:
                    spec = _spec_at(config, part.path)
                    leading += (spec.experts.count,)  # type: ignore[union-attr]
                shapes[part.path] = leading + part.shape
    return shapes


def _spec_at(config: ModelConfig, path: str) -> LayerSpec:
    run, position = path.split("/")[:2]
    unit, _ = layer_plan(config.layers)[int(run.removeprefix("layers_"))]
    return unit[int(position)]


# ----------------------------------------------------------------------------------------------------- the table


def _tensors(config: ModelConfig, layout: str) -> Iterator[Tensor]:
    vocab, hidden = config.vocab_size, config.hidden_size
    yield _whole("model.embed_tokens.weight", "embed_tokens/weight", (), (vocab, hidden))
    for layer, spec in enumerate(config.layers):
        run, position, repeat = layer_address(config.layers, layer)
        at, index = f"layers_{run}/{position}/", (repeat,)
        for tensor in _layer(config, spec, layout):
            parts = tuple(
                dataclasses.replace(part, path=at + part.path, index=index + part.index) for part in tensor.parts
            )
            yield Tensor(f"model.layers.{layer}.{tensor.name}", tensor.shape, parts)
    yield _whole("model.norm.weight", "norm/weight", (), (hidden,))
    if not config.tie_word_embeddings:
        yield _whole("lm_head.weight", "lm_head/weight", (), (vocab, hidden))


def _layer(config: ModelConfig, spec: LayerSpec, layout: str) -> Iterator[Tensor]:
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    qkv = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
    if layout == "phi3":
        yield _stacked("self_attn.qkv_proj.weight", [(f"self_attn/{name}/weight", rows) for name, rows in qkv], hidden)
    else:
        for name, rows in qkv:
            yield from _linear(f"self_attn.{name}", f"self_attn/{name}", rows, hidden, config.qkv_bias)
    yield from _linear("self_attn.o_proj", "self_attn/o_proj", hidden, queries, config.o_bias)
    if config.attention_sinks:
        yield _whole("self_attn.sinks", "self_attn/sinks", (), (config.num_heads,))
    if config.qk_norm != "none":
        sizes = (head, head) if config.qk_norm == "head" else (queries, keys)
        for name, size in zip(("q_norm", "k_norm"), sizes, strict=True):
            yield _whole(f"self_attn.{name}.weight", f"self_attn/{name}/weight", (), (size,))
    if spec.experts is None:
        yield from _mlp("mlp", "mlp", hidden, config.intermediate_size, config.mlp_bias, layout)
    else:
        yield from _experts(hidden, spec.experts, layout)
    for name, role in _norms(config):
        yield _whole(f"{name}.weight", f"{role}/weight", (), (hidden,))


def _norms(config: ModelConfig) -> list[tuple[str, str]]:
    """HF's `post_attention_layernorm` comes before the MLP, unless there are norms after the blocks as well."""
    norms = []
    if config.pre_norm:
        norms.append(("input_layernorm", "pre_attention_norm"))
    if config.post_norm:
        norms.append(("post_attention_layernorm", "post_attention_norm"))
    if config.pre_norm and not config.parallel_block:
        norms.append(("pre_feedforward_layernorm" if config.post_norm else "post_attention_layernorm", "pre_mlp_norm"))
    if config.post_norm:
        norms.append(("post_feedforward_layernorm", "post_mlp_norm"))
    return norms


def _mlp(name: str, path: str, hidden: int, ffn: int, bias: bool, layout: str) -> Iterator[Tensor]:
    if layout == "phi3":
        rows = [(f"{path}/gate_proj/weight", ffn), (f"{path}/up_proj/weight", ffn)]
        yield _stacked(f"{name}.gate_up_proj.weight", rows, hidden)
    else:
        yield from _linear(f"{name}.gate_proj", f"{path}/gate_proj", ffn, hidden, bias)
        yield from _linear(f"{name}.up_proj", f"{path}/up_proj", ffn, hidden, bias)
    yield from _linear(f"{name}.down_proj", f"{path}/down_proj", hidden, ffn, bias)


def _experts(hidden: int, experts: Experts, layout: str) -> Iterator[Tensor]:
    count, ffn = experts.count, experts.intermediate_size
    oss = layout in ("gpt_oss", "mxfp4")
    block = "block_sparse_moe" if layout == "mixtral" else "mlp"
    router = "router" if oss else "gate"
    yield from _linear(f"{block}.{router}", "mlp/router", count, hidden, experts.router_bias)
    if oss:
        yield from _oss_experts(hidden, experts, transposed=layout == "gpt_oss")
    elif layout == "stacked":
        yield from _stacked_experts(hidden, experts)
    elif layout == "fused_experts":
        yield from _fused_experts(hidden, experts)
    else:
        names = ("w1", "w3", "w2") if layout == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        shapes = ((ffn, hidden), (ffn, hidden), (hidden, ffn))
        for expert in range(count):
            for name, role, shape in zip(names, ("gate_proj", "up_proj", "down_proj"), shapes, strict=True):
                at, path = f"{block}.experts.{expert}.{name}", f"mlp/experts/{role}"
                yield _whole(f"{at}.weight", f"{path}/weight", (expert,), shape)
                if experts.bias:
                    yield _whole(f"{at}.bias", f"{path}/bias", (expert,), shape[:1])
    if experts.shared_intermediate_size:
        yield from _mlp(
            "mlp.shared_expert", "mlp/shared_expert", hidden, experts.shared_intermediate_size, False, "plain"
        )
        yield _whole("mlp.shared_expert_gate.weight", "mlp/shared_expert_gate/weight", (), (1, hidden))


def _stacked_experts(hidden: int, experts: Experts) -> Iterator[Tensor]:
    """As GGUF has them: `[E, out, in]` each, biases `[E, out]`."""
    ffn, count = experts.intermediate_size, experts.count
    for role, shape in (("gate_proj", (ffn, hidden)), ("up_proj", (ffn, hidden)), ("down_proj", (hidden, ffn))):
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            if kind == "weight" or experts.bias:
                path = f"mlp/experts/{role}/{kind}"
                parts = tuple(Part(path, (expert,), size, (expert,)) for expert in range(count))
                yield Tensor(f"mlp.experts.{role}.{kind}", (count, *size), parts)


def _fused_experts(hidden: int, experts: Experts) -> Iterator[Tensor]:
    count, ffn = experts.count, experts.intermediate_size
    halves = (("gate_proj", slice(0, ffn)), ("up_proj", slice(ffn, 2 * ffn)))
    yield Tensor(
        "mlp.experts.gate_up_proj",
        (count, 2 * ffn, hidden),
        tuple(
            Part(f"mlp/experts/{name}/weight", (expert,), (ffn, hidden), (expert, rows))
            for expert in range(count)
            for name, rows in halves
        ),
    )
    down = tuple(Part("mlp/experts/down_proj/weight", (expert,), (hidden, ffn), (expert,)) for expert in range(count))
    yield Tensor("mlp.experts.down_proj", (count, hidden, ffn), down)


def _oss_experts(hidden: int, experts: Experts, *, transposed: bool) -> Iterator[Tensor]:
    """GPT-OSS: gate and up alternate; [E, in, out] in bfloat16 files, [E, out, in] where MXFP4 was dequantised."""
    count, ffn = experts.count, experts.intermediate_size
    halves = (("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2)))

    def select(expert: int, rows: slice) -> tuple[int | slice, ...]:
        return (expert, slice(None), rows) if transposed else (expert, rows)

    def flip(shape: Shape) -> Shape:
        return (shape[0], shape[2], shape[1]) if transposed else shape

    fused = [
        Part(f"mlp/experts/{name}/weight", (expert,), (ffn, hidden), select(expert, rows), transposed)
        for expert in range(count)
        for name, rows in halves
    ]
    yield Tensor("mlp.experts.gate_up_proj", flip((count, 2 * ffn, hidden)), tuple(fused))
    fused_bias = [
        Part(f"mlp/experts/{name}/bias", (expert,), (ffn,), (expert, rows))
        for expert in range(count)
        for name, rows in halves
    ]
    yield Tensor("mlp.experts.gate_up_proj_bias", (count, 2 * ffn), tuple(fused_bias))
    down = [
        Part("mlp/experts/down_proj/weight", (expert,), (hidden, ffn), (expert,), transposed) for expert in range(count)
    ]
    yield Tensor("mlp.experts.down_proj", flip((count, hidden, ffn)), tuple(down))
    down_bias = [Part("mlp/experts/down_proj/bias", (expert,), (hidden,), (expert,)) for expert in range(count)]
    yield Tensor("mlp.experts.down_proj_bias", (count, hidden), tuple(down_bias))


# -------------------------------------------------------------------------------------------------------- helpers


def _whole(name: str, path: str, index: tuple[int, ...], shape: Shape) -> Tensor:
    return Tensor(name, shape, (Part(path, index, shape),))


def _linear(name: str, path: str, rows: int, columns: int, bias: bool) -> Iterator[Tensor]:
    yield _whole(f"{name}.weight", f"{path}/weight", (), (rows, columns))
    if bias:
        yield _whole(f"{name}.bias", f"{path}/bias", (), (rows,))


def _stacked(name: str, pieces: Iterable[tuple[str, int]], columns: int) -> Tensor:
    """Several matrices above one another."""
    parts, first = [], 0
    for path, rows in pieces:
        parts.append(Part(path, (), (rows, columns), (slice(first, first + rows),)))
        first += rows
    return Tensor(name, (first, columns), tuple(parts))
