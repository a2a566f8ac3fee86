"""Greedy answers of vLLM: python ask_vllm.py MODEL [ADAPTER ...] < questions.json; run in vLLM's own environment."""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model_folder, *adapters = sys.argv[1:]
asked = json.load(sys.stdin)
lora = {"enable_lora": True, "max_lora_rank": 64, "max_loras": len(adapters)} if adapters else {}
engine = LLM(model_folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, **lora)
greedy = SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
results = []
for number, adapter in enumerate(adapters or [None], 1):
    request = LoRARequest(f"a{number}", number, adapter) if adapter else None
    outputs = engine.generate(prompts, greedy, lora_request=request, use_tqdm=False)
    results.append({"answers": [list(output.outputs[0].token_ids) for output in outputs]})
print(json.dumps(results))
