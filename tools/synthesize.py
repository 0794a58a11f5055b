"""Makes training data with a teacher: a model here, or one behind any OpenAI-compatible URL.

  python tools/synthesize.py rejection     --model DIR --input prompts.jsonl --reward numeric --output out
  python tools/synthesize.py distill       --teacher_url http://HOST/v1 --teacher_model NAME --input prompts.jsonl ...
  python tools/synthesize.py magpie        --model DIR --count 1000 --output out
  python tools/synthesize.py self_instruct --model DIR --input seeds.jsonl --count 1000 --output out
  python tools/synthesize.py evol_instruct --model DIR --input questions.jsonl --rounds 4 --output out

A run that was stopped goes on with the same command, and ends as if it hadn't been. OUTPUT gets

  rows.jsonl    a training row a line: "messages" (the answer is the last one), "method", "teacher", "index" (of the row
                of the input, or of the question), and
                  rejection      "sample", "score" of the chosen answer, "scores" of all usable ones, with --second
                                 "second_score"
                  self_instruct  "instruction", "input", "output", "classification" (true, false)
                  evol_instruct  "number", "depth" (0: as given), "operation" ("seed", "breadth", or one in depth),
                                 "parent" (number of the row that it was made from; null for a seed)
  pairs.jsonl   rejection with --pairs: "prompt" (messages), "chosen", "rejected" ([message]), "index", "chosen_score",
                "rejected_score"
  report.json   "method", "teacher", "seed", "prompts" or "seeds", "rows", "filters" {name: what it took}; rejection:
                "reward" and "second" (mean, quantiles, histogram; of all answers, of first answers, of chosen ones),
                "reward_length_correlation", "distinct" {"before", "after": {n: distinct n-grams over all}}, "words",
                "warnings"; evol_instruct: "by_depth", "by_operation"; self_instruct: "instructions", "classification"
  calls.jsonl, settings.json    what was asked and answered: may be removed once the run is complete

Rows go on to `tools/curate.py` (--config.sources=OUTPUT/rows.jsonl) and to training as they are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sftjax.arguments import Parser
from sftjax.errors import exit_with_message

TEACHER = ("model", "adapter", "dtype", "batch_size", "api_key_env", "concurrency", "retries")
SAMPLING = ("temperature", "top_p", "max_new_tokens", "stop")


def read_arguments() -> dict:
    parser = Parser(description=__doc__)
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    common = Parser(add_help=False)
    common.add_argument("--output", required=True, help="folder to write, or to go on in")
    common.add_argument("--model", default="", help="the teacher: Hugging Face folder, .gguf file or hub id")
    common.add_argument("--adapter", help="PEFT adapter folder")
    common.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of models here")
    common.add_argument("--batch_size", type=int, default=32, help="answers that decode together")
    common.add_argument("--teacher_url", default="", help="or: an OpenAI-compatible server, http://HOST/v1")
    common.add_argument("--teacher_model", default="", help="its name for the model")
    common.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable with the key")
    common.add_argument("--concurrency", type=int, default=8, help="requests at once")
    common.add_argument("--retries", type=int, default=6, help="of a request that failed for a while")
    common.add_argument("--temperature", type=float, default=0.7)
    common.add_argument("--top_p", type=float, default=1.0)
    common.add_argument("--max_new_tokens", type=int, default=512)
    common.add_argument("--stop", action="append", default=[], help="string that ends an answer; may be repeated")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--chunk", type=int, default=64, help="prompts between two saves")
    asking = Parser(add_help=False)
    asking.add_argument("--input", required=True, help="prompts: rows with messages, prompt, question or instruction")
    asking.add_argument("--limit", type=int, help="only so many of them")

    rejection = methods.add_parser("rejection", parents=[common, asking], help="best of n answers by a reward")
    rejection.add_argument("--reward", required=True, help="a scorer (numeric, regex:..., reasoning_gym:TASK, "
                           "FILE.py:FUNCTION, ...), loglik:MODEL, or reward_model:FOLDER")  # fmt: skip
    rejection.add_argument("--second", default="", help="another one, for the report only")
    rejection.add_argument("--n", type=int, default=8, help="answers to each prompt")
    rejection.add_argument("--threshold", type=float, default=0.5, help="least reward of a kept answer")
    rejection.add_argument("--pairs", action="store_true", help="write chosen and rejected answers too")
    rejection.add_argument("--allow_code", action="store_true", help="let scorers run programs that the teacher wrote")

    methods.add_parser("distill", parents=[common, asking], help="the teacher's answers to given prompts")

    magpie = methods.add_parser("magpie", parents=[common], help="questions from the template's opening alone")
    magpie.add_argument("--count", type=int, required=True, help="questions to draw")
    magpie.add_argument("--template_of", default="", help="behind a URL: a model whose chat template the teacher uses")

    own = methods.add_parser("self_instruct", parents=[common, asking], help="new tasks from seed tasks")
    own.add_argument("--count", type=int, required=True, help="new instructions")
    own.add_argument("--novelty", type=float, default=0.7, help="ROUGE-L from which two instructions are alike")

    evol = methods.add_parser("evol_instruct", parents=[common, asking], help="harder and other instructions")
    evol.add_argument("--rounds", type=int, default=4)
    evol.add_argument("--breadth", type=float, default=1 / 7, help="share of rewritings into another instruction")
    return vars(parser.parse_args())


def main() -> int:
    given = read_arguments()

    from sftjax.synth import run
    from sftjax.synth.teacher import Sampling

    teacher = {name: given.pop(name) for name in TEACHER}
    teacher |= {"url": given.pop("teacher_url"), "name": given.pop("teacher_model")}
    sampling = {name: given.pop(name) for name in SAMPLING}
    report = run.synthesize(
        given.pop("method"),
        teacher=run.TeacherSettings(**teacher),
        sampling=Sampling(**sampling | {"stop": tuple(sampling["stop"])}),
        **given,
    )
    for line in run.summary_lines(report):
        print(line)
    return 0


if __name__ == "__main__":
    exit_with_message(main)
