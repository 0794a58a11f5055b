"""Training speed of this machine: real (unpadded) tokens per second and peak memory, by running the main program.

With --peer_python, the Python of an environment that has torch, trl, peft and datasets, the same job is run with TRL's
SFTTrainer in the same sitting, in turn, and the ratio is printed.

With --generate, generation instead: greedy answers of --new_tokens tokens to --prompts first messages, after one round
that compiles; the peer is transformers' generate with torch.

With --prepare, how fast the conversations become packed rows; the peer is what SFTTrainer does before its first step,
with --peer_masks for training on the answers only, as sftjax always does (conversations in ChatML).

With --load, how fast --model is loaded, beside merely reading its files.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default=".cache/quickstart/SmolLM2-135M-Instruct", help="Hugging Face folder")
    parser.add_argument("--data", default=".cache/quickstart/chitchat/train.jsonl", help="JSONL with messages")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, help="rows, or answers that decode together (default: 1, or all)")
    parser.add_argument("--steps", type=int, default=6, help="timed, after the first")
    parser.add_argument("--no_packing", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peer_python", default="", help="Python with torch, trl, peft, datasets")
    parser.add_argument("--out", help="JSON to write")
    parser.add_argument("--generate", action="store_true", help="measure generation")
    parser.add_argument("--prompts", type=int, default=64, help="with --generate")
    parser.add_argument("--new_tokens", type=int, default=64, help="with --generate")
    parser.add_argument("--prepare", action="store_true", help="measure the preparation of the data")
    parser.add_argument("--workers", type=int, default=2, help="with --prepare: processes")
    parser.add_argument("--copies", type=int, default=1, help="with --prepare: the data so many times over")
    parser.add_argument("--peer_masks", action="store_true", help="with --prepare: the peer masks prompts as well")
    parser.add_argument("--load", action="store_true", help="measure loading")
    args = parser.parse_args()
    from sftjax import bench, bench_preparing  # here, because data workers import this file as well

    if args.load:
        return loading(args.model, args.out)
    shared = {name: getattr(args, name) for name in ("peer_python", "repeats", "model", "data", "dtype")}
    if args.prepare:
        del shared["dtype"]
        more = {name: getattr(args, name) for name in ("max_length", "workers", "copies", "peer_masks")}
        result = bench_preparing.compare(**shared, **more)
    elif args.generate:
        batch_size = args.batch_size or args.prompts
        result = bench.compare_generation(
            **shared, prompts=args.prompts, new_tokens=args.new_tokens, batch_size=batch_size
        )
    else:
        result = bench.compare(
            **shared,
            method=args.method,
            max_length=args.max_length,
            batch_size=args.batch_size or 1,
            steps=args.steps,
            packing=not args.no_packing,
        )
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2))
    for name, figures in result.items():
        if name in ("sftjax", "trl", "transformers"):
            print(f"{name:12} {figures['tokens_per_second']:8.0f} tokens/s  {_more(figures)}")
    if "ratio" in result:
        print(f"{'ratio':12} {result['ratio']:8.2f}")
    return 0


def loading(model: str, out: str | None) -> int:
    from sftjax import bench_loading

    result = bench_loading.compare(model=model)
    if out:
        Path(out).write_text(json.dumps(result, indent=2))
    read, load = result["read"], result["load"]
    print(f"{load['bytes'] / 2**30:.2f} GiB read in {read['seconds']:.2f} s, loaded in {load['seconds']:.2f} s")
    beyond = (load["peak_bytes"] - load["bytes"]) / 2**30
    print(f"ratio {result['ratio']:.2f}; peak memory beyond the arrays {beyond:.2f} GiB")
    return 0


def _more(figures: dict[str, float]) -> str:
    if "filled" in figures:
        return f"{figures['seconds']:6.2f} s, rows {figures['filled']:.1%} filled"
    if "seconds" in figures:
        return f"{figures['seconds']:6.2f} s"
    return f"{figures['step_seconds']:6.2f} s a step  {figures['peak_bytes'] / 2**30:5.2f} GiB peak"


if __name__ == "__main__":
    exit_with_message(main)
