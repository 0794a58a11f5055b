"""A config.json being read, with every field accounted for.

A field is read by its family, or known not to change what the model computes, or refused by name: a setting that is
silently ignored trains another model than the one that was downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sftjax.errors import ConfigError

# Fields that don't change what the model computes. Dropout is the run's business, not the checkpoint's.
_HARMLESS = re.compile(
    r"_.*(?<!_internal)|architectures|dtype|torch_dtype|transformers_version|transformers\.js_config|auto_map"
    r"|initializer_range|use_cache|cache_implementation|pretraining_tp|tokenizer_class|unsloth.*|is_llama_config"
    r"|\w+_token_id|attention_dropout|hidden_dropout|residual_dropout|embd_pdrop|resid_pdrop|output_router_logits"
    r"|output_attentions|output_hidden_states|return_dict|torchscript|use_bfloat16|is_decoder|id2label|label2id"
    r"|finetuning_task|task_specific_params|problem_type|name_or_path|num_labels|chunk_size_feed_forward"
    r"|max_length|min_length|do_sample|temperature|top_k|top_p|num_beams|repetition_penalty|model_name|license"
    r"|max_sequence_length|max_seq_len|seq_length|max_window_layers|model_max_length|router_aux_loss_coef"
    r"|initial_context_length|experts_per_token"
)
# Fields that are harmless at one value only (null, false and empty always are).
_HARMLESS_AT = {"router_jitter_noise": 0.0, "full_attn_mod": 1, "interpolate_factor": 1, "swiglu_alpha": 1.702}
_REFUSED = {
    "vision_config": "the model reads images, and only text models are supported",
    "audio_config": "the model reads audio, and only text models are supported",
    "text_config": "its language model is wrapped in a multimodal one",
    "model_file": "code that comes with a checkpoint is never run",
}


class Fields:
    """The fields of one config.json; remembers which were looked at."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = dict(raw), where
        self._seen = {"model_type"}
        for name, reason in _REFUSED.items():
            if self.raw.get(name) is not None:
                raise ConfigError(f"{where}: {name}: {reason}")

    def take(self, name: str, default: Any = None) -> Any:
        """The field; `default` where it is absent or null."""
        self._seen.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """The field, which must be a number of at least 1."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self.where}: {name} is {value!r}, it must be a positive whole number")
        return value

    def check_rest(self) -> None:
        """Refuses what nobody looked at and isn't known to be harmless."""
        for name, value in self.raw.items():
            if name in self._seen or value is None or value is False or value in ("", [], {}):
                continue
            if name in _HARMLESS_AT:
                if value != _HARMLESS_AT[name]:
                    raise ConfigError(f"{self.where}: {name}={value!r} isn't supported, only {_HARMLESS_AT[name]!r}")
            elif not _HARMLESS.fullmatch(name):
                raise ConfigError(
                    f"{self.where}: the field {name}={short(value)} isn't understood and may change the model; "
                    f"if it doesn't, remove it from config.json"
                )


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
