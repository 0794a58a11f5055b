"""What a choice of data is worth: a few short runs of the main program beside each other, and a table.

  curation   trains on all rows, on those that curation keeps, and on as many chosen at random, for the same number of
             steps; measured on held-out rows that curation would keep
  replay     trains with shares of plain text mixed in; measured on held-out conversations, and on held-out text (half
             of --text): what is forgotten

Finished runs are kept, so the same command continues. The table is printed, and written to OUT/STUDY.md and .json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax import bench_data
from sftjax.arguments import Parser
from sftjax.errors import ConfigError, exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("study", choices=("curation", "replay"))
    parser.add_argument("--model", default=".cache/quickstart/SmolLM2-135M-Instruct", help="Hugging Face folder")
    parser.add_argument("--data", default=".cache/quickstart/chitchat/train.jsonl")
    parser.add_argument("--held_out", default=".cache/quickstart/chitchat/held_out.jsonl")
    parser.add_argument("--text", default="", help="JSONL with `text`: plain text to replay, and to measure on")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.05, 0.1], help="of the tokens, replayed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24, help="of one row of --max_length tokens")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--eval_rows", type=int, default=24, help="held-out rows of each kind")
    parser.add_argument("--out", default="runs/compare_data", help="folder")
    args = parser.parse_args()
    settings = bench_data.settings(
        model=args.model, steps=args.steps, max_length=args.max_length, eval_rows=args.eval_rows
    )
    common = {
        "data": args.data,
        "held_out": args.held_out,
        "folder": f"{args.out}/{args.study}",
        "seeds": args.seeds,
        "settings": settings,
        "say": lambda line: print(line, file=sys.stderr, flush=True),
    }
    if args.study == "curation":
        results = bench_data.curated(**common)
    elif not args.text:
        raise ConfigError("replay needs --text: a JSONL file with a field `text`")
    else:
        results = bench_data.replayed(**common, text=args.text, shares=args.shares)
    text = bench_data.table(results)
    (Path(args.out) / f"{args.study}.md").write_text(text + "\n")
    (Path(args.out) / f"{args.study}.json").write_text(bench_data.to_json(results))
    print(text)
    return 0


if __name__ == "__main__":
    exit_with_message(main)
