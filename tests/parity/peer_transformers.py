"""An export as transformers has it, of whatever version runs this: logits, ids, chat text.

Reads a JSON list of {"folder", "prompts": [[id]], "texts": [str], "messages": [...], "templates": [name]} from stdin
(and perhaps "adapter": a folder of PEFT's).
Writes to the file given, for each, {"version", "logits": [[number] for each prompt's last token], "ids": [[id]],
"chat": {name: str}, "stops"} or {"error": str}. (The tests import `look` to ask the version that they run with.)
"""

import json
import sys

import torch
import transformers


def look(task):
    found = {"version": transformers.__version__}
    if task["prompts"]:
        found |= of_model(task)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["folder"])
    found["ids"] = [tokenizer(text).input_ids for text in task["texts"]]
    options = dict(add_generation_prompt=True, tokenize=False)
    found["chat"] = {
        name: tokenizer.apply_chat_template(task["messages"], chat_template=name, **options)
        for name in task["templates"]
    }
    found["chat"]["default"] = tokenizer.apply_chat_template(task["messages"], **options)
    return found


def of_model(task):
    # eager: transformers 4 drops Gemma 2's soft cap in the other ways of attention
    options = dict(torch_dtype=torch.float32, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(task["folder"], **options).eval()
    if task.get("adapter"):
        import peft

        model = peft.PeftModel.from_pretrained(model, task["adapter"]).eval()
    found = {"stops": model.generation_config.eos_token_id, "logits": []}
    with torch.no_grad():
        for prompt in task["prompts"]:
            found["logits"].append(model(torch.tensor([prompt])).logits[0, -1].tolist())
    return found


def main():
    results = []
    for task in json.load(sys.stdin):
        try:
            results.append(look(task))
        except Exception as error:  # each version has errors of its own; the test says which are expected
            results.append({"error": f"{type(error).__name__}: {error}"})
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
