"""A config.json being read, with every field accounted for; transformers is the reference.

A field is read by its family, or it is one of three kinds:
  inert: changes nothing that the model computes, at any value. `_INERT` lists those that transformers looks at all the
    same; what nobody there looks at (`weights.reference`) is inert too, and is named in `Fields.ignored`;
  inert at a value: at transformers' own default, or at the value in `_INERT_AT` that says what the model is anyway;
  anything else is refused by name: a setting that is silently ignored trains another model than the one downloaded.
`False`, null and empty values are values like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sftjax.errors import ConfigError
from sftjax.models.config import ModelConfig
from sftjax.weights import reference

# Dropout is the run's business, not the checkpoint's; token ids and sampling belong to the tokenizer and to generation.
_INERT = re.compile(
    r"_.*(?<!_internal)|architectures|dtype|torch_dtype|transformers_version|transformers\.js_config|auto_map"
    r"|initializer_range|use_cache|cache_implementation|pretraining_tp|tokenizer_class|unsloth.*|is_llama_config"
    r"|\w+_token_id|attention_dropout|hidden_dropout|residual_dropout|embd_pdrop|resid_pdrop|output_router_logits"
    r"|output_attentions|output_hidden_states|return_dict|torchscript|use_bfloat16|is_decoder|id2label|label2id"
    r"|finetuning_task|task_specific_params|problem_type|name_or_path|num_labels|classifier_dropout"
    r"|chunk_size_feed_forward|max_length|min_length|do_sample|temperature|top_k|top_p|num_beams|repetition_penalty"
    r"|model_name|license|max_sequence_length|max_seq_len|seq_length|model_max_length|router_aux_loss_coef"
    r"|initial_context_length|experts_per_token|gradient_checkpointing"
)
# Values that say what the model is anyway; at another one the field names another architecture, whether transformers
# looks at it or not.
_INERT_AT: dict[str, Callable[[ModelConfig], tuple]] = {
    # looked at by transformers
    "router_jitter_noise": lambda _: (0.0,),
    "swiglu_alpha": lambda _: (1.702,),
    "per_layer_config": lambda _: ({},),
    "sub_configs": lambda _: ({},),
    "is_causal": lambda _: (True,),
    "use_bidirectional_attention": lambda _: (False, None),
    # not looked at for the families here
    "alibi": lambda _: (False,),
    "attn_output_gate": lambda _: (False,),
    "full_attn_mod": lambda _: (1,),
    "interpolate_factor": lambda _: (1,),
    "layer_switch": lambda config: (_period(config),),
    "moe_layer_freq": lambda _: (1,),
    "n_shared_experts": lambda _: (0, None),
    "num_shared_expert": lambda _: (0, None),
    "order_of_interleaved_layers": lambda _: ("local_attn_first",),
    "position_embedding_type": lambda config: ("rope_gptj",) if _interleaved(config) else ("rope", "rotary"),
    "qk_layer_norms": lambda config: (config.qk_norm != "none",),
    "qk_layernorm": lambda config: (config.qk_norm != "none",),
    "qk_norm": lambda config: (config.qk_norm != "none",),
    "rotary_pct": lambda _: (1.0,),
    "scoring_func": lambda _: ("softmax",),
    "shared_expert_intermediate_size": lambda _: (0, None),
    "shared_intermediate_size": lambda _: (0, None),
    "use_alibi": lambda _: (False,),
    "use_cla": lambda _: (False,),
    "use_embedding_sharing": lambda config: (config.tie_word_embeddings,),
    "use_gated_activation": lambda _: (True,),
    "use_mixed_mlp_moe": lambda _: (False,),
    "use_mrope": lambda _: (False,),
    "use_parallel_block": lambda config: (config.parallel_block,),
    "use_qk_norm": lambda config: (config.qk_norm != "none",),
    "use_resampler": lambda _: (False,),
}
_REFUSED = {
    "vision_config": "the model reads images, and only text models are supported",
    "audio_config": "the model reads audio, and only text models are supported",
    "text_config": "its language model is wrapped in a multimodal one",
    "model_file": "code that comes with a checkpoint is never run",
    "quantization": "the weights are quantised by MLX; use the original model",
}


class Fields:
    """The fields of one config.json; remembers which were looked at.

    Attributes:
      ignored: names of fields that neither this program nor transformers looks at, as far as found out.
    """

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where, self.ignored = dict(raw), where, []
        self._seen, self._known = {"model_type"}, reference.known(self.raw.get("model_type"))
        for name, reason in _REFUSED.items():
            if self.raw.get(name) is not None:
                raise ConfigError(f"{where}: {name}: {reason}")

    def take(self, name: str, default: Any = None) -> Any:
        """The field; `default` where it is absent or null.

        Raises:
          ConfigError: it is of another kind than transformers' default: a number in place of a flag, null too.
        """
        self._seen.add(name)
        value = self.raw.get(name)
        usual = (self._known or {}).get(name)
        if name in self.raw and not _same_kind(value, usual):
            raise ConfigError(f"{self.where}: {name} is {short(value)}, it must be of the kind of {usual!r}")
        return default if value is None else value

    def need(self, name: str, default: int | None = None) -> int:
        """The field, which must be a number of at least 1; `default` where it is absent or null, if that is given."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.where}: {name} is {value!r}, it must be a positive whole number")
        return value

    def check_rest(self, config: ModelConfig) -> None:
        """Sorts what the family didn't look at into what changes nothing and what is refused.

        Args:
          config: what the family made of the fields it knows.

        Raises:
          ConfigError: naming a field that may change the model.
        """
        known = self._known
        for name in sorted(set(self.raw) - self._seen):
            value = self.raw[name]
            if _INERT.fullmatch(name):
                continue
            if name in _INERT_AT:
                allowed = _INERT_AT[name](config)
                if value not in allowed:
                    raise ConfigError(f"{self.where}: {name}={short(value)} isn't supported, only {allowed[0]!r}")
            elif known is None and value is not None:
                raise ConfigError(
                    f"{self.where}: the field {name}={short(value)} isn't understood, and transformers has no class "
                    f"for the model type {self.raw.get('model_type')!r} that could tell whether it changes the model"
                )
            elif known is None or name not in known:
                self.ignored.append(name)
            elif not _is_default(value, known[name]):
                raise ConfigError(
                    f"{self.where}: {name}={short(value)} is a setting that transformers reads for the model type "
                    f"{self.raw.get('model_type')!r}, and that isn't supported here"
                )


def _same_kind(value: Any, usual: Any) -> bool:
    if isinstance(usual, bool):
        return isinstance(value, bool)
    if value is None or not isinstance(usual, (int, float, str)):
        return True
    kinds = str if isinstance(usual, str) else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_default(value: Any, default: Any) -> bool:
    return value is None if default == reference.UNKNOWN else value == default


def _period(config: ModelConfig) -> int:
    """Each how-many-th layer is a full one, where the others slide."""
    full = [number for number, layer in enumerate(config.layers, 1) if layer.window is None]
    return full[0] if full else 0


def _interleaved(config: ModelConfig) -> bool:
    return any(layer.rope is not None and layer.rope.interleaved for layer in config.layers)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
