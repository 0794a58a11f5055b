"""lm-evaluation-harness (package lm-eval, extra `eval`) on a model of ours, without torch.

`SftjaxLM` is what the harness calls a model: log-likelihoods of continuations, of whole texts, and generation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    import lm_eval
    import lm_eval.tasks
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
except ImportError as missing:
    raise ImportError("lm-evaluation-harness is not installed: pip install lm-eval") from missing

from sftjax import loading
from sftjax.assess import recorded
from sftjax.errors import ConfigError, DataError
from sftjax.generate.sample import Generator
from sftjax.models import decoder
from sftjax.score import TOKENS_PER_BATCH, batches
from sftjax.utils import storage

Request = tuple[tuple[str, str], list[int], list[int]]


class SftjaxLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model=SftjaxLM(...))`.

    Args:
      max_length: longest input in tokens; at most what the model was made for. Longer contexts lose their beginning.
      max_gen_toks: tokens of an answer, where the task doesn't say.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        *,
        dtype: str = "float32",
        chat_template: str = "",
        batch_size: int = 32,
        max_length: int = 4096,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        self._model = loading.load_model(model, adapter=adapter, dtype=dtype, chat_template=chat_template)
        loaded = self._model
        self._ours = loaded.tokenizer
        self._generator = Generator(
            loaded.config, loaded.runtime, loaded.variables, loaded.tokenizer, batch_size=batch_size
        )
        self.max_length = min(max_length, loaded.config.max_position)
        self.max_gen_toks = max_gen_toks
        self._figures = jax.jit(self._token_figures)

    # --- what the harness asks of a model's tokenizer ---

    @property
    def eot_token_id(self) -> int:
        return self._ours.stop_ids[0] if self._ours.eos_id is None else self._ours.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on, by the harness's rule: BOS, else EOS."""
        return self.eot_token_id if self._ours.bos_id is None else self._ours.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._ours.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids; with what the tokenizer puts in front (a BOS, mostly) unless the text has it, or it isn't wanted."""
        ids, first = [int(one) for one in self._ours.encode(string)], list(self._ours.prefix_ids)
        if (problem := self._ours.no_row(ids)) is not None:
            raise DataError(f"{string[:80]!r}: {problem}")
        if add_special_tokens is False or (add_special_tokens is None and ids[: len(first)] == first):
            return ids
        return first + ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._ours.template.text if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        renderer = self._ours.require_template()
        if add_generation_prompt or chat_history[-1]["role"] != "assistant":
            return renderer.render(chat_history, generation=add_generation_prompt)
        # an answer that is begun and to be continued
        return renderer.render(chat_history[:-1], generation=True) + chat_history[-1]["content"]

    # --- log-likelihoods ---

    def _token_figures(self, variables, tokens, targets, positions, segments):
        config, runtime = self._model.config, self._model.runtime
        hidden, _ = decoder.hidden_states(config, runtime, variables, tokens, positions, segments)
        ones = jnp.ones(tokens.shape, jnp.float32)
        aux = decoder.token_loss(config, runtime, variables, hidden, targets, ones)[1]
        return aux["nll"], aux["correct"]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """For each, the log-probability of the continuation, and whether greedy decoding would give it."""
        pairs = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            pairs.append((ids, min(len(continuation), len(ids) - 1)))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for chosen, length in batches([len(ids) - 1 for ids, _ in pairs]):
            shape = (max(1, TOKENS_PER_BATCH // length), length)
            tokens, targets, segments = (
                np.zeros(shape, np.int32),
                np.zeros(shape, np.int32),
                np.full(shape, 2, np.int32),
            )
            positions = np.zeros(shape, np.int32)
            for row, number in enumerate(chosen):
                ids = pairs[number][0]
                count = len(ids) - 1
                tokens[row, :count], targets[row, :count], segments[row, :count] = ids[:-1], ids[1:], 1
                positions[row, :count], positions[row, count:] = np.arange(count), np.arange(length - count)
            nll, correct = jax.device_get(self._figures(self._model.variables, tokens, targets, positions, segments))
            for row, number in enumerate(chosen):
                ids, count = pairs[number]
                end = len(ids) - 1
                part = slice(end - count, end)
                results[number] = (-float(np.sum(nll[row, part], dtype=np.float64)), bool(np.all(correct[row, part])))
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text; long ones in windows that overlap by nothing, each after a token.

        As in the harness, what the tokenizer puts in front of a text is a part of it, behind the prefix token.
        """
        windows: list[Request] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = utils.make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of the task's `until` strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for key, numbers in groups.items():
            settings = generation_settings(json.loads(key), self.max_gen_toks)
            room = max(1, self.max_length - settings["max_new_tokens"])
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            for number, output in zip(numbers, self._generator.generate(prompts, **settings), strict=True):
                texts[number] = output.text
                self.cache_hook.add_partial("generate_until", requests[number].args, output.text)
        return texts


def generation_settings(wanted: dict[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """The harness's generation settings (names of transformers') as `Generator.generate` takes them.

    Raises:
      ConfigError: one that would change the answers and isn't understood.
    """
    wanted = dict(wanted)
    until = wanted.pop("until", None) or []
    settings: dict[str, Any] = {"stop": [until] if isinstance(until, str) else [one for one in until if one]}
    limits = [wanted.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    settings["max_new_tokens"] = next((int(limit) for limit in limits if limit), max_gen_toks)
    temperature = float(wanted.pop("temperature", 0.0) or 0.0)
    sampled = wanted.pop("do_sample", temperature > 0)
    settings["temperature"] = (temperature or 1.0) if sampled else 0.0
    for name in ("top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        if wanted.get(name) is not None:
            settings[name] = wanted[name]
        wanted.pop(name, None)
    if wanted:
        raise ConfigError(f"lm-eval: generation settings {sorted(wanted)} of the task aren't understood")
    return settings


def run(
    tasks: Sequence[str],
    out: str,
    *,
    model: str = "",
    adapter: str | None = None,
    base: str | None = None,
    run_folder: str = "",
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    allow_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Runs tasks on a model, and on its base. See `tools/harness.py`.

    Returns:
      {"model": {task: figures}, "base": the same, "tasks": versions}.
    """
    if run_folder:
        model, adapter, base = recorded.models_of(run_folder)
    manager = _manager(tasks, include_path)
    results: dict[str, Any] = {}
    with storage.whole_file(out) as file:
        for name, which in (("base", (base, None)), ("model", (model, adapter))):
            if not which[0]:
                continue
            found = lm_eval.simple_evaluate(
                model=SftjaxLM(*which, **options),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                confirm_run_unsafe_code=allow_code,
                log_samples=False,
            )
            print(f"{name}: {which[0]}{f' with {which[1]}' if which[1] else ''}\n{utils.make_table(found)}")
            results[name] = found["results"]
            results["versions"] = found["versions"]
        file.write(json.dumps(results, indent=2, default=str).encode() + b"\n")
    if run_folder:
        rows = recorded.of_harness(results.get("base"), results["model"])
        recorded.record(run_folder, "lm-evaluation-harness", rows)
    return results


def _manager(tasks: Sequence[str], include_path: str | None):
    """Knows the tasks; indexing the harness's own takes a while, so only if one of them is wanted."""
    if include_path:
        own = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = lm_eval.tasks.TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"lm-eval knows no task {', '.join(unknown)}; see `lm_eval ls tasks`")
    return manager
