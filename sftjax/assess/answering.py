"""One model on all items: its answers, its loss on what was expected, and its distributions at some places."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sftjax import divergence, loading
from sftjax.assess.items import Item
from sftjax.data.encode import RowEncoder
from sftjax.data.types import RowError, Sample
from sftjax.generate.answer import Output
from sftjax.generate.sample import Generator
from sftjax.held_out import Evaluation
from sftjax.score import score_samples


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model made of N items.

    Attributes:
      outputs: for each, its answers, one a turn.
      nll: f64 [N] of the expected answers, in nats; tokens: i64 [N], 0 where none was expected or it can't be encoded.
      log_probabilities: f32 [n, V], see `divergence`.
    """

    outputs: list[list[Output]]
    nll: np.ndarray
    tokens: np.ndarray
    log_probabilities: np.ndarray

    @property
    def last(self) -> list[Output]:
        return [turns[-1] for turns in self.outputs]

    def evaluation(self, items: Sequence[Item]) -> Evaluation:
        """The losses as training has them, so that two models' can be compared."""
        names = sorted({item.source for item in items})
        keys = np.array([[names.index(item.source), item.index, 0] for item in items], np.int64)
        kept = self.tokens > 0
        return Evaluation(
            keys[kept],
            self.nll[kept],
            self.tokens[kept].astype(np.float64),
            self.tokens[kept],
            np.zeros(int(kept.sum()), np.int64),
            tuple(names),
        )


class Model:
    """A model that answers items.

    Args:
      completion: prompts are continued as texts, without a chat template.
    """

    def __init__(
        self,
        path: str,
        *,
        adapter: str | None = None,
        dtype: str = "float32",
        chat_template: str = "",
        batch_size: int = 32,
        completion: bool = False,
    ):
        self.path, self.adapter = path, adapter
        self.loaded = loading.load_model(path, adapter=adapter, dtype=dtype, chat_template=chat_template)
        self.completion = completion or self.loaded.tokenizer.renderer is None
        model = self.loaded
        self.generator = Generator(model.config, model.runtime, model.variables, model.tokenizer, batch_size=batch_size)

    def prompt(self, messages: Sequence[dict[str, Any]]) -> Any:
        if not self.completion:
            return list(messages)
        return "\n\n".join(str(message["content"]) for message in messages)

    def answer(self, items: Sequence[Item], **settings: Any) -> list[list[Output]]:
        """Answers all turns; settings as `Generator.generate` takes them."""
        conversations = [list(item.messages) for item in items]
        outputs: list[list[Output]] = [[] for _ in items]
        waiting = list(range(len(items)))
        while waiting:
            given = self.generator.generate([self.prompt(conversations[number]) for number in waiting], **settings)
            for number, output in zip(waiting, given, strict=True):
                outputs[number].append(output)
                turn = len(outputs[number]) - 1
                if turn < len(items[number].more_turns):
                    conversations[number] += [
                        {"role": "assistant", "content": output.text},
                        {"role": "user", "content": items[number].more_turns[turn]},
                    ]
            waiting = [number for number in waiting if len(outputs[number]) <= len(items[number].more_turns)]
        return outputs

    def sample_of(self, item: Item, answer: str | None) -> Sample | None:
        """The item with an answer, as training would have it; None where there is none or it can't be encoded."""
        if not answer or not answer.strip():
            return None
        if self.completion:
            row = {"prompt": self.prompt(item.messages), "completion": answer}
        else:
            row = {"messages": [*item.messages, {"role": "assistant", "content": answer}]}
        try:
            made = RowEncoder(self.loaded.tokenizer, train_on="last")(row, item.index)
        except RowError:
            return None
        return made[-1]

    def assess(self, items: Sequence[Item], samples: Sequence[Sample | None], *, kl_tokens: int, **settings) -> Answers:
        """Everything about the items.

        Args:
          samples: the items with the answers whose loss is wanted, by this model's `sample_of`.
        """
        model, known = self.loaded, [sample for sample in samples if sample is not None]
        nll, tokens = np.zeros(len(items)), np.zeros(len(items), np.int64)
        for _, line in score_samples(model.config, model.runtime, model.variables, known):
            nll[line["index"]], tokens[line["index"]] = line["nll"], line["num_trained_tokens"]
        outputs = self.answer(items, **settings)
        return Answers(outputs, nll, tokens, self.log_probabilities(known, kl_tokens))

    def log_probabilities(self, samples: Sequence[Sample], tokens: int) -> np.ndarray:
        model = self.loaded
        return divergence.log_probabilities(model.config, model.runtime, model.variables, samples, tokens)
