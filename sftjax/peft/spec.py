"""What is trained: one frozen record, and the modules it picks out of a parameter tree.

Modules are matched by the names that PEFT users know (`model.layers.3.self_attn.q_proj`), although the tree holds all
layers of a run stacked: a module of the tree stands for `repeat` named ones, each with its own rank and alpha.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sftjax import tree
from sftjax.errors import ConfigError

Pattern = tuple[tuple[str, int], ...]
Rows = tuple[tuple[str, tuple[int, ...]], ...]  # module name and its rows
METHODS = ("full", "lora", "houlsby", "pfeiffer")
_PROJECTION = re.compile(r".*_proj")  # what "all-linear" means; the router, the embedding and the head are none
_MATRIX = re.compile(r".*(?:_proj|/router|/shared_expert_gate)|embed_tokens|lm_head")  # what can have LoRA
# What other programs call a module of the tree: where transformers fuses, stacks or renames what the tree keeps apart.
_OTHER_NAMES = (
    (r"self_attn\.[qkv]_proj", ("self_attn.qkv_proj",)),
    (r"mlp\.experts\.gate_proj", ("mlp.experts.gate_up_proj", "block_sparse_moe.experts.w1")),
    (r"mlp\.experts\.up_proj", ("mlp.experts.gate_up_proj", "block_sparse_moe.experts.w3")),
    (r"mlp\.experts\.down_proj", ("block_sparse_moe.experts.w2",)),
    (r"mlp\.(?:gate|up)_proj", ("mlp.gate_up_proj",)),
    (r"mlp\.router", ("mlp.gate", "block_sparse_moe.gate")),
)
_REGEX_SIGNS = re.compile(r"[\\^$*+?()\[\]{}|]")


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Which parameters are added to a model and trained. Field names are PEFT's where PEFT has them.

    Attributes:
      method: "full" ("none": no adapter, every parameter is trained), "lora", "dora" (LoRA with `use_dora`),
        "houlsby" (bottlenecks after attention and MLP) or "pfeiffer" (after the MLP only).
      target_modules: "all-linear" (every projection, not the head), names or name endings (`("q_proj", "v_proj")`),
        or one regex over whole names, as in PEFT. Names of transformers' fused modules pick all their parts.
      target_parameters: names of parameters that are to be adapted as well, as PEFT calls fused experts:
        `("mlp.experts.gate_up_proj", "mlp.experts.down_proj")`. Their parts are adapted one by one.
      layers_to_transform, layers_pattern: only these numbers of the list of this name ("layers").
      rank_pattern, alpha_pattern: `{name ending or regex: value}`, first match wins, else `rank` and `alpha`.
      lora_bias: B has a bias, which is scaled as B is.
      init: "default" (A Kaiming-uniform, B zero), "gaussian", "orthogonal", "pissa", or "pissa_niter_<n>" (randomised
        SVD).
      modules_to_save: modules trained in full beside the adapter, e.g. `("embed_tokens", "lm_head")`.
      trainable_token_indices: rows of the embedding that are trained, all others frozen: ids, or
        `{"embed_tokens": ids, "lm_head": ids}`. Of a tied head the same rows change.
      bias: which existing biases are trained: none, all, or those of the targeted modules.
      also_train: a regex over "<collection>/<path>" of further parameters, e.g. r"params/.*norm/weight".
      bottleneck_size, bottleneck_activation: of the Houlsby and Pfeiffer adapters.
    """

    method: Literal["full", "none", "lora", "dora", "houlsby", "pfeiffer"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()  # empty: all
    layers_pattern: tuple[str, ...] = ()  # empty: any
    rank_pattern: Pattern | Mapping[str, int] = ()
    alpha_pattern: Pattern | Mapping[str, int] = ()
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init: str = "default"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Rows | Mapping[str, Sequence[int]] | Sequence[int] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    also_train: str = ""
    bottleneck_size: int = 64
    bottleneck_activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"

    def __post_init__(self):
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.method == "dora":
            put("method", "lora")
            put("use_dora", True)
        if self.method == "none":
            put("method", "full")
        for name in ("target_modules", "exclude_modules"):
            put(name, _names(getattr(self, name)))
        for name in ("modules_to_save", "target_parameters", "layers_pattern"):
            value = getattr(self, name) or ()
            put(name, (value,) if isinstance(value, str) else tuple(value))
        put("trainable_token_indices", _rows(self.trainable_token_indices))
        put("layers_to_transform", tuple(self.layers_to_transform or ()))
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            put(name, tuple(value.items() if isinstance(value, Mapping) else map(tuple, value or ())))
        self._check()

    def _check(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"adapter method {self.method!r}: use one of {', '.join((*METHODS, 'dora', 'none'))}")
        if self.method == "lora" and min([self.rank, *(rank for _, rank in self.rank_pattern)]) < 1:
            raise ConfigError(f"adapter rank {self.rank}: ranks must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter dropout {self.dropout}: must be in [0, 1)")
        if not re.fullmatch(r"default|gaussian|orthogonal|pissa(_niter_\d+)?", self.init):
            raise ConfigError(
                f"adapter init {self.init!r}: use default, gaussian, orthogonal, pissa or pissa_niter_<n>"
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"adapter bias {self.bias!r}: use none, all or lora_only")
        if self.lora_bias and self.use_dora:
            raise ConfigError("peft.lora_bias: PEFT has none beside DoRA; leave one of them out")
        if self.lora_bias and self.init not in ("default",):
            raise ConfigError(f"peft.lora_bias: PEFT has none with init {self.init!r}; leave one of them out")
        for module, rows in self.trainable_token_indices:
            if module not in ("embed_tokens", "lm_head"):
                raise ConfigError(f"peft.trainable_token_indices: {module!r} has no tokens: embed_tokens or lm_head")
            if module in self.modules_to_save:
                raise ConfigError(f"peft.trainable_token_indices: modules_to_save trains all of {module} already")
            if len(set(rows)) != len(rows) or min(rows, default=0) < 0:
                raise ConfigError(f"peft.trainable_token_indices: {module} has a row twice, or a negative one")

    @property
    def pissa(self) -> bool:
        return self.init.startswith("pissa")

    @property
    def bottleneck(self) -> bool:
        return self.method in ("houlsby", "pfeiffer")

    def replace(self, **changes: Any) -> AdapterSpec:
        return dataclasses.replace(self, **changes)

    def targets(self, name: str) -> bool:
        """Whether the module of the tree of this full name gets an adapter, by any of its names (PEFT's rules)."""
        names = all_names(name)
        return any(map(self.picks, names)) and not any(map(self.excludes, names))

    def picks(self, name: str) -> bool:
        """Whether PEFT would adapt a module (or parameter) of exactly this name, exclusions apart."""
        if any(_ends(name, wanted.removesuffix(".weight")) for wanted in self.target_parameters):
            return True
        if self.target_modules == "all-linear":
            found = bool(_PROJECTION.fullmatch(name))
        else:
            found = _matches(self.target_modules, name)
        if found and self.layers_to_transform:
            return _layer_number(name, self.layers_pattern) in self.layers_to_transform
        return found

    def excludes(self, name: str) -> bool:
        """Whether a module of exactly this name is trained in full, or not at all."""
        saved = any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in self.modules_to_save)
        return saved or _matches(self.exclude_modules, name)

    def rank_of(self, *names: str) -> int:
        """The rank of a module, given its name (or several that it has)."""
        return _by_pattern(self.rank_pattern, names, self.rank)

    def scale_of(self, *names: str) -> float:
        """What multiplies B·A in this module: alpha / rank, or alpha / sqrt(rank) (rsLoRA)."""
        rank, alpha = self.rank_of(*names), _by_pattern(self.alpha_pattern, names, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def token_rows(self, module: str) -> tuple[int, ...]:
        """The rows of "embed_tokens" or "lm_head" that are trained."""
        return dict(self.trainable_token_indices).get(module, ())


@dataclasses.dataclass(frozen=True)
class Target:
    """A stacked module that gets an adapter.

    `names`, `ranks`, `scales` have one entry per repeat; a rank of 0 marks a layer that isn't targeted.
    """

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    shape: tuple[int, ...]  # [repeat, (expert,) out, in]; of the embedding and the head [V, D]

    @property
    def parameters(self) -> int:
        """Trained numbers in A and B, zero padding not counted."""
        *_, outputs, inputs = self.shape
        return sum(self.ranks) * (outputs + inputs) * math.prod(self.shape[1:-2])

    @property
    def stacked(self) -> bool:
        """Whether it is a module of the layers, and not the embedding or the head."""
        return self.names[0].startswith("model.layers.")


def module_names(paths: Sequence[str], repeats: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Full names, one per repeat, of every module path of a tree.

        layers_0/1/mlp/up_proj, two positions, repeat 3  ->  model.layers.{1, 3, 5}.mlp.up_proj

    Args:
      paths: module paths such as "layers_0/0/self_attn/q_proj".
      repeats: the leading size of each run, `{"layers_0": 3}`.
    """
    positions: dict[str, int] = {}
    for path in paths:
        run, *rest = path.split("/")
        if run in repeats:
            positions[run] = max(positions.get(run, 0), int(rest[0]) + 1)
    first, total = {}, 0
    for run in sorted(repeats, key=lambda run: int(run.removeprefix("layers_"))):
        first[run] = total
        total += positions.get(run, 0) * repeats[run]
    names = {}
    for path in paths:
        run, *rest = path.split("/")
        if run not in repeats:
            names[path] = (path if path == "lm_head" else f"model.{path.replace('/', '.')}",)
            continue
        module = ".".join(rest[1:])
        numbers = range(repeats[run])
        names[path] = tuple(
            f"model.layers.{first[run] + repeat * positions[run] + int(rest[0])}.{module}" for repeat in numbers
        )
    return names


def weight_shapes(params: tree.Tree, quant: tree.Tree | None = None) -> dict[str, tuple[int, ...]]:
    """`{module path: shape of its weight}`, quantised or not."""
    shapes = {}
    for path, leaf in tree.flatten(params).items():
        module, _, name = path.rpartition("/")
        if name == "weight":
            shapes[module] = tuple(leaf.shape)
    for path, leaf in tree.flatten(quant or {}).items():
        module, _, name = path.rpartition("/")
        if name == "codes":
            packed = leaf.dtype == "uint8"
            shapes[module] = (*leaf.shape[:-1], leaf.shape[-1] * (2 if packed else 1))
    return shapes


def find_names(params: tree.Tree, quant: tree.Tree | None = None) -> dict[str, tuple[str, ...]]:
    """`{module path: its full names}` for every module with a weight."""
    shapes = weight_shapes(params, quant)
    repeats = {path.split("/")[0]: shape[0] for path, shape in shapes.items() if path.startswith("layers_")}
    return module_names(list(shapes), repeats)


def find_targets(params: tree.Tree, spec: AdapterSpec, quant: tree.Tree | None = None) -> dict[str, Target]:
    """`{module path: Target}` of everything that gets an adapter.

    Raises:
      ConfigError: nothing matches, or what matches can't have a LoRA adapter.
    """
    shapes, names = weight_shapes(params, quant), find_names(params, quant)
    targets = {}
    for path, shape in shapes.items():
        chosen = [spec.targets(name) for name in names[path]]
        if not any(chosen):
            continue
        if not _MATRIX.fullmatch(path):
            raise ConfigError(
                f"peft.target_modules picks {names[path][0]!r}, which is no projection; "
                f"train it in full with peft.modules_to_save instead"
            )
        pairs = list(zip(names[path], chosen, strict=True))
        targets[path] = Target(
            names=names[path],
            ranks=tuple(spec.rank_of(*all_names(name)) if hit else 0 for name, hit in pairs),
            scales=tuple(spec.scale_of(*all_names(name)) if hit else 0.0 for name, hit in pairs),
            shape=shape,
        )
    if not targets:
        endings = sorted({path.rpartition("/")[2] for path in shapes if _MATRIX.fullmatch(path)})
        raise ConfigError(
            f"peft.target_modules={spec.target_modules!r} matches no module; this model has {', '.join(endings)}"
        )
    return targets


def saved_modules(params: tree.Tree, spec: AdapterSpec) -> tuple[str, ...]:
    """Paths of the modules that `modules_to_save` names.

    Raises:
      ConfigError: a name matches nothing (a tied head has no weight of its own).
    """
    names = find_names(params)
    found: dict[str, None] = {}
    for wanted in spec.modules_to_save:
        hits = [path for path, full in names.items() if any(_ends(name, wanted) for name in full)]
        if not hits:
            remedy = "; it is tied to embed_tokens: name that" if wanted == "lm_head" else ""
            raise ConfigError(f"peft.modules_to_save: no module {wanted!r} with a weight in this model{remedy}")
        if not all(_ends(name, wanted) for path in hits for name in names[path]):
            raise ConfigError(f"peft.modules_to_save: {wanted!r} names single layers; a module is saved in all layers")
        found.update(dict.fromkeys(hits))
    return tuple(found)


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def all_names(name: str) -> tuple[str, ...]:
    """The name of a module of the tree, and what transformers calls the modules and parameters that it is a part of."""
    for ending, others in _OTHER_NAMES:
        match = re.fullmatch(rf"(.*\.)?{ending}", name)
        if match:
            return (name, *((match[1] or "") + other for other in others))
    return (name,)


def _matches(wanted: str | Sequence[str], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(_ends(name, ending) for ending in wanted)


def _by_pattern(pattern: Pattern, names: Sequence[str], default: float) -> Any:
    for key, value in pattern:
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            return value
    return default


def _layer_number(name: str, lists: Sequence[str]) -> int | None:
    """The number of the layer that a module is in, by the first list of modules in its name, or by one named so."""
    for which in lists or (r"[^.]*",):
        match = re.match(rf"(?:.*?\.)?{which}\.(\d+)\.", name)
        if match:
            return int(match[1])
    return None


def _rows(value: Any) -> Rows:
    """Token rows by module; of plain ids, the embedding's."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    value = tuple(value or ())
    if value and not isinstance(value[0], tuple | list):
        value = (("embed_tokens", value),)
    return tuple((module, tuple(int(row) for row in rows)) for module, rows in value if len(rows))


def _names(value: str | Sequence[str]) -> str | tuple[str, ...]:
    """A regex or "all-linear" stays a string; a plain name, or several with commas, become a tuple."""
    if not isinstance(value, str):
        return tuple(value or ())
    if value.lower() == "all-linear":
        return "all-linear"
    if _REGEX_SIGNS.search(value):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())
