"""Shows what a data file becomes: conversations with the trained tokens coloured.

In the terminal; or with --out FILE.jsonl one line per sample, {"index", "sample", "tokens", "weights", "text"} (a row
that can't be used gives {"index", "error"}); or with --out FILE.html one page that opens offline.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.errors import ConfigError, StorageError, exit_with_message


def load_tokenizer(model: str, template: str | None, end_of_turn: str | None):
    if Path(model).is_dir():  # the tokenizer is all that is needed: no weights, no backend
        from sftjax.data import tokenizer

        return tokenizer.load(model, chat_template=template, end_of_turn=end_of_turn)
    from sftjax import loading

    return loading.open_model(model, chat_template=template or "", end_of_turn=end_of_turn or "").tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--data", required=True, help="file of rows, or any source a config takes")
    parser.add_argument("--out", help="FILE.jsonl or FILE.html; without it the terminal")
    parser.add_argument("--template", help="chat template: built-in name or file (default: the model's own)")
    parser.add_argument("--end_of_turn", help="token that ends an answer, in place of the template's")
    parser.add_argument("--format", default="auto", help="of the rows (default: recognised)")
    parser.add_argument("--train_on", default="all", choices=("all", "last", "weights"))
    parser.add_argument("--split", default="", help="part of the file, such as [:100]")
    parser.add_argument("--limit", type=int, help="rows to show (default: all for a .jsonl, else 20)")
    args = parser.parse_args()
    if args.out and Path(args.out).suffix not in (".jsonl", ".html"):
        raise ConfigError(f"--out {args.out}: the name has to end in .jsonl or .html")

    from sftjax.data import preview
    from sftjax.data.encode import RowEncoder
    from sftjax.data.sources import open_source

    source = open_source({"path": args.data, "split": args.split})
    tokenizer = load_tokenizer(args.model, args.template, args.end_of_turn)
    encoder = RowEncoder(tokenizer, format=args.format, train_on=args.train_on)
    as_lines = bool(args.out) and args.out.endswith(".jsonl")
    shown = preview.rows(source, encoder, args.limit if args.limit is not None else None if as_lines else 20)
    try:
        if as_lines:
            with open(args.out, "wb") as file:
                for row in shown:
                    file.writelines(preview.json_lines(tokenizer, row))
        elif args.out:
            Path(args.out).write_text(preview.page(tokenizer, shown, f"Preview of {args.data}"), encoding="utf-8")
        else:
            from rich.console import Console

            for row in shown:
                preview.show(Console(highlight=False), tokenizer, row)
    except OSError as error:
        raise StorageError(f"can't write {args.out}: {error.strerror}") from None
    return 0


if __name__ == "__main__":
    exit_with_message(main)
