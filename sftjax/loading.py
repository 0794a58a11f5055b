"""From a path to something that runs: configuration, tokenizer, weights, adapter. Used by training and every tool."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sftjax.data import tokenizer as tokenizers
from sftjax.kernels import nf4
from sftjax.models import decoder
from sftjax.models.config import ModelConfig
from sftjax.parallel import mesh as meshes
from sftjax.parallel import partition
from sftjax.phases import phase
from sftjax.weights import bottleneck_format, gguf, hf, peft_format, vocab
from sftjax.weights.files import Folder


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose files were found and understood; no weight has been read.

    Attributes:
      config: the model's own, whatever the tokenizer has.
    """

    files: hf.ModelFiles
    config: ModelConfig
    tokenizer: tokenizers.Tokenizer

    @property
    def new_token_ids(self) -> tuple[int, ...]:
        """Tokens that a template or the settings add: the model has no row for them, or one that was never trained."""
        return tuple(self.tokenizer.hf.convert_tokens_to_ids(name) for name in self.tokenizer.added_tokens)

    def fingerprint(self) -> str:
        """Hex digest that tells these weights from others."""
        return hf.fingerprint(self.files)


def open_model(
    path: str,
    *,
    chat_template: str = "",
    end_of_turn: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
    add_tokens: Sequence[str] = (),
    adapter: str | None = None,
) -> Opened:
    """Reads configuration and tokenizer.

    Args:
      chat_template, end_of_turn, template_kwargs, add_tokens: see `tokenizer.load`; empty: the model's own.
      adapter: PEFT folder, whose tokenizer is taken where it has one: its template may have added tokens.

    Raises:
      ConfigError: not a model, or not understood.
    """
    files = hf.open_model(path)
    with contextlib.nullcontext(adapter) if has_tokenizer(adapter) else _tokenizer_folder(files) as folder:
        tokenizer = tokenizers.load(
            folder,
            chat_template=chat_template or None,
            end_of_turn=end_of_turn or None,
            template_kwargs=template_kwargs,
            add_tokens=add_tokens,
        )
    rows = files.config.vocab_size
    if adapter is not None and not bottleneck_format.is_bottleneck(adapter):
        rows = max(rows, peft_format.vocab_rows(adapter) or 0)
    if not tokenizer.added_tokens:
        tokenizer.fit_rows(rows)
    return Opened(files, files.config, tokenizer)


def has_tokenizer(adapter: str | None) -> bool:
    """Whether an adapter's folder has a tokenizer beside the adapter."""
    return adapter is not None and "tokenizer_config.json" in Folder(adapter).names()


@contextlib.contextmanager
def _tokenizer_folder(files: hf.ModelFiles) -> Iterator[str]:
    if not files.is_gguf:
        yield files.path
        return
    with tempfile.TemporaryDirectory(prefix="sftjax-tokenizer-") as folder:
        for name, content in gguf.tokenizer_files(files.path).items():
            Path(folder, name).parent.mkdir(exist_ok=True)
            Path(folder, name).write_bytes(content)
        yield folder


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to run."""

    opened: Opened
    config: ModelConfig
    runtime: decoder.Runtime
    variables: dict[str, Any]

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.opened.tokenizer


def load_model(
    path: str,
    *,
    adapter: str | None = None,
    dtype: str = "float32",
    chat_template: str = "",
    end_of_turn: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a model for inference: weights and arithmetic in `dtype`.

    Args:
      path: HF folder, .gguf file or hub id.
      adapter: PEFT folder.
      chat_template, end_of_turn, template_kwargs: see `open_model`.
      mesh: None: all devices, weights sharded over them.
    """
    opened = open_model(
        path,
        chat_template=chat_template,
        end_of_turn=end_of_turn,
        template_kwargs=template_kwargs,
        adapter=adapter,
    )
    mesh = mesh or meshes.make({"data": 1, "fsdp": -1, "tensor": 1, "context": 1, "expert": 1})
    abstract = {"params": decoder.abstract_params(opened.config, dtype)}
    shardings = partition.shardings(abstract, mesh)
    with phase("reading the weights"):
        config, params = opened.config, hf.load_params(opened.files, opened.config, dtype, shardings["params"])
    base = Model(opened, config, decoder.Runtime(compute_dtype=dtype, remat="none", mesh=mesh), {"params": params})
    return _beside(base, opened, adapter) if adapter else base


