"""Evaluates a model by what it writes: answers prompts from files, scores the answers, compares them with a base's.

    python tools/evaluate.py --model MODEL --base BASE --data test.jsonl --scorer numeric --out answers.jsonl
    python tools/evaluate.py --run runs/quickstart --data test.jsonl --scorer gsm8k --out answers.jsonl

Rows have a question (messages, prompt, question, instruction + input, turns) and mostly an expected answer (the last
assistant message, expected, answer, target, response, output, completion). Files of GSM8K, IFEval, HumanEval, MBPP,
AlpacaEval, MT-Bench and reasoning-gym are taken as they are.

--out gets one JSON line a row, in their order:
  index, source              number over all files; the row's `source`, or its file's name
  instruction, expected      the question in one text; the right answer or null
  generated                  the answer (of the last turn; all of them in `turns` where there are several)
  finish_reason, num_tokens  "stop" or "length"; tokens, the stop token included
  mean_logprob               of the answer's tokens, under the model
  expected_nll, expected_tokens    loss of the expected answer in nats, over so many tokens; null and 0 without one
  scores                     {scorer: number}
  base_generated, base_...   the same of the base, with --base
  judge                      {"score": 1 won, 0.5, 0 lost; "said": with ours first, with ours second}, with --judge
Beside it NAME.summary.json has {"data", "rows", "settings", "model", "base", "difference", "kl_to_base", "judge",
"contradictions"}; "model" and "base" have {"path", "adapter", "loss": {"all" or source: {"loss", "perplexity",
"tokens", "rows"}}, "scores": {scorer: {"mean", "low", "high"}}, "answers": {"stop_rate", "mean_tokens", "mean_words",
"empty", "repeated_4grams", "commonest_opening", "commonest_opening_share", "distinct_1", "distinct_2"}}. Intervals are
95 %, from a bootstrap over rows. `kl_to_base` is KL(base || model), in nats, at the expected answers' tokens.
--contradictions FILE lists rows whose answer contradicts what the base answers with confidence: {"index", "source",
"instruction", "expected", "base_answer", "confidence", "expected_mean_logprob"}.

Scorers: exact, normalized, contains, choice, numeric[:TOLERANCE], gsm8k, regex[:PATTERN], json[:fenced],
json_schema[:FILE], code_fences, length:LOW-HIGH[words|chars|sentences], ifeval, ifeval_loose, ifeval_instructions,
tests[:SECONDS], reasoning_gym[:TASK], FILE.py:FUNCTION (takes row and answer, gives a number).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import ConfigError, exit_with_message


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--adapter", help="PEFT adapter folder")
    parser.add_argument("--base", help="model to compare with (without an adapter)")
    parser.add_argument("--run", help="a finished run: gives model, adapter and base, and its report gets the figures")
    parser.add_argument("--data", required=True, nargs="+", help="files of rows, or any source a config takes")
    parser.add_argument("--out", required=True, help="JSONL to write")
    parser.add_argument("--scorer", action="append", default=[], help="see above; may be given several times")
    parser.add_argument("--allow_code", action="store_true", help="run code that the model wrote (scorer tests)")
    parser.add_argument("--limit", type=int, help="rows of each file")
    parser.add_argument("--system", default="", help="system message for conversations without one")
    parser.add_argument("--completion", action="store_true", help="continue prompts as text, without a chat template")
    parser.add_argument(
        "--template", default="", help="chat template: built-in name or file (default: the model's own)"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: by the device")
    parser.add_argument("--batch_size", type=int, default=32, help="answers that decode together")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--max_new_tokens", type=int, default=256)
    generation.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    generation.add_argument("--top_k", type=int, default=0)
    generation.add_argument("--top_p", type=float, default=1.0)
    generation.add_argument("--min_p", type=float, default=0.0)
    generation.add_argument("--repetition_penalty", type=float, default=1.0)
    generation.add_argument("--seed", type=int, default=0)
    generation.add_argument("--stop", action="append", default=[], help="text that ends an answer")
    more = parser.add_argument_group("comparison and other programs' files")
    more.add_argument("--judge", help="OpenAI-compatible URL, such as http://localhost:8000/v1 (key: OPENAI_API_KEY)")
    more.add_argument("--judge_model", default="", help="the judge's name there")
    more.add_argument("--judge_against", default="", choices=("", "base", "expected"), help="default: base if given")
    more.add_argument("--contradictions", default="", help="JSONL of rows that contradict the base (see above)")
    more.add_argument("--alpaca_eval", default="", help="JSON of model outputs for alpaca_eval")
    more.add_argument("--mt_bench", default="", help="JSONL of model answers for FastChat's MT-Bench")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if bool(args.model) == bool(args.run):
        raise ConfigError("give either --model or --run")
    if args.judge and not args.judge_model:
        raise ConfigError("--judge needs --judge_model")

    from sftjax.assess import run

    summary = run.evaluate_from_flags(
        args.data,
        args.out,
        model=args.model,
        adapter=args.adapter,
        base=args.base,
        run=args.run,
        judge_url=args.judge,
        judge_model=args.judge_model,
        judge_against=args.judge_against,
        files={name: getattr(args, name) for name in ("contradictions", "alpaca_eval", "mt_bench")},
        scorers=args.scorer,
        allow_code=args.allow_code,
        limit=args.limit,
        system=args.system,
        completion=args.completion,
        chat_template=args.template,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
    )
    run.print_summary(summary)
    return 0


if __name__ == "__main__":
    exit_with_message(main)
