"""Turns a model, or what a run has trained, into a Hugging Face folder (or a .gguf file).

  python tools/convert.py --from model.gguf --to folder
  python tools/convert.py --from runs/mine --to folder                        its newest checkpoint
  python tools/convert.py --from runs/mine/checkpoints/500 --to folder
  python tools/convert.py --from base --adapter runs/mine/export --to merged
  python tools/convert.py --from folder --to model.gguf --dtype q8_0

A run's own adapter is merged. The folder appears whole, or not at all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="Hugging Face folder, .gguf file, hub id, run folder, or RUN/checkpoints/STEP",
    )
    parser.add_argument("--to", required=True, help="folder (absent, empty, or an earlier export) or .gguf file")
    parser.add_argument("--adapter", help="PEFT adapter folder to merge")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        help="of the tensors (default: as in the source; bfloat16 from and to GGUF); q8_0 to .gguf only",
    )
    parser.add_argument("--text_only", action="store_true", help="of a multimodal model, its language model alone")
    args = parser.parse_args()

    from sftjax.convert import convert

    names = convert(args.source, args.to, adapter=args.adapter, dtype=args.dtype, text_only=args.text_only)
    print(f"{args.to}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    exit_with_message(main)
