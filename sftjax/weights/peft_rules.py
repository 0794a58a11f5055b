"""What PEFT makes of an adapter's configuration on a model: the contract that an adapter folder must keep.

PEFT builds adapters where `adapter_config.json` says, and then loads the tensors that have a place; the others it drops
without a word. So a folder is right if it holds, name by name and shape by shape, what PEFT looks for. This is PEFT
0.21's own way from configuration to names, without torch; tests/parity compares it with PEFT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.peft.spec import AdapterSpec
from sftjax.weights import peft_units
from sftjax.weights.peft_units import Unit

PREFIX = "base_model.model."
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A unit with its adapter.

    `key` is what patterns of ranks are matched with; `prefix` the part of its tensors' names that they share.
    """

    unit: Unit
    key: str
    rank: int
    scale: float
    prefix: str

    def leaves(self, spec: AdapterSpec) -> dict[str, tuple[str, Shape]]:
        """`{name of the leaf in the tree: (name of the tensor, shape)}`."""
        (rows, columns), rank = self.unit.shape, self.rank
        if self.unit.embedding:
            names = {"lora_A": ("lora_embedding_B", (columns, rank)), "lora_B": ("lora_embedding_A", (rank, rows))}
            magnitude = columns
        else:
            rank *= len(self.unit.matrices)
            names = {"lora_A": ("lora_A.weight", (rank, columns)), "lora_B": ("lora_B.weight", (rows, rank))}
            magnitude = rows
        if spec.use_dora:
            names["magnitude"] = ("lora_magnitude_vector", (magnitude,))
        if spec.lora_bias:
            names["lora_bias"] = ("lora_B.bias", (rows,))
        return {leaf: (f"{self.prefix}.{name}", shape) for leaf, (name, shape) in names.items()}


def adapted(spec: AdapterSpec, units: Sequence[Unit]) -> list[Adapted]:
    """The units that PEFT adapts, by a configuration in PEFT's own words.

    Raises:
      ConfigError: a module that PEFT refuses to adapt.
    """
    keys = {unit: key for unit in units if (key := _key(spec, unit))}
    for unit, key in keys.items():
        _check(spec, unit, key)
    prefixes = wrapped(keys)
    return [
        Adapted(unit, key, spec.rank_of(key), spec.scale_of(key), prefixes[unit.name]) for unit, key in keys.items()
    ]


def wrapped(units: Iterable[Unit]) -> dict[str, str]:
    """`{name of the unit: prefix}`: parameters of one module are wrapped one around the other, the last outermost."""
    units = list(units)
    left: dict[str, int] = {}
    for unit in units:
        left[unit.module] = left.get(unit.module, 0) + 1
    prefixes = {}
    for unit in units:
        left[unit.module] -= 1
        prefixes[unit.name] = f"{PREFIX}{unit.module}{'.base_layer' * left[unit.module]}"
    return prefixes


def parameter_name(unit: Unit) -> str:
    return unit.name if unit.parameter else f"{unit.name}.weight"


def as_parameter(unit: Unit, form: str, config: ModelConfig, layout: str) -> bool:
    """Whether `target_parameters` is the place to name a unit."""
    # the names of an expert's projections are taken for the experts' parameters, wherever they stand
    taken = form == "parameters" and takes_for_experts(config, layout, unit.module)
    return bool(unit.parameter) or not unit.linear or taken


def _key(spec: AdapterSpec, unit: Unit) -> str:
    """By what name PEFT adapts a unit; "" where it doesn't."""
    full = parameter_name(unit)
    if any(full == wanted or full.endswith(f".{wanted}") for wanted in spec.target_parameters):
        return full
    if unit.parameter or spec.excludes(unit.module):
        return ""
    if spec.target_modules == "all-linear":
        return unit.module if unit.linear and unit.module != "lm_head" and not unit.embedding else ""
    return unit.module if spec.replace(target_parameters=()).picks(unit.module) else ""


def _check(spec: AdapterSpec, unit: Unit, key: str) -> None:
    if key != unit.module:
        for name, value in (("use_dora", spec.use_dora), ("lora_bias", spec.lora_bias)):
            if value:
                raise ConfigError(f"PEFT can't adapt {key} with {name}: leave it out with exclude_modules")
    elif not unit.linear:
        raise ConfigError(f"PEFT can't adapt {unit.module} as a module, only {unit.module}.weight in target_parameters")
    elif unit.embedding and spec.lora_bias:
        raise ConfigError(f"PEFT has no lora_bias for {unit.module}: leave it out with exclude_modules")


# ------------------------------------------------------------------------------------------ experts in transformers 5

