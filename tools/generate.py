"""Answers prompts with a model, from a file or at the terminal.

  python tools/generate.py --model DIR|FILE.gguf|ID [--adapter DIR] --interactive
  python tools/generate.py --model DIR --prompts prompts.txt --out answers.jsonl --greedy

A prompt file is .txt (a prompt a line) or JSONL with "prompt" or "messages". Each line of the output is
  {"index", "prompt" or "messages", "text", "num_tokens", "finish_reason"}    finish_reason: "stop" or "length"
with "sample" beside them where --n is above 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--adapter", help="PEFT adapter folder")
    parser.add_argument("--prompts", help="file of prompts (.txt or .jsonl)")
    parser.add_argument("--out", help="JSONL to write; with --prompts")
    parser.add_argument("--interactive", action="store_true", help="talk at the terminal")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens (0: all)")
    parser.add_argument("--top_p", type=float, default=0.95, help="only the likeliest that reach this probability")
    parser.add_argument("--min_p", type=float, default=0.0, help="only those with this share of the likeliest's")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--stop", action="append", default=[], help="string that ends an answer; may be repeated")
    parser.add_argument("--n", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32, help="answers that decode together")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="weights and arithmetic (auto: float32 on a CPU, bfloat16 elsewhere)",
    )
    args = parser.parse_args()
    if args.interactive == bool(args.prompts) or bool(args.prompts) != bool(args.out):
        parser.error("give either --interactive, or --prompts with --out")

    from sftjax import chat

    settings = {
        "temperature": 0.0 if args.greedy else args.temperature,
        "seed": args.seed,
        **{
            name: getattr(args, name)
            for name in ("system", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "stop")
        },
    }
    steps = 2 if args.interactive else 16
    generator = chat.load(args.model, adapter=args.adapter, dtype=args.dtype, batch_size=args.batch_size, steps=steps)
    if args.interactive:
        chat.interactive(generator, **settings)
    else:
        count = chat.answer_file(generator, args.prompts, args.out, n=args.n, **settings)
        print(f"{args.out}: {count} prompts answered")
    return 0


if __name__ == "__main__":
    exit_with_message(main)