def load_adapter(base: Model, adapter: str) -> Model:
    """A model with an adapter beside it. The weights are the same arrays, unless the vocabulary grows."""
    return _beside(base, open_model(base.opened.files.path, adapter=adapter), adapter)


def _beside(base: Model, opened: Opened, adapter: str) -> Model:
    if bottleneck_format.is_bottleneck(adapter):
        leaves, spec = bottleneck_format.load_adapter(adapter, base.config)
        leaves = jax.device_put(leaves, partition.shardings({"adapter": leaves}, base.runtime.mesh)["adapter"])
        runtime = base.runtime.replace(bottleneck_activation=spec.bottleneck_activation)
        return Model(opened, base.config, runtime, base.variables | {"adapter": leaves})
    layout = opened.files.family.layout
    config, params, leaves = with_adapter(base.config, base.variables["params"], adapter, layout)
    placed = {"params": params, "adapter": leaves}
    variables = jax.device_put(placed, partition.shardings(placed, base.runtime.mesh))
    return Model(opened, config, base.runtime, variables)


def load_base(
    opened: Opened, config: ModelConfig, dtype: Any, mesh: Mesh | None, *, quantization: str = "none"
) -> dict[str, Any]:
    """The weights to train, or to train beside: "params", and with a quantised base "quant".

    Args:
      config: of what is trained; where its vocabulary is larger than the model's own, rows for new tokens are added;
        where it isn't tied and the model is, the head becomes a weight of its own.
      dtype: of the parameters; projections are quantised from this, one at a time, while they are read.
      mesh: devices to spread over; None: the default device.
      quantization: "none", "nf4" or "int8".
    """
    own = opened.config
    abstract = decoder.abstract_params(own, dtype)
    shardings = None if mesh is None else partition.shardings({"params": abstract}, mesh)["params"]
    if quantization == "none":
        variables = {"params": hf.load_params(opened.files, own, dtype, shardings)}
    else:
        _, quant = nf4.abstract_split(abstract, quantization, nf4.is_projection, given_nf4(opened, quantization))
        transform = nf4.make_transform(quantization, nf4.is_projection)
        placed = None if mesh is None else partition.shardings({"quant": quant}, mesh)["quant"]
        keep = quantization == "nf4"
        params, quant = hf.load_params(opened.files, own, dtype, shardings, transform, placed, keep_nf4=keep)
        variables = {"params": params, "quant": quant}
    if config.vocab_size != own.vocab_size:
        size = config.valid_vocab or config.vocab_size
        variables["params"], _ = vocab.resize_vocab(variables["params"], own, size, pad_multiple=config.vocab_size)
    spare = [token for token in opened.new_token_ids if token < own.vocab_size]
    if spare:
        variables["params"] = vocab.start_at_mean(variables["params"], spare)
    if own.tie_word_embeddings and not config.tie_word_embeddings:
        variables["params"] = vocab.untie(variables["params"])
    return variables


def given_nf4(opened: Opened, quantization: str) -> dict[str, str]:
    """The forms (see `nf4.abstract_split`) of weights that an NF4 run takes from its checkpoint as they are."""
    return hf.given_nf4(opened.files) if quantization == "nf4" else {}


def with_adapter(config: ModelConfig, params: Any, folder: str, layout: str) -> tuple[ModelConfig, Any, Any]:
    """A PEFT folder read for a model: with more tokens, or a head of its own, where the adapter was trained so.

    Args:
      layout: how the model's checkpoint names its tensors.

    Returns:
      (the model's configuration, its parameters, the adapter's leaves).
    """
    rows = peft_format.vocab_rows(folder)
    if rows is not None and rows > config.vocab_size:
        params, config = vocab.resize_vocab(params, config, rows)
    leaves, _ = peft_format.load_adapter(folder, config, layout=layout)
    fitted = peft_format.fitted_config(folder, config)
    if fitted != config:
        params = vocab.untie(params)
    return fitted, params, leaves


def digest(*parts: str) -> str:
    """A short hex digest of several texts, in order."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:32]
