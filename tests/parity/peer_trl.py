"""The same fine-tuning with TRL's SFTTrainer and PEFT, for tools/bench.py; needs torch, trl, peft and datasets.

Prints one JSON line: seconds, real tokens (padding left out) and gradient norm of each step after the first.
"""

import argparse
import json
import resource
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Times steps, and keeps the logged gradient norms."""

    def __init__(self):
        self.seconds, self.norms = [], []

    def on_step_begin(self, *_, **__):
        self._begun = time.monotonic()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.monotonic() - self._begun)

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSONL with messages")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--float32", action="store_true")
    args = parser.parse_args()

    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    clock, tokens = Clock(), []
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="/tmp/peer-trl",
            max_length=args.max_length,
            packing=args.packing,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps + 1,
            learning_rate=2e-4,
            bf16=not args.float32,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            dataset_num_proc=None,
        ),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in rows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if args.method == "lora"
        else None,
        callbacks=[clock],
    )
    collate = trainer.data_collator

    def counting(examples):
        batch = collate(examples)
        mask = batch.get("attention_mask")
        tokens.append(int(mask.sum()) if mask is not None else int(batch["input_ids"].numel()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    if not clock.norms or min(clock.norms) == 0:
        raise SystemExit("the peer's gradients are zero: its figures mean nothing")
    print(
        json.dumps(
            {
                "seconds": clock.seconds[1 : args.steps + 1],
                "real_tokens": tokens[1 : args.steps + 1],
                "grad_norms": clock.norms,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "versions": {"torch": torch.__version__, "threads": torch.get_num_threads()},
            }
        )
    )


if __name__ == "__main__":
    main()
