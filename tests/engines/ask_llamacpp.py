"""Greedy answers of llama.cpp: python ask_llamacpp.py MODEL.gguf [ADAPTER.gguf ...] < questions.json."""

import json
import sys

import llama_cpp

file, *adapters = sys.argv[1:]
asked = json.load(sys.stdin)
fp32 = llama_cpp.GGML_TYPE_F32
results = []
for adapter in adapters or [None]:
    model = llama_cpp.Llama(file, lora_path=adapter, n_ctx=256, n_threads=1, type_k=fp32, type_v=fp32, verbose=False)
    answers = []
    for prompt in asked["prompts"]:
        model.reset()
        model.eval(prompt)
        answer = [model.sample(temp=0)]
        while len(answer) < asked["new"]:
            model.eval(answer[-1:])
            answer.append(model.sample(temp=0))
        answers.append(answer)
    results.append({"answers": answers})
    model.close()
print(json.dumps(results))
