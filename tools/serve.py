"""Serves models to programs and people, by OpenAI's protocol.

  python tools/serve.py --model DIR|FILE.gguf|ID [--adapter NAME=DIR ...] [--model ...]

Endpoints: /v1/chat/completions, /v1/completions (both also as streams), /v1/models, /health; a page to chat and to
compare two models on /. Models are known by the last part of their path, or by NAME; adapters share the weights of the
model in front of them. The first line on standard output, "http://HOST:PORT/  models: NAME, ...", comes when requests
are taken. SIGINT or SIGTERM ends it, with exit code 0: what is in the making is answered first, for at most --grace
seconds or until a second signal; requests that are left get an error.

Beyond the protocol, requests may have top_k, min_p and repetition_penalty. See docs/serving.md for the limits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import exit_with_message


def main() -> int:
    parser = Parser(description=__doc__)
    for kind, text in (
        ("model", "Hugging Face folder, .gguf file or hub id; may be repeated"),
        ("adapter", "PEFT adapter folder for the --model in front of it; may be repeated"),
    ):
        tagged = lambda path, kind=kind: (kind, path)  # noqa: E731 (one list keeps the order of both)
        parser.add_argument(
            f"--{kind}", dest="wanted", action="append", type=tagged, metavar="[NAME=]DIR", help=text, default=[]
        )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--batch_size", type=int, default=32, help="answers of a model that decode together")
    parser.add_argument("--max_length", type=int, help="tokens of prompt and answer together (default: the model's)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="of chat answers whose request has no limit")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds for what is in the making at the end")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="weights and arithmetic (auto: float32 on a CPU, bfloat16 elsewhere)",
    )
    args = parser.parse_args()

    from sftjax.serve import server

    return server.serve(**vars(args))


if __name__ == "__main__":
    exit_with_message(main)
