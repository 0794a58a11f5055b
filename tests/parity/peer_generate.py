"""The same generation with transformers and torch, for tools/bench.py --generate.

Prints one JSON line: {"tokens_per_second", "seconds", "versions"}; a first round is left out.
"""

import argparse
import json
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="JSON list of first messages")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    args = parser.parse_args()

    with open(args.prompts, encoding="utf-8") as file:
        prompts = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    batches = [
        tokenizer.apply_chat_template(
            [[{"role": "user", "content": text}] for text in prompts[start : start + args.batch_size]],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(device)
        for start in range(0, len(prompts), args.batch_size)
    ]

    def generate() -> int:
        written = 0
        for batch in batches:
            out = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            written += out[:, batch["input_ids"].shape[1] :].numel()
        return written

    with torch.inference_mode():
        generate()
        begun = time.monotonic()
        written = generate()
        seconds = time.monotonic() - begun
    assert written == len(prompts) * args.new_tokens
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({"tokens_per_second": written / seconds, "seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
