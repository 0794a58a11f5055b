"""LoRA, QLoRA, DoRA, bottleneck adapters and full tuning beside each other: held-out loss, memory and speed, measured.

Each is a run of the main program with the same data and number of steps, in OUT/METHOD-SEED; finished ones are kept, so
the same command continues. The table is printed, and written to OUT/methods.md and OUT/methods.json.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax import bench_methods
from sftjax.arguments import Parser
from sftjax.errors import exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default=".cache/quickstart/SmolLM2-135M-Instruct", help="Hugging Face folder")
    parser.add_argument("--data", default=".cache/quickstart/chitchat/train.jsonl")
    parser.add_argument("--held_out", default=".cache/quickstart/chitchat/held_out.jsonl")
    parser.add_argument("--methods", nargs="+", default=list(bench_methods.METHODS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=1, help="rows of --max_length tokens")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--eval_rows", type=int, default=40, help="held-out conversations")
    parser.add_argument("--out", default="runs/methods", help="folder")
    args = vars(parser.parse_args())
    folder = Path(args.pop("out"))
    results = bench_methods.compare(folder=str(folder), say=lambda line: print(line, file=sys.stderr), **args)
    folder.mkdir(parents=True, exist_ok=True)
    text = bench_methods.table(results)
    (folder / "methods.md").write_text(text + "\n")
    (folder / "methods.json").write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    print(text)
    return 0


if __name__ == "__main__":
    exit_with_message(main)
