"""Model families: a Hugging Face `config.json` to `ModelConfig`, and back.

Families are named only here, in `family_llama.py`, `family_others.py` and `gguf.py` (and in presets and templates).
A family is one `Family` entry: a function that reads its fields, and one that writes them as transformers 5 does. Both
the transformers-4 form (`rope_theta`, `rope_scaling`, `torch_dtype`) and the transformers-5 form (`rope_parameters`,
`dtype`, `layer_types`) are read, and both are written: each program finds its own, and none falls back on defaults.
Every field is accounted for: read, known not to change the maths, or refused by name.
Code that a checkpoint brings along (`auto_map`) is never run and never carried on.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.weights import family_llama as llama
from sftjax.weights import family_others as others
from sftjax.weights import reference, rope, wrappers
from sftjax.weights.fields import Fields

_DROPPED_ON_EXPORT = {
    "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "auto_map",
    "quantization_config", "_name_or_path", "name_or_path", "architectures", "model_type",
    "transformers_version", "_attn_implementation", "_attn_implementation_autoset",
}  # fmt: skip
_REWRITTEN = {"hidden_act"}  # first Gemma files say "gelu", which transformers 4 believes, and mean gelu_pytorch_tanh
_DEQUANTISED = ("fp8", "bitsandbytes", "mxfp4")  # how: weights/quantised.py


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` is read and written."""

    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    layout: str = "plain"  # how tensors are named and fused: weights/rules.py


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", llama.read_llama, llama.write_llama),
    "mistral": Family("MistralForCausalLM", llama.read_mistral, llama.write_mistral),
    "mixtral": Family("MixtralForCausalLM", llama.read_mixtral, llama.write_mixtral, "mixtral"),
    "qwen2": Family("Qwen2ForCausalLM", llama.read_qwen2, llama.write_qwen2),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", llama.read_qwen2_moe, llama.write_qwen2_moe),
    "qwen3": Family("Qwen3ForCausalLM", llama.read_qwen3, llama.write_qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", llama.read_qwen3_moe, llama.write_qwen3_moe),
    "gemma": Family("GemmaForCausalLM", others.read_gemma, others.write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", others.read_gemma2, others.write_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", others.read_gemma3, others.write_gemma3),
    "phi3": Family("Phi3ForCausalLM", others.read_phi3, others.write_phi3, "phi3"),
    "olmo2": Family("Olmo2ForCausalLM", others.read_olmo2, others.write_olmo2),
    "granite": Family("GraniteForCausalLM", llama.read_granite, llama.write_granite),
    "smollm3": Family("SmolLM3ForCausalLM", llama.read_smollm3, llama.write_smollm3),
    "seed_oss": Family("SeedOssForCausalLM", llama.read_seed_oss, llama.write_seed_oss),
    "gpt_oss": Family("GptOssForCausalLM", others.read_gpt_oss, others.write_gpt_oss, "gpt_oss"),
    "cohere": Family("CohereForCausalLM", others.read_cohere, others.write_cohere),
    "cohere2": Family("Cohere2ForCausalLM", others.read_cohere2, others.write_cohere2),
}
# Plain Llamas under other names; they leave as "llama", which loads everywhere without their own code.
ALIASES = {
    "Yi": "llama",
    "yi": "llama",
    "deepseek_llm": "llama",
    "internlm2_llama": "llama",
    "llamafied_qwen": "llama",
    "aquila": "llama",
    "smollm2": "llama",
    "tinyllama": "llama",
    **wrappers.TEXT_ALIASES,
}


def family_of(raw: Mapping[str, Any], where: str = "config.json") -> str:
    """The key of `FAMILIES` for a config.json.

    Raises:
      ConfigError: the model type isn't known.
    """
    text = wrappers.text_config(raw)
    name = raw.get("model_type") if text is None else text["model_type"]
    name = ALIASES.get(name, name) if isinstance(name, str) else None
    if name not in FAMILIES:
        parts = [part for part in ("text_config", "vision_config", "audio_config") if raw.get(part) is not None]
        wraps = f" (a wrapper, with {', '.join(parts)})" if parts else ""
        inside = "" if text is None else f" around {text['model_type']!r}"
        raise ConfigError(
            f"{where}: model_type {raw.get('model_type')!r}{inside}{wraps} isn't supported; the closest that is, is "
            f"{closest(raw)!r}: docs/new_family.md says what adding one takes. Known are "
            f"{', '.join(sorted({*FAMILIES, *ALIASES}))}"
        )
    return name


def closest(raw: Mapping[str, Any]) -> str:
    """The family to start from for a model type that isn't known: a namesake, else a plain one with or without experts.

    Of several namesakes the one with most of these fields.
    """
    text = raw.get("text_config")
    raw = {**raw, **text} if isinstance(text, Mapping) else raw
    named, has_experts = _stem(raw.get("model_type")), any("expert" in name and raw[name] for name in raw)

    def likeness(name: str) -> tuple[int, float]:
        alike = difflib.SequenceMatcher(None, name, str(raw.get("model_type"))).ratio()
        return len({*reference.table()["models"][name]} & {*raw}), alike

    namesakes = [
        name
        for name in FAMILIES
        if _stem(name) == named and (has_experts or "num_experts_per_tok" not in reference.table()["models"][name])
    ]
    return max(namesakes, key=likeness, default="qwen3_moe" if has_experts else "llama")


