"""Scores every row of a data file with a model: its loss on the tokens that training would train.

Writes one JSON line per training sample, in the order of the file:
  {"row", "index", "sample", "nll", "num_trained_tokens", "num_tokens"}    nll: weighted sum in nats
with --tokens also "tokens", "weights", "token_nll" (equal lengths; token_nll[0] is null). A row that can't be used
gives {"row", "index", "error"}. The mean loss is sum(nll) / sum(weights). The arguments that a configuration has as
settings of the data and the template mean the same here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.data import row_options
from sftjax.errors import exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--adapter", help="PEFT adapter folder")
    parser.add_argument("--data", required=True, help="file of rows, or any source a config takes")
    parser.add_argument("--out", required=True, help="JSONL to write")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="weights and arithmetic")
    parser.add_argument("--tokens", action="store_true", help="add the loss of every token")
    row_options.add(parser)
    args = parser.parse_args()

    from sftjax import inference

    return inference.score_file(
        model=args.model,
        adapter=args.adapter,
        data=args.data,
        out=args.out,
        dtype=args.dtype,
        per_token=args.tokens,
        template=row_options.template(args),
        encoding=row_options.encoding(args),
    )


if __name__ == "__main__":
    exit_with_message(main)