_PARAMETER_OF = {  # what PEFT takes names of modules of transformers 4 for, by layout
    "plain": {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"},
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
}


def takes_for_experts(config: ModelConfig, layout: str, name: str) -> bool:
    """Whether PEFT, under transformers 5, would take a name in `target_modules` for an expert's or a router's."""
    return converts_experts(config, layout) and name.rpartition(".")[2] in _PARAMETER_OF[layout]


def converts_experts(config: ModelConfig, layout: str) -> bool:
    """Whether PEFT, under transformers 5, turns names of experts that are modules into those of parameters.

    It does for Mixtral and Qwen3-MoE. For Qwen2-MoE (which has a shared expert) it would drop the experts.
    """
    return peft_units.has_two_forms(config, layout) and not config.experts.shared_intermediate_size


def in_transformers_5(
    spec: AdapterSpec, shapes: Mapping[str, Shape], config: ModelConfig, layout: str
) -> tuple[AdapterSpec, dict[str, Shape]]:
    """Configuration and tensors of experts that are modules, as PEFT converts them for transformers 5.

    It takes ranks for the same everywhere: `{gate_up_proj: 2 r}`, with alpha doubled too.
    """
    table = _PARAMETER_OF[layout]
    names = [name for name in spec.target_modules if takes_for_experts(config, layout, name)]
    parameters = {table[name.rpartition(".")[2]] for name in names}
    spec = spec.replace(
        target_modules=tuple(name for name in spec.target_modules if name not in names),
        target_parameters=(*spec.target_parameters, *sorted(parameters)),
        rank_pattern=(*spec.rank_pattern, (r".*\.gate_up_proj", 2 * spec.rank)),
        alpha_pattern=(*spec.alpha_pattern, (r".*\.gate_up_proj", 2 * spec.alpha)),
    )
    converted = {}
    for name, shape in shapes.items():
        head, experts, tail = name.partition(".experts.")
        if not experts:
            converted[name] = shape
            continue
        head = head.replace(".block_sparse_moe", ".mlp")
        _, _, rest = tail.partition(".")  # the expert's number
        projection, _, leaf = rest.partition(".")
        inner = ".base_layer" if table[projection] == "gate_up_proj" else ""
        count, times = config.experts.count, 2 if inner else 1
        rank_axis = 0 if leaf == "lora_A.weight" else 1
        sizes = [size * times for size in shape]
        sizes[rank_axis] *= count
        if leaf == "lora_A.weight":
            sizes[1] = shape[1]
        converted[f"{head}.experts{inner}.{leaf}"] = tuple(sizes)
    return spec, converted


# ----------------------------------------------------------------------------------------------------------- contract


def problems(
    spec: AdapterSpec, shapes: Mapping[str, Shape], units: Sequence[Unit], tensors: Mapping[str, Shape]
) -> list[str]:
    """What PEFT would drop, miss or refuse, module by module; nothing: it loads the folder whole.

    Args:
      spec: of adapter_config.json, in its own words.
      shapes: of the folder's tensors.
      units: of the model as transformers has it.
      tensors: of the model as transformers has it, with their shapes.
    """
    try:
        wanted = adapted(spec, units)
    except ConfigError as error:
        return [str(error)]
    expected = {name: shape for one in wanted for name, shape in one.leaves(spec).values()}
    expected |= copies(spec, wanted, tensors)
    optional = base_names(wanted, tensors)
    for module, _ in spec.trainable_token_indices:
        name = "model.embed_tokens" if module == "embed_tokens" else module
        optional[f"{PREFIX}{name}.token_adapter.base_layer.weight"] = tensors[f"{name}.weight"]
    found = []
    for name, shape in shapes.items():
        known = expected.get(name, optional.get(name))
        if known is None:
            found.append(f"{_module(name)}: PEFT finds no place for {name} and would drop it")
        elif known != shape:
            found.append(f"{_module(name)}: {name} is {list(shape)}, PEFT wants {list(known)}")
    missing = [name for name in expected if name not in shapes]
    return found + [f"{_module(name)}: PEFT looks for {name}, which isn't there" for name in missing]


def copies(spec: AdapterSpec, wanted: Iterable[Adapted], tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes of what is trained as a copy: modules_to_save, biases, rows."""
    found = {f"{PREFIX}{name}": tensors[name] for name in saved_tensors(spec.modules_to_save, tensors)}
    bases = base_names(wanted, tensors)
    modules = {one.unit.module for one in wanted}
    for name, shape in bases.items():
        if name.endswith(".bias") and (
            spec.bias == "all" or (spec.bias == "lora_only" and ".base_layer." in name and _plain(name) in modules)
        ):
            found[name] = shape
    for module, rows in spec.trainable_token_indices:
        width = tensors["model.embed_tokens.weight"][1]
        name = "model.embed_tokens" if module == "embed_tokens" else module
        found[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = (len(rows), width)
    return found


def base_names(wanted: Iterable[Adapted], tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """The model's own tensors, as they are called once adapters are around their modules: PEFT loads them too."""
    depth: dict[str, int] = {}
    for one in wanted:
        depth[one.unit.module] = depth.get(one.unit.module, 0) + 1
    found = {}
    for name, shape in tensors.items():
        module, _, leaf = name.rpartition(".")
        found[f"{PREFIX}{module}{'.base_layer' * depth.get(module, 0)}.{leaf}"] = shape
    return found


def saved_tensors(names: Sequence[str], tensors: Iterable[str]) -> list[str]:
    """Tensors in the modules that PEFT saves by these names: every module whose name ends so, dot or not."""
    found = []
    for tensor in tensors:
        parts = tensor.split(".")[:-1]
        modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        if any(module.endswith(name) for module in modules for name in names):
            found.append(tensor)
    return found


def saved_names(saved: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The shortest names by which PEFT saves exactly these modules."""
    modules = list(modules)
    chosen = set()
    for module in saved:
        ending = module.rpartition(".")[2]
        alike = [other for other in modules if other.endswith(ending)]
        chosen.add(ending if set(alike) <= set(saved) else module)
    return sorted(chosen)


def _module(name: str) -> str:
    return _plain(name) or name


def _plain(name: str) -> str:
    """The module that a tensor belongs to."""
    module = name.removeprefix(PREFIX).rpartition(".")[0].replace(".base_layer", "")
    for ending in (".lora_A", ".lora_B", ".token_adapter"):
        module = module.removesuffix(ending)
    return module


def same_scales(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-6)
