"""Multimodal models whose language model is one of the families: text goes in and out, the rest is left untouched.

The wrapper's `text_config` says what differs from the defaults of the text model's class in transformers. Its tensors
lie under a prefix of the wrapper's; everything else (vision tower, projector) is carried along byte for byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from sftjax.weights import reference


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """How one `model_type` holds its language model.

    Attributes:
      text: its model type where `text_config` doesn't say.
      tied: whether the head is the embedding where nothing says.
      flat: whether its first files have the text model's fields beside `vision_config`.
    """

    text: str
    tied: bool = False
    flat: bool = False


WRAPPERS = {
    "gemma3": Wrapper("gemma3_text", tied=True),
    "mistral3": Wrapper("mistral"),
    "llava": Wrapper("llama"),
    "llava_next": Wrapper("llama"),
    "idefics3": Wrapper("llama"),
    "smolvlm": Wrapper("llama"),
    "aya_vision": Wrapper("cohere2", tied=True),
    "internvl": Wrapper("qwen2"),
    "qwen2_vl": Wrapper("qwen2_vl_text", flat=True),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text", flat=True),
    "qwen3_vl": Wrapper("qwen3_vl_text"),
}
# Text models of wrappers that are a family under another name: on text, their positions in three directions are one.
TEXT_ALIASES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_PLACES = (  # of the language model's tensors, and of its head's
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.model.", "lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.text_model.", "lm_head."),
    ("model.", "lm_head."),
)
_TOWERS = ("vision_config", "audio_config")


def text_config(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The language model's config.json out of a wrapper's, with the defaults of its class; None: no wrapper."""
    wrapper = WRAPPERS.get(str(raw.get("model_type")))
    if wrapper is None:
        return None
    inside = raw.get("text_config")
    if not isinstance(inside, Mapping) and not wrapper.flat:
        inside = {}
    elif not isinstance(inside, Mapping):
        inside = {name: value for name, value in raw.items() if name not in (*_TOWERS, "model_type", "architectures")}
    text = dict(inside)
    if text.get("model_type") in (None, raw["model_type"]):
        text["model_type"] = wrapper.text
    defaults = reference.declared(text["model_type"])
    tied = raw.get("tie_word_embeddings")
    tied = inside.get("tie_word_embeddings", wrapper.tied) if tied is None else tied
    text = defaults | text | {"tie_word_embeddings": tied}
    for name in ("rope_scaling", "rope_parameters"):
        rope = text.get(name)
        if isinstance(rope, Mapping) and "mrope" in (rope.get("type"), rope.get("rope_type")):
            text[name] = {**rope, "rope_type": "default", "type": "default"}
    for name in ("quantization_config", "dtype", "torch_dtype"):
        if name in raw:
            text.setdefault(name, raw[name])
    return text


def wrap(raw: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapper's config.json with another language model in it, as `families.write_config` wrote that."""
    dropped = ("quantization_config", "auto_map", "_name_or_path")
    out = {name: value for name, value in raw.items() if name not in dropped}
    inside = raw.get("text_config")
    if isinstance(inside, Mapping) or not WRAPPERS[raw["model_type"]].flat:
        inside = inside or {}
        kept = {"model_type": inside.get("model_type", WRAPPERS[raw["model_type"]].text)}
        kept |= {"architectures": inside["architectures"]} if "architectures" in inside else {}
        names = {name: value for name, value in written.items() if name != "architectures"}
        out["text_config"] = names | kept
        if "vocab_size" in raw:
            out["vocab_size"] = written["vocab_size"]
    else:
        out |= {name: value for name, value in written.items() if name not in ("model_type", "architectures")}
        ropes = [raw.get("rope_scaling"), raw.get("rope_parameters")]
        if any(isinstance(rope, Mapping) and "mrope_section" in rope for rope in ropes):  # the class needs to see it
            out |= {name: raw[name] for name in ("rope_scaling", "rope_parameters") if name in raw}
    out["tie_word_embeddings"] = written["tie_word_embeddings"]
    return out | {name: written[name] for name in ("dtype", "torch_dtype")}


@dataclasses.dataclass(frozen=True)
class Names:
    """Where a file keeps the language model's tensors."""

    model: str = "model."
    head: str = "lm_head."

    def inside(self, stored: str) -> str | None:
        """The text model's own name of a tensor; None for one of the rest."""
        for prefix, own in ((self.head, "lm_head."), (self.model, "model.")):
            if stored.startswith(prefix):
                return own + stored.removeprefix(prefix)
        return None

    def stored(self, inside: str) -> str:
        """The inverse of `inside`."""
        for prefix, own in ((self.head, "lm_head."), (self.model, "model.")):
            if inside.startswith(own):
                return prefix + inside.removeprefix(own)
        return inside


PLAIN = Names()


def find_names(stored: Iterable[str]) -> Names:
    """The place where the language model's embedding is."""
    stored = set(stored)
    return next((Names(*place) for place in _PLACES if f"{place[0]}embed_tokens.weight" in stored), PLAIN)