def _stem(model_type: Any) -> str:
    return re.match(r"[a-z]*", str(model_type)).group().removeprefix("mini")


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """A parsed config.json (of transformers 4 or 5) as `ModelConfig`.

    Raises:
      ConfigError: naming the field that is missing, unknown or unsupported.
    """
    return read_fields(raw, where)[0]


def read_fields(raw: Mapping[str, Any], where: str = "config.json") -> tuple[ModelConfig, list[str]]:
    """`read_config`, and the names of the fields that neither this program nor transformers looks at."""
    family = FAMILIES[family_of(raw, where)]
    text = wrappers.text_config(raw)
    fields = Fields(raw, where) if text is None else Fields(text, f"{where}: text_config")
    quantization = fields.take("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if quantization is not None and method not in _DEQUANTISED:
        raise ConfigError(
            f"{where}: quantization_config ({method!r}): the weights are quantised in a form that isn't read, only "
            f"{', '.join(_DEQUANTISED)} are; use the original model, or a GGUF file of it"
        )
    try:
        config = family.read(fields)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: a field has the wrong type or value ({error})") from error
    fields.check_rest(config)
    return config, fields.ignored


def write_config(
    config: ModelConfig, *, dtype: str, like: Mapping[str, Any] | None = None, text_only: bool = False
) -> dict[str, Any]:
    """The config.json, as transformers 5 writes it and with what transformers 4 reads instead.

    Args:
      dtype: of the tensors written, "bfloat16".
      like: the config.json that the model came with: its family is kept, and so are its other fields (token ids,
        dropout ...) and its way of writing what hasn't changed. None: the first family that can express the config.
      text_only: of a wrapper, the language model's alone.

    Raises:
      ConfigError: no family (or not the one of `like`) can express this config.
    """
    text = None if like is None else wrappers.text_config(like)
    if text is not None:
        alone = write_config(config, dtype=dtype, like=text | {"model_type": family_of(like)})
        return alone if text_only else wrappers.wrap(like, alone)
    if like is None:
        name = _family_for(config)
        # unset, or transformers takes the family's own ids, which may lie beyond this vocabulary
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        forms = [FAMILIES[name].write(config) | tokens]
    else:
        name = family_of(like)
        forms = _forms_like(FAMILIES[name], config, like)
    for form in forms:
        form |= {"model_type": name, "architectures": [FAMILIES[name].architecture]}
        form |= {"dtype": dtype, "torch_dtype": dtype}
        if read_config(form) == config:
            return dict(sorted(form.items()))
    raise ConfigError(f"the model type {name!r} can't express this model's configuration; export it as another")


def _forms_like(family: Family, config: ModelConfig, like: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ways of writing a configuration: as `like` did what hasn't changed, else as the family does."""
    out, was = family.write(config), family.write(read_config(like))
    kept = {key: value for key, value in like.items() if key not in _DROPPED_ON_EXPORT}
    if "num_local_experts" in kept and "num_experts" in out and "num_experts" not in kept:
        kept["num_local_experts"] = out.pop("num_experts")
    same = {key for key in kept if key in out and key not in _REWRITTEN and out[key] == was.get(key)}
    unchanged = {key: value for key, value in kept.items() if key not in out or key in same}
    came = like.get("rope_scaling") or like.get("rope_parameters")
    ours = {key: rope.carry(came, out[key]) for key in ("rope_parameters", "rope_scaling") if out.get(key)}
    as_it_came = [] if like.get("rope_scaling") else [out | unchanged]
    return [*as_it_came, out | unchanged | ours, kept | out | ours]


def check_writable(config: ModelConfig, like: Mapping[str, Any], *, text_only: bool = False) -> None:
    """Tries `write_config`, for before a model is trained. Raises its `ConfigError`.

    Args:
      config: of what will be written; padded rows of the vocabulary don't count.
    """
    written = write_config(exported(config), dtype="float32", like=like, text_only=text_only)
    if read_config(written) != exported(config):
        raise ConfigError(f"the model type {like.get('model_type')!r} can't express this model's configuration")


def exported(config: ModelConfig) -> ModelConfig:
    """The configuration without rows that only pad the vocabulary."""
    return config if config.valid_vocab is None else config.replace(vocab_size=config.valid_vocab, valid_vocab=None)


def _family_for(config: ModelConfig) -> str:
    for name, family in FAMILIES.items():
        try:
            if read_config(family.write(config) | {"model_type": name}) == config:
                return name
        except (ConfigError, StopIteration, AttributeError, KeyError, TypeError):
            continue  # this family lacks a field, or has one too many
    raise ConfigError("no known model type can express this model's configuration, so it can't be exported")
