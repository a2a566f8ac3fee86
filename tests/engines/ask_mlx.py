"""Greedy answers of mlx-lm: python ask_mlx.py MODEL [ADAPTER ...] < questions.json; run in mlx-lm's own environment."""

import json
import sys

import mlx.core as mx
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

model_folder, *adapters = sys.argv[1:]
asked = json.load(sys.stdin)
results = []
for adapter in adapters or [None]:
    model, _ = load(model_folder, adapter_path=adapter)
    answers, logits = [], []
    for prompt in asked["prompts"]:
        cache, tokens, answer = make_prompt_cache(model), mx.array([prompt]), []
        for _ in range(asked["new"]):
            scores = model(tokens, cache=cache)[0].astype(mx.float32)
            if not answer:
                logits.append(scores[-1].tolist())
            answer.append(int(scores[-1].argmax()))
            tokens = mx.array([answer[-1:]])
        answers.append(answer)
    results.append({"answers": answers, "logits": logits})
print(json.dumps(results))
