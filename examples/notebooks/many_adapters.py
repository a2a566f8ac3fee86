# %% [markdown]
# # One model, many adapters
#
# Three small adapters learn three tasks on one copy of a language model. Then we switch between them, turn them up and
# down, add them up, serve all of them in one batch, replace one, and hand one to a serving engine as a LoRA. Everything
# runs offline, on a CPU. The figures shown come from a run on two CPU cores, shared with other programs; it took 160 s
# of CPU time.
#
# Once before, in the root of the repository, `make demo demo-classification` prepares the environment, the model
# (SmolLM2-135M-Instruct), its chats and the news. Then open this file in VS Code or, with jupytext, in Jupyter, or run
# it as a script:
#
#     .venv/bin/python -m examples.notebooks.many_adapters

# %%
import json
import random
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashbone
from flashbone import BoneConfig

# %% [markdown]
# ## What can be changed
#
# Jupyter starts in the notebook's own folder, a script in the root of the repository; `ROOT` is the latter.

# %%
HERE = Path.cwd()
ROOT = HERE.parents[1] if HERE.name == "notebooks" else HERE
MODEL = ROOT / ".cache/demo/smollm2"
CHATS = ROOT / ".cache/demo/chat"
NEWS = ROOT / ".cache/classification/news"
OUT = ROOT / ".cache/notebooks/many_adapters"

BLOCK_SIZE = 32
TARGETS = ["q_proj", "v_proj"]
STEPS, BATCH, LEARNING_RATE = 16, 6, 2e-3
HELD_OUT = 12  # rows of each task
ROUNDS, NEW_TOKENS = 5, 8  # of the timing

# %%
if missing := [path for path in (MODEL, CHATS, NEWS) if not path.is_dir()]:
    prepare = "classification" if NEWS in missing else "demo"
    sys.exit(f"{missing[0]} is not there; run in {ROOT}: .venv/bin/python -m examples.{prepare}.prepare")
warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT calls what transformers has renamed
OUT.mkdir(parents=True, exist_ok=True)
plt.rcParams.update({"font.size": 13, "figure.dpi": 110, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREEN, GREY = "#0468b3", "#d55e00", "#009e73", "#777777"

# %% [markdown]
# ## Three tasks
#
# `chat` answers as the chat corpus does, `topic` names the topic of a piece of news, and `shout` says a sentence again
# in capitals.


# %%
def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chat_rows(name):
    pairs = [[message["content"] for message in row["messages"]] for row in read(CHATS / f"{name}.jsonl")]
    return [(f"Question: {question}\nAnswer:", f" {reply}") for question, reply in pairs]


def topic_rows(name):
    rows = read(NEWS / f"{name}.jsonl")
    return [(f"News: {' '.join(row['text'].split()[:20])}\nTopic:", f" {row['label']}") for row in rows]


def shout_rows(name):
    pairs = [[message["content"] for message in row["messages"]] for row in read(CHATS / f"{name}.jsonl")]
    return [(f"Say loudly: {question}\nLoudly:", f" {question.upper()}") for question in dict(pairs)]


TASKS = {"chat": chat_rows, "topic": topic_rows, "shout": shout_rows}
train_rows = {task: rows("train") for task, rows in TASKS.items()}
held_out_rows = {task: random.Random(0).sample(rows("test"), HELD_OUT) for task, rows in TASKS.items()}
for task, rows in train_rows.items():
    print(task, rows[2], sep=": ")

# %% [markdown]
# ## Three adapters on one model
#
# `chat` and `topic` are `bone`; `shout` is `bat-row`, as variants and block sizes may differ. `set_adapter` says which
# is active, and only that one is trained.

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
VARIANTS = {"chat": "bone", "topic": "bone", "shout": "bat-row"}
configs = {
    task: BoneConfig(r=BLOCK_SIZE, variant=variant, target_modules=TARGETS) for task, variant in VARIANTS.items()
}
model = get_peft_model(base, configs["chat"], adapter_name="chat")
model.add_adapter("topic", configs["topic"])
model.add_adapter("shout", configs["shout"])


# %%
def batch_of(rows):
    """Padded token ids and labels; the loss is on the answers alone."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in rows]
    answers = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for _, text in rows]
    length = max(len(prompt) + len(text) for prompt, text in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, text) in enumerate(zip(prompts, answers, strict=True)):
        used = len(prompt) + len(text)
        ids[row, -used:] = torch.tensor(prompt + text)
        labels[row, -len(text) :] = torch.tensor(text)
        mask[row, -used:] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(task):
    model.set_adapter(task)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, order = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0), random.Random(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 3) * (1 - step / STEPS)
        loss = model(**batch_of(order.sample(train_rows[task], BATCH))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out_loss(task):
    return model(**batch_of(held_out_rows[task])).loss.item()


model.eval()
losses = {"none": {task: held_out_loss(task) for task in TASKS}}  # blocks start at zero
for task in TASKS:
    train(task)
    losses[task] = {other: held_out_loss(other) for other in TASKS}
    print(f"{task:6} {losses['none'][task]:.2f} -> {losses[task][task]:.2f} nats per token")
model.save_pretrained(OUT, selected_adapters=list(TASKS))  # a folder for each

# %%
figure, axes = plt.subplots(figsize=(5.6, 5))
grid = [[losses[active][task] for task in TASKS] for active in losses]
image = axes.imshow(grid, cmap="cividis", aspect="auto")
middle = (image.get_clim()[0] + image.get_clim()[1]) / 2
for y, row in enumerate(grid):
    for x, value in enumerate(row):
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < middle else "black")
axes.set_xticks(range(len(TASKS)), TASKS)
axes.set_yticks(range(len(losses)), losses)
axes.set(xlabel="task", ylabel="active adapter")
figure.colorbar(image, label="held-out loss (nats per token)")
figure.savefig(OUT / "many_tasks.png")

# %% [markdown]
# ![Held-out loss of each task with each adapter](../../docs/images/notebooks/many_tasks.png)
#
# Read down a column: in each task the lowest loss is that of its own adapter. `topic` and `shout` learned most, and
# make the chat worse than the base does (7.4 and 7.1 instead of 4.4): an adapter is for its task. All of it comes from
# a few steps, and from 12 held-out rows a task.

# %% [markdown]
# ## Switch, and switch off
#
# The active adapter answers. Inside `disable_adapter` none does, and the model is the base.


# %%
@torch.no_grad()
def logits_of(rows, **which):
    inputs = tokenizer([prompt for prompt, _ in rows], padding=True, return_tensors="pt")
    return model(**inputs, **which).logits[:, -1]


def answers_of(rows, **which):
    inputs = tokenizer([prompt for prompt, _ in rows], padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **which)
    return [
        " ".join(text.split())
        for text in tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


examples = [held_out_rows[task][0] for task in TASKS]
by_adapter = {}
for task in TASKS:
    model.set_adapter(task)
    by_adapter[task] = logits_of(examples)
with model.disable_adapter():
    by_adapter["__base__"] = logits_of(examples)

# %% [markdown]
# ## Turn it down, turn it up
#
# `set_scale` multiplies what an adapter adds: 0 is the base, 1 is what was trained.

# %%
SCALES = [0, 0.5, 1, 1.5, 2]
by_scale = {"chat": [], "topic": []}
for task, found in by_scale.items():
    model.set_adapter(task)
    for scale in SCALES:
        model.base_model.set_scale(task, scale)
        found.append(held_out_loss(task))
    model.base_model.set_scale(task, 1)

figure, axes = plt.subplots(figsize=(6, 4))
axes.plot(SCALES, by_scale["chat"], color=BLUE, marker="o", linewidth=2, label="chat, on its task")
axes.plot(SCALES, by_scale["topic"], color=ORANGE, marker="s", linewidth=2, label="topic, on its task")
axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
axes.set(xlabel="scale of the adapter (1: as trained)", ylabel="held-out loss (nats per token)", ylim=(0, None))
axes.grid(alpha=0.3)
axes.legend(frameon=False)
figure.savefig(OUT / "many_scales.png")

# %% [markdown]
# ![Held-out loss over the adapter's scale](../../docs/images/notebooks/many_scales.png)
#
# Half of what `topic` learned is already enough for its task; `chat` changes little between 0.5 and 1. Beyond 1 both
# get worse: more is not better.

# %% [markdown]
# ## Add two up
#
# `add_weighted_adapter` makes a new adapter that is exactly the weighted sum. Here it goes from all `chat` to all
# `topic`.

# %%
SHARES = [0, 0.25, 0.5, 0.75, 1]
by_share = {"chat": [], "topic": []}
for share in SHARES:
    model.add_weighted_adapter(["chat", "topic"], [1 - share, share], "sum")
    model.set_adapter("sum")
    for task, found in by_share.items():
        found.append(held_out_loss(task))
    model.set_adapter("chat")
    model.delete_adapter("sum")

figure, axes = plt.subplots(figsize=(6, 4))
axes.plot(SHARES, by_share["chat"], color=BLUE, marker="o", linewidth=2, label="task chat")
axes.plot(SHARES, by_share["topic"], color=ORANGE, marker="s", linewidth=2, label="task topic")
axes.set(xlabel="share of the topic adapter in the sum", ylabel="held-out loss (nats per token)", ylim=(0, None))
axes.grid(alpha=0.3)
axes.legend(frameon=False)
figure.savefig(OUT / "many_sums.png")

# %% [markdown]
# ![Held-out loss of two tasks over the share of one adapter in the sum](../../docs/images/notebooks/many_sums.png)
#
# Sums are a compromise. With a quarter of `topic`, the chat loses little (3.9 instead of 3.8, the base has 4.4), and
# the topics are far better than with `chat` alone (2.0 instead of 5.6). From a half on, the chat is worse than the
# base. With more than one task to serve, keep the adapters apart, as below.

# %% [markdown]
# ## A batch with an adapter for each row
#
# `adapter_names` names one for each row; `"__base__"` is none. Every row gets what it would get alone.

# %%
requests = [*examples, examples[0]]
names = [*TASKS, "__base__"]
mixed = logits_of(requests, adapter_names=names)
alone = torch.stack([by_adapter[name][row % len(examples)] for row, name in enumerate(names)])
mixed_difference = ((mixed - alone).abs().max() / alone.square().mean().sqrt()).item()
print(f"mixed against one by one: logits differ by at most {mixed_difference:.1e} of their RMS")
assert mixed_difference < 1e-4
for name, (prompt, _), text in zip(names, requests, answers_of(requests, adapter_names=names), strict=True):
    print(f"[{name}] {prompt!r}\n    {text}")

# %% [markdown]
# ## What the mix costs
#
# Eight rows, two for each of the three adapters and two without one, in four ways that take turns: no adapter at all,
# one adapter for all rows, the mixed batch, and one batch for each adapter, one after the other. The time includes
# reading the prompts.

# %%
many = [(prompt, name) for (prompt, _), name in zip(requests, names, strict=True) for _ in range(2)]
inputs = tokenizer([prompt for prompt, _ in many], padding=True, return_tensors="pt")
row_names = [name for _, name in many]


def generate(inputs, **which):
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **which)


def base_alone():
    with model.disable_adapter():
        generate(inputs)


def one_adapter():
    model.set_adapter("chat")
    generate(inputs)


def one_after_the_other():
    for start in range(0, len(many), 2):
        part = {key: value[start : start + 2] for key, value in inputs.items()}
        generate(part, adapter_names=row_names[start : start + 2])


ways = {
    "base": base_alone,
    "one adapter": one_adapter,
    "mixed batch": lambda: generate(inputs, adapter_names=row_names),
    "one by one": one_after_the_other,
}
step_ms = {way: [] for way in ways}
for measured in range(ROUNDS + 1):
    for way, call in ways.items():
        started = time.perf_counter()
        call()
        if measured:  # the first round warms up
            step_ms[way].append(1000 * (time.perf_counter() - started) / NEW_TOKENS)

figure, axes = plt.subplots(figsize=(6.2, 3.6))
for y, (way, found) in enumerate(step_ms.items()):
    low, median, high = statistics.quantiles(found, n=4)
    axes.barh(y, median, color=BLUE if way != "mixed batch" else ORANGE)
    axes.errorbar(median, y, xerr=[[median - low], [high - median]], color="#222222", capsize=4)
axes.set_yticks(range(len(ways)), ways)
axes.invert_yaxis()
axes.set(xlabel="ms for one new token of all rows")
axes.grid(axis="x", alpha=0.3)
figure.savefig(OUT / "many_time.png")
medians = {way: statistics.median(found) for way, found in step_ms.items()}
for way, median in medians.items():
    print(f"{way:12} {median:5.0f} ms, {median / medians['one adapter']:.2f} of one adapter")

# %% [markdown]
# ![Time for one new token in four ways of running eight rows](../../docs/images/notebooks/many_time.png)
#
# Bars are medians of five rounds, whiskers their quartiles. The mixed batch took 1.1 times as long as one adapter for
# all rows; a batch for each adapter, one after the other, took 2.4 times as long. Other programs ran on the two cores
# as well, which the last whisker shows.
#
# Memory needs no stopwatch: it is the weights that are held.


# %%
def mebibytes(keep):
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if keep(name)) / 2**20


base_mib = mebibytes(lambda name: "bone_block" not in name)
adapter_mib = {task: mebibytes(lambda name, task=task: name.endswith(f"bone_block.{task}")) for task in TASKS}

figure, axes = plt.subplots(figsize=(6.2, 3))
held = {"one adapter": [base_mib, adapter_mib["chat"]], "three adapters": [base_mib, sum(adapter_mib.values())]}
held["three merged models"] = [3 * base_mib, 0]
for y, (base_part, adapter_part) in enumerate(held.values()):
    axes.barh(y, base_part, color=BLUE, label="weights of the model" if y == 0 else None)
    axes.barh(y, adapter_part, left=base_part, color=ORANGE, label="adapters" if y == 0 else None)
axes.set_yticks(range(len(held)), held)
axes.invert_yaxis()
axes.set(xlabel="weights in memory (MiB)")
axes.legend(frameon=False, loc="upper right")
figure.savefig(OUT / "many_memory.png")
print(f"model {base_mib:.0f} MiB, adapters", {task: f"{size:.1f} MiB" for task, size in adapter_mib.items()})

# %% [markdown]
# ![Weights in memory: adapters on one model, and merged models](../../docs/images/notebooks/many_memory.png)
#
# The orange ends of the first two bars are the adapters: 2.8 MiB for one, 9.8 MiB for all three, beside the model's
# 513 MiB. A merged model for each task would be three times the model.

# %% [markdown]
# ## Replace one in place, and delete one
#
# A hot swap writes another adapter of the same variant and size into a loaded one: nothing is built or compiled again.

# %%
model.load_adapter(OUT / "chat", adapter_name="slot")
model.set_adapter("slot")
assert torch.equal(logits_of(examples), by_adapter["chat"])
hotswap_adapter(model, OUT / "topic", adapter_name="slot", torch_device="cpu")
assert torch.equal(logits_of(examples), by_adapter["topic"])
model.set_adapter("chat")
model.delete_adapter("slot")
print("left:", list(model.peft_config))

# %% [markdown]
# ## As a LoRA, for a serving engine
#
# `bone` is a LoRA of rank r, exactly. `convert` writes what vLLM loads, and how to start it.

# %%
shutil.rmtree(OUT / "chat-for-vllm", ignore_errors=True)
report = flashbone.convert(OUT / "chat", OUT / "chat-for-vllm", engine="vllm", base=MODEL)
print(*sorted(path.name for path in (OUT / "chat-for-vllm").iterdir()), f"exact: {report.exact}", sep="\n")

plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
lora = PeftModel.from_pretrained(plain, OUT / "chat-for-vllm").eval()
inputs = tokenizer([prompt for prompt, _ in examples], padding=True, return_tensors="pt")
with torch.no_grad():
    lora_logits = lora(**inputs).logits[:, -1]
lora_difference = ((lora_logits - by_adapter["chat"]).abs().max() / lora_logits.square().mean().sqrt()).item()
print(f"LoRA against bone: logits differ by at most {lora_difference:.1e} of their RMS")
assert lora_difference < 1e-4
