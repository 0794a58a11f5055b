"""What TRL's SFTTrainer does with a dataset before its first step, for tools/bench.py; needs torch, trl and datasets.

Prints one JSON line: seconds of it (template, tokenisation, packing; the model's loading left out), tokens, slots.
"""

import argparse
import json
import time

import torch
from datasets import Dataset, disable_caching
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL with messages")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--masks", action="store_true", help="train on answers only, as sftjax always does (ChatML)")
    args = parser.parse_args()

    disable_caching()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.masks:  # TRL takes them from marks in the template, which this model's hasn't
        tokenizer.chat_template = CHATML
    prepare, taken = SFTTrainer._prepare_dataset, []

    def timed(self, *arguments, **options):
        begun = time.monotonic()
        result = prepare(self, *arguments, **options)
        taken.append(time.monotonic() - begun)
        return result

    SFTTrainer._prepare_dataset = timed
    begun = time.monotonic()
    with open(args.data, encoding="utf-8") as file:
        rows = [{"messages": json.loads(line)["messages"]} for line in file]
    dataset = Dataset.from_list(rows)
    reading = time.monotonic() - begun
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="/tmp/peer-prepare",
            max_length=args.max_length,
            packing=True,
            use_cpu=True,
            bf16=False,
            report_to=[],
            dataset_num_proc=args.workers,
            assistant_only_loss=args.masks,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    print(
        json.dumps(
            {
                "seconds": reading + sum(taken),
                "tokens": sum(lengths),
                "slots": len(lengths) * args.max_length,
                "conversations": len(rows),
            }
        )
    )


if __name__ == "__main__":
    main()
