"""Tiny tokenizers of each kind, trained in the test: no download, and small enough to see through."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    # Code of an earlier day: another text would make other tokenizers, and with them other tiny models.
    *(Path(__file__).parent / "corpus.txt").read_text().split("\f"),
    "The capital of France is Paris. How are you today? I am fine, thank you.\n" * 20,
    "user assistant system Hello there, what is it? Yes. No. Four.\n" * 20,
    "你好，世界。今天天气怎么样？ 東京は大きな都市です。안녕하세요 세계\n" * 10,
]


@cache
def _byte_level(kind: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator([text.replace("\t", "    ") for text in CORPUS], trainer)
    if kind == "thinking":
        names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return tokenizer.to_str()


def byte_level(folder: Path, *, template: str | None = CHATML, kind: str = "", **config) -> Path:
    """Byte-level BPE with ChatML's tokens, as Qwen and SmolLM2 have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_byte_level(kind))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        **config,
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


@cache
def _sentencepiece(kind: str, options: tuple) -> bytes:
    import io

    from sentencepiece import SentencePieceTrainer

    output = io.BytesIO()
    lines = [line for text in CORPUS for line in text.split("\n") if line]
    settings = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=output,
        model_type=kind,
        vocab_size=900,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**settings, **dict(options)},
    )
    return output.getvalue()


def sentencepiece(folder: Path, kind: str = "bpe", **options) -> Path:
    """A folder with only tokenizer.model, as Llama-2 has it (byte fallback, dummy prefix)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sentencepiece(kind, tuple(sorted(options.items()))))
    return folder


def write_files(folder: Path, content: dict[str, bytes]) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """user, assistant, user, ... with these contents."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def drawn(tokenizer, sample) -> str:
    """A sample as text with its trained runs in [brackets]."""
    parts, previous, run = [], None, []
    for number, weight in [*zip(sample.tokens.tolist(), sample.weights.tolist(), strict=True), (None, None)]:
        if weight != previous and run:
            text = tokenizer.decode(run)
            parts.append(f"[{text}]" if previous else text)
            run = []
        previous = weight
        run.append(number)
    return "".join(parts)
