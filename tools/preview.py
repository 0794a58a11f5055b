"""Shows what a data file becomes: conversations with the trained tokens coloured.

In the terminal (without colours, as in a pipe, trained text stands in «»); or with --out FILE.jsonl one line per
sample, {"row", "index", "sample", "tokens", "weights", "text"}, with "lost" where the text lacks parts of the row (a
row that can't be used gives {"row", "index", "error"}); or with --out FILE.html one page that opens offline, with
search, filters by source, score, length and rule, histograms, and with --max_length the rows that the samples are
packed into. The arguments that a configuration has as settings of the data and the template mean the same here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.data import row_options
from sftjax.errors import ConfigError, StorageError, exit_with_message


def load_tokenizer(model: str, template: dict):
    if Path(model).is_dir():  # the tokenizer is all that is needed: no weights, no backend
        from sftjax.data import tokenizer

        return tokenizer.load(model, **template)
    from sftjax import loading

    return loading.open_model(model, **template).tokenizer


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder, .gguf file or hub id")
    parser.add_argument("--data", required=True, nargs="+", help="files of rows, or any sources a config takes")
    parser.add_argument("--out", help="FILE.jsonl or FILE.html; without it the terminal")
    row_options.add(parser)
    parser.add_argument("--add_tokens", nargs="+", default=(), help="special tokens that the template needs")
    parser.add_argument("--split", default="", help="part of the data, such as test or [:100]")
    parser.add_argument("--limit", type=int, help="rows of each file to show (default: .jsonl all, .html 500, else 20)")
    parser.add_argument("--max_length", type=int, default=0, help="with .html: draw the packed rows of so many tokens")
    parser.add_argument("--removed", help="with .html: removed.jsonl of tools/curate.py, to show why a row was removed")
    args = parser.parse_args()
    kind = Path(args.out).suffix if args.out else ""
    if args.out and kind not in (".jsonl", ".html"):
        raise ConfigError(f"--out {args.out}: the name has to end in .jsonl or .html")
    if kind == ".jsonl" and len(args.data) > 1:
        raise ConfigError(f"--out {args.out}: its lines don't say which file a row is from; give one --data")

    from sftjax.curate import preview as pages
    from sftjax.curate.run import open_inputs
    from sftjax.data import encode, preview

    inputs = open_inputs([{"path": path, "split": args.split} for path in args.data])
    removed = pages.removals(args.removed) if args.removed else {}
    template, encoding = row_options.template(args) | {"add_tokens": args.add_tokens}, row_options.encoding(args)
    tokenizer = load_tokenizer(args.model, template)
    limit = args.limit if args.limit is not None else {".jsonl": None, ".html": 500}.get(kind, 20)
    shown = (
        pages.Seen(row, one.name, removed.get((one.name, row.index)))
        for one in inputs
        for row in preview.rows(one.source, encode.encoder_of(one.source, tokenizer, **encoding), limit)
    )
    try:
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        if kind == ".jsonl":
            with open(args.out, "wb") as file:
                for one in shown:
                    file.writelines(preview.json_lines(tokenizer, one.row))
        elif kind == ".html":
            title = "Preview of " + ", ".join(one.name for one in inputs)
            total = sum(len(one.source) for one in inputs)
            page = pages.page(tokenizer, shown, title, rows_in_all=total, max_length=args.max_length)
            Path(args.out).write_text(page, encoding="utf-8")
        else:
            from rich.console import Console

            for one in shown:
                preview.show(Console(highlight=False), tokenizer, one.row)
    except OSError as error:
        raise StorageError(f"can't write {args.out}: {error.strerror}") from None
    return 0


if __name__ == "__main__":
    exit_with_message(main)
