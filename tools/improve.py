"""Measures whether best of N improves a model: before, after SFT, after best of N with a verifier and SFT again.

  python tools/improve.py --model .cache/quickstart/SmolLM2-135M-Instruct --output runs/improve

The task is one of reasoning-gym's, made from seeds; held-out items are in no training set. OUTPUT/improve.json has
"settings", for each seed the stages ("before", "first", "second", with --control "control": "accuracy", its 95 %
Wilson "interval", "right" item by item, "verified_accuracy" by the task's own verifier, seconds; "rejection": prompts
and how many answers were kept), and "gains" (differences on the same items, with 95 % intervals); OUTPUT/improve.md the
table. A run that was stopped goes on with the same command.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import exit_with_message

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}  # 38 + 79, 21 - 81


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="where it starts: Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--output", required=True, help="folder to write, or to go on in")
    parser.add_argument("--task", default="chain_sum", help="of reasoning-gym")
    parser.add_argument("--task_settings", type=json.loads, default=TASK, help="JSON (default: %(default)s)")
    parser.add_argument("--system", default="Give only the final answer.", help="system message of every prompt")
    parser.add_argument("--scorer", default="numeric", help="counts a held-out answer as right where it gives 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held_out", type=int, default=500, help="items to measure on")
    parser.add_argument("--first", type=int, default=500, help="rows of the first training")
    parser.add_argument("--second", type=int, default=600, help="prompts answered for the second one")
    parser.add_argument("--n", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--train", action="append", default=[], help="--train=--config.train.learning_rate=1e-4, ...")
    parser.add_argument("--control", action="store_true", help="also train on without new rows, for as many steps")
    args = vars(parser.parse_args())
    args |= {"seeds": tuple(args["seeds"]), "train": tuple(args["train"])}

    from sftjax.synth import loop

    result = loop.improve(loop.Settings(**args), say=lambda line: print(line, file=sys.stderr, flush=True))
    for line in loop.table(result):
        print(line)
    return 0


if __name__ == "__main__":
    exit_with_message(main)
