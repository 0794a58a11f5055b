"""Runs lm-evaluation-harness (pip install lm-eval) on a model, and on the base beside it.

    python tools/harness.py --run runs/quickstart --tasks hellaswag arc_easy --out harness.json
    python tools/harness.py --model DIR --tasks my_task --include_path my_tasks/ --out harness.json

--out gets {"base": {task: {"metric,filter": value, "metric_stderr,filter": ...}}, "model": the same, "versions"}. With
--run the figures are put into the run's report too. Tasks whose data isn't on this machine are fetched from the Hugging
Face hub by the harness.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import ConfigError, exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="", help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--adapter", help="PEFT adapter folder")
    parser.add_argument("--base", help="model to compare with")
    parser.add_argument("--run", default="", help="a finished run: gives model, adapter and base")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include_path", help="folder of own tasks (YAML)")
    parser.add_argument("--out", required=True, help="JSON to write")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--apply_chat_template", action="store_true", help="ask as in a conversation")
    parser.add_argument("--allow_code", action="store_true", help="run tasks that execute the model's code")
    parser.add_argument(
        "--template", default="", help="chat template: built-in name or file (default: the model's own)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch_size", type=int, default=32, help="answers that decode together")
    parser.add_argument("--max_length", type=int, default=4096, help="longest input, in tokens")
    args = parser.parse_args()
    if bool(args.model) == bool(args.run):
        raise ConfigError("give either --model or --run")

    try:
        from sftjax.assess import harness
    except ImportError as error:
        raise ConfigError(str(error)) from None

    harness.run(
        args.tasks,
        args.out,
        model=args.model,
        adapter=args.adapter,
        base=args.base,
        run_folder=args.run,
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
        allow_code=args.allow_code,
        chat_template=args.template,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_length=args.max_length,
    )
    return 0


if __name__ == "__main__":
    exit_with_message(main)
