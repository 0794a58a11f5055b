"""llama.cpp (through xllamacpp) on GGUF files: ids of texts, the chat template's text, most likely next tokens.

Reads a JSON list of {"gguf", "context", "prompts": [[id]], "texts": [str], "messages": [...]} from stdin. Writes to the
file given one of these for each: {"ids": [[id]], "chat": str, "top": [[[id, log-probability] x 5] for each prompt]}, or
{"error": str}.
"""

import json
import sys
import urllib.request

import xllamacpp


def serve(path, context):
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context, 1, 0
    settings.cpuparams.n_threads, settings.warmup, settings.verbosity = 1, False, 0
    settings.n_batch = settings.n_ubatch = context
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(settings)


def post(server, path, body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def look(task):
    server = serve(task["gguf"], task["context"])
    found = {"ids": [], "top": []}
    for text in task["texts"]:
        body = {"content": text, "add_special": True, "parse_special": True}
        found["ids"].append(post(server, "/tokenize", body)["tokens"])
    if task["messages"]:
        found["chat"] = post(server, "/apply-template", {"messages": task["messages"]})["prompt"]
    letter = post(server, "/tokenize", {"content": "a", "add_special": False})["tokens"][0]
    for prompt in task["prompts"]:
        # the token drawn is a plain letter: half a character is told without its neighbours. Theirs are from the model
        body = {"prompt": prompt, "n_predict": 1, "n_probs": 5, "cache_prompt": False, "logit_bias": [[letter, 1e4]]}
        first = post(server, "/completion", body)["completion_probabilities"][0]
        found["top"].append([[one["id"], one["logprob"]] for one in first["top_logprobs"]])
    return found


def main():
    results = []
    for task in json.load(sys.stdin):
        try:
            results.append(look(task))
        except (RuntimeError, OSError, KeyError) as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
