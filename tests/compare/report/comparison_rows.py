"""Synthetic comparisons with a known truth: rows as `flashbone compare` writes them, from a seeded generator."""

import json
from pathlib import Path

import numpy as np

RATES = [0.001, 0.003, 0.01]
NAMES = ["bone", "bat-row", "bat-col", "miss", "LoRA", "DoRA", "rsLoRA", "PiSSA", "OFT", "BOFT", "VeRA", "LoHa", "LoKr"]
NAMES += ["(IA)³", "prompt tuning", "full fine-tuning", "linear probing"]


def header(metric="accuracy", seeds=(0, 1, 2), **changes):
    """The first line."""
    return {
        "kind": "comparison",
        "version": 1,
        "name": "classification",
        "config": "examples/compare/classification.yaml",
        "model": "small-bert",
        "task": "sft" if metric == "loss" else "classification",
        "metric": metric,
        "higher_is_better": metric != "loss",
        "data": {"path": "data/reviews.jsonl", "train_rows": 512, "held_out_rows": 64, "test_rows": 120},
        "budget": {"parameters": 294912, "from": "bone r=32"},
        "tolerance": 0.03,
        "steps": 32,
        "epochs": 1.0,
        "seeds": list(seeds),
        "device": "cpu",
        "hardware": "Intel Xeon, 2 threads",
        "jobs": 1,
        "versions": {"flashbone": "0.7.0", "torch": "2.9.0", "peft": "0.21.0", "transformers": "5.2.0"},
        "commit": "abc1234",
        "date": "2026-11-26",
        "command": "flashbone compare examples/compare/classification.yaml",
        "fairness": {"checked": ["same rows in the same order", "same number of learning rates"], "problems": []},
        "finished": True,
        **changes,
    }


def method(key, title=None, **changes):
    """One method's line."""
    return {
        "kind": "method",
        "method": key,
        "title": title or key,
        "peft_type": "LORA",
        "settings": {"r": 18},
        "size": "r = 18",
        "matched": True,
        "bound": False,
        "fixed": False,
        "adapter_parameters": 294912,
        "trainable_parameters": 296837,
        "total_parameters": 22_000_000,
        "off_budget": 0.012,
        "learning_rates": RATES,
        "chosen": RATES[1],
        "at_edge": None,
        "status": "ok",
        "error": None,
        "rerun": f"flashbone compare examples/compare/classification.yaml --only {key}",
        "train": f"flashbone train examples/classification/train.yaml --variant {key} --learning_rate 0.003",
        **changes,
    }


def run(key, seed, scores, rate=RATES[1], counted=True, floor=0.3, metric="accuracy", **more):
    """One run's line: curves fall to `floor` as exp(-step / 10), with noise from (seed, rate)."""
    step_ms, peak = more.get("step_ms", 480.0), more.get("peak_mib", 1480.0)
    generator = np.random.default_rng((seed, round(rate * 1e6), *key.encode()))
    steps, held = np.arange(1, 33), np.arange(0, 33, 8)

    def losses(at, noise):
        return (floor + 0.9 * np.exp(-at / 10) + noise * generator.standard_normal(len(at))).round(5).tolist()

    def seconds(at):
        return (0.4 + at * step_ms / 1000).round(4).tolist()

    return {
        "kind": "run",
        "method": key,
        "learning_rate": rate,
        "seed": seed,
        "counted": counted,
        "status": "ok",
        "error": None,
        "steps": 32,
        "tokens": 49152,
        "digest": "00ff",
        "train": {"step": steps.tolist(), "seconds": seconds(steps), "loss": losses(steps, 0.06)},
        "held_out": {"step": held.tolist(), "seconds": seconds(held), "loss": losses(held, 0.01)},
        "test": {metric: float(np.mean(scores))},
        "test_scores": [float(score) for score in scores],
        "test_weights": [1] * len(scores),
        "step_ms": step_ms,
        "train_s": 15.4,
        "startup_s": 0.4,
        "load_s": 1.2,
        "peak_mib": peak,
        "peak_of": "resident memory",
        "above_model_mib": peak - 1070,
        "adapter_bytes": 1187840,
        "grad_norm_first": 2.31,
        **more,
    }


def right_or_wrong(truth, seeds=3, rows=120, common=0.0, churn=0.02, generator=None):
    """Scores (methods, seeds, rows) of 1 and 0: rows differ in difficulty, `truth` adds to each method's chance,
    `common` is the spread of an effect of the seed on all methods, `churn` that of one on each run."""
    generator = generator or np.random.default_rng(0)
    easy = generator.normal(0.85, 0.12, rows)
    luck = generator.normal(0, common, seeds) if common else np.zeros(seeds)
    each = generator.normal(0, churn, (len(truth), seeds))
    chance = easy[None, None] + np.asarray(truth)[:, None, None] + luck[None, :, None] + each[:, :, None]
    return (generator.random((len(truth), seeds, rows)) < chance).astype(float)


def comparison(truth, seeds=(0, 1, 2), titles=None, sweep=True, rows=120, **changes):
    """Rows of a whole comparison; `truth` maps a method's key to what it adds to the chance of a right answer."""
    scores = right_or_wrong(list(truth.values()), len(seeds), rows)
    lines = [header(seeds=seeds, **changes)]
    lines += [method(key, (titles or {}).get(key)) for key in truth]
    for place, key in enumerate(truth):
        speed = {"step_ms": 400.0 + 17 * ((place * 7) % 11), "peak_mib": 1200.0 + 31 * ((place * 5) % 13)}
        floor = 0.3 - truth[key]
        if sweep:
            for rate, worse in ((RATES[0], 0.08), (RATES[2], 0.03)):
                lines.append(run(key, seeds[0], scores[place, 0], rate, False, floor + worse, **speed))
        lines += [run(key, s, scores[place, i], floor=floor, **speed) for i, s in enumerate(seeds)]
    return lines


def all_methods(changed=None):
    """Seventeen methods, two of them bounds, one unmatched and one failed."""
    keys = [name.lower().replace(" ", "-") for name in NAMES]
    truth = {key: -0.012 * ((i * 5) % 9) for i, key in enumerate(keys)}
    lines = comparison(truth, titles=dict(zip(keys, NAMES, strict=True)))
    described = {line["method"]: line for line in lines if line["kind"] == "method"}
    described[keys[-2]].update(bound=True, matched=False, off_budget=None, size="all weights", adapter_parameters=0)
    described[keys[-1]].update(bound=True, matched=False, off_budget=None, size="head only", adapter_parameters=0)
    described[keys[13]].update(matched=False, fixed=True, off_budget=-0.93, size="fixed", adapter_parameters=20480)
    described[keys[14]].update(status="failed", error="virtual tokens do not fit", chosen=None, train=None)
    lines = [line for line in lines if line["kind"] != "run" or line["method"] != keys[14]]
    described[keys[4]].update(at_edge="highest", chosen=RATES[1])
    for key, update in (changed or {}).items():
        described[key].update(update)
    return lines


def write(folder: Path, lines, name="results.jsonl") -> Path:
    """The rows as a file."""
    path = folder / name
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path
