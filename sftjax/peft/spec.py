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
METHODS = ("full", "lora", "houlsby", "pfeiffer")
_LINEAR = re.compile(r".*_proj")  # every matmul of a block; the router, the embedding and the head are none
_REGEX_SIGNS = re.compile(r"[\\^$*+?()\[\]{}|]")


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """Which parameters are added to a model and trained. Field names are PEFT's where PEFT has them.

    Attributes:
      method: "full" ("none": no adapter, every parameter is trained), "lora", "dora" (LoRA with `use_dora`),
        "houlsby" (bottlenecks after attention and MLP) or "pfeiffer" (after the MLP only).
      target_modules: "all-linear" (every projection, not the head), names or name endings (`("q_proj", "v_proj")`),
        or one regex over whole names, as in PEFT.
      rank_pattern, alpha_pattern: `{name ending or regex: value}`, first match wins, else `rank` and `alpha`.
      init: "default" (A Kaiming-uniform, B zero), "gaussian", "pissa", or "pissa_niter_<n>" (randomised SVD).
      modules_to_save: modules trained in full beside the adapter, e.g. `("embed_tokens", "lm_head")`.
      bias: which existing biases are trained: none, all, or those of the targeted modules.
      also_train: a regex over "<collection>/<path>" of further parameters, e.g. r"params/.*norm/weight".
      bottleneck_size, bottleneck_activation: of the Houlsby and Pfeiffer adapters.
    """

    method: Literal["full", "none", "lora", "dora", "houlsby", "pfeiffer"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()  # empty: all
    rank_pattern: Pattern | Mapping[str, int] = ()
    alpha_pattern: Pattern | Mapping[str, int] = ()
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"
    modules_to_save: tuple[str, ...] = ()
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
        put("modules_to_save", tuple(self.modules_to_save or ()))
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
        if not re.fullmatch(r"default|gaussian|pissa(_niter_\d+)?", self.init):
            raise ConfigError(f"adapter init {self.init!r}: use default, gaussian, pissa or pissa_niter_<n>")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"adapter bias {self.bias!r}: use none, all or lora_only")

    @property
    def pissa(self) -> bool:
        return self.init.startswith("pissa")

    @property
    def bottleneck(self) -> bool:
        return self.method in ("houlsby", "pfeiffer")

    def replace(self, **changes: Any) -> AdapterSpec:
        return dataclasses.replace(self, **changes)

    def targets(self, name: str) -> bool:
        """Whether the module of this full name gets an adapter (PEFT's rules)."""
        if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in self.modules_to_save):
            return False
        if _matches(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            found = bool(_LINEAR.fullmatch(name))
        else:
            found = _matches(self.target_modules, name)
        if found and self.layers_to_transform:
            layer = re.match(r".*?\.[^.]*\.(\d+)\.", name)
            return layer is not None and int(layer[1]) in self.layers_to_transform
        return found

    def rank_of(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What multiplies B·A in this module: alpha / rank, or alpha / sqrt(rank) (rsLoRA)."""
        rank, alpha = self.rank_of(name), _by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclasses.dataclass(frozen=True)
class Target:
    """A stacked module that gets an adapter.

    `names`, `ranks`, `scales` have one entry per repeat; a rank of 0 marks a layer that isn't targeted.
    """

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    shape: tuple[int, ...]  # [repeat, (expert,) out, in]

    @property
    def parameters(self) -> int:
        """Trained numbers in A and B, zero padding not counted."""
        *_, outputs, inputs = self.shape
        return sum(self.ranks) * (outputs + inputs) * math.prod(self.shape[1:-2])


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
        if not _LINEAR.fullmatch(path):
            raise ConfigError(
                f"peft.target_modules picks {names[path][0]!r}, which is no projection; "
                f"train it in full with peft.modules_to_save instead"
            )
        targets[path] = Target(
            names=names[path],
            ranks=tuple(spec.rank_of(name) if hit else 0 for name, hit in zip(names[path], chosen, strict=True)),
            scales=tuple(spec.scale_of(name) if hit else 0.0 for name, hit in zip(names[path], chosen, strict=True)),
            shape=shape,
        )
    if not targets:
        endings = sorted({path.rpartition("/")[2] for path in shapes if _LINEAR.fullmatch(path)})
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


def _matches(wanted: str | Sequence[str], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(_ends(name, ending) for ending in wanted)


def _by_pattern(pattern: Pattern, name: str, default: float) -> Any:
    for key, value in pattern:
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _names(value: str | Sequence[str]) -> str | tuple[str, ...]:
    """A regex or "all-linear" stays a string; a plain name, or several with commas, become a tuple."""
    if not isinstance(value, str):
        return tuple(value or ())
    if value.lower() == "all-linear":
        return "all-linear"
    if _REGEX_SIGNS.search(value):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())
