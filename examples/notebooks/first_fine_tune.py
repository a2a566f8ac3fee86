# %% [markdown]
# # A first fine-tune
#
# A small chat model learns the short, cheeky answers of a chat corpus. Then we save what it learned, load it again, and
# merge it into the model. Everything runs offline, on a CPU. The figures shown come from a run on two CPU cores, shared
# with other programs; it took 162 s of CPU time.
#
# Once before, in the root of the repository, `make demo` prepares the environment, the model (SmolLM2-135M-Instruct)
# and the chats. Then open this file in VS Code or, with jupytext, in Jupyter, or run it as a script:
#
#     .venv/bin/python -m examples.notebooks.first_fine_tune

# %%
import json
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from flashbone import BoneConfig  # also registers Bone with PEFT

# %% [markdown]
# ## What can be changed
#
# Jupyter starts in the notebook's own folder, a script in the root of the repository; `ROOT` is the latter.

# %%
HERE = Path.cwd()
ROOT = HERE.parents[1] if HERE.name == "notebooks" else HERE
MODEL = ROOT / ".cache/demo/smollm2"
CHATS = ROOT / ".cache/demo/chat"
OUT = ROOT / ".cache/notebooks/first_fine_tune"

BLOCK_SIZE = 64
TARGETS = ["q_proj", "v_proj"]
STEPS, BATCH, LEARNING_RATE = 32, 4, 1e-3
HELD_OUT = 64
QUESTIONS = ["Are you a robot?", "Do you get angry?", "What is your favorite food?"]  # not in the training data

# %%
if missing := [path for path in (MODEL, CHATS) if not path.is_dir()]:
    sys.exit(f"{missing[0]} is not there; run in {ROOT}: .venv/bin/python -m examples.demo.prepare")
warnings.filterwarnings("ignore", category=FutureWarning)  # TRL calls what transformers has renamed
OUT.mkdir(parents=True, exist_ok=True)
plt.rcParams.update({"font.size": 13, "figure.dpi": 110, "figure.constrained_layout.use": True, "axes.grid": True})
plt.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, BLACK = "#0468b3", "#d55e00", "#222222"  # told apart by the colour-blind, and in grey


# %% [markdown]
# ## The model, before


# %%
def load_base():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def answer(model, question):
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return " ".join(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split())


tokenizer = AutoTokenizer.from_pretrained(MODEL)
base = load_base()
before = [answer(base, question) for question in QUESTIONS]
for question, text in zip(QUESTIONS, before, strict=True):
    print(f"{question:30} {text}")

# %% [markdown]
# ## The data
#
# Each row is a question and an answer. TRL takes them as a `prompt` and a `completion`, puts the model's chat template
# around them, and learns from the answer alone. No question of the test file is in the training file.


# %%
def read_chats(path, count=None):
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"prompt": row[:1], "completion": row[1:]} for row in rows[:count]]


train_rows = read_chats(CHATS / "train.jsonl")
held_out_rows = read_chats(CHATS / "test.jsonl", HELD_OUT)
print(f"{len(train_rows)} rows to learn from, {len(held_out_rows)} held out; the first:")
print(train_rows[0])

# %% [markdown]
# ## The adapter
#
# One line attaches Bone to the queries and values of every layer. The model's own weights are frozen. Each adapted
# layer gets one block, r rows by as many columns as the layer has outputs. All blocks start at zero: so far nothing
# changed.

# %%
model = get_peft_model(base, BoneConfig(r=BLOCK_SIZE, variant="bone", target_modules=TARGETS))
model.print_trainable_parameters()
block_shapes = {name.split(".")[-3]: tuple(p.shape) for name, p in model.named_parameters() if "bone_block" in name}
print("blocks:", block_shapes)

# %% [markdown]
# ## Training
#
# Any trainer will do; this is TRL's. It measures the held-out loss before the first step and every quarter of the way.


# %%
def row_losses(model, rows):
    """The loss of each row's answer by itself, in nats a token."""
    losses = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        labels = [-100] * len(prompt) + whole[len(prompt) :]  # -100: not counted
        with torch.no_grad():
            losses.append(model(torch.tensor([whole]), labels=torch.tensor([labels])).loss.item())
    return losses


rows_before = row_losses(model.eval(), held_out_rows)
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        str(OUT / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=16,
        learning_rate=LEARNING_RATE,
        warmup_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=max(1, STEPS // 4),
        eval_on_start=True,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,  # it saves memory and costs time
        seed=0,
    ),
    train_dataset=Dataset.from_list(train_rows),
    eval_dataset=Dataset.from_list(held_out_rows),
    processing_class=tokenizer,
)
trainer.train()
rows_after = row_losses(model.eval(), held_out_rows)

# %%
history = trainer.state.log_history
train_loss = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
held_out_loss = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]

figure, axes = plt.subplots(figsize=(6, 4))
axes.plot(*zip(*train_loss, strict=True), color=BLUE, linewidth=1, label=f"training, {BATCH} rows a step")
axes.plot(*zip(*held_out_loss, strict=True), color=ORANGE, linewidth=2.5, marker="o", label="held out")
axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
axes.legend(frameon=False)
figure.savefig(OUT / "first_loss.png")

# %% [markdown]
# ![Loss over the steps, training and held out](../../docs/images/notebooks/first_loss.png)
#
# Look at the orange line. The held-out loss fell from 3.87 to 2.79 in the first 8 steps and to 2.62 in the other 24,
# and was still falling slowly. The blue line jumps from step to step, since each step sees four other rows: it is no
# measure of progress here.

# %%
figure, axes = plt.subplots(figsize=(5.6, 5.2))
limit = 1.05 * max(rows_before + rows_after)
axes.plot([0, limit], [0, limit], color=BLACK, linewidth=1, linestyle="--", label="unchanged")
axes.scatter(rows_before, rows_after, color=BLUE, edgecolors="white", s=50, label="one held-out row")
axes.set(xlabel="loss before (nats per token)", ylabel="loss after (nats per token)", xlim=(0, limit), ylim=(0, limit))
axes.set_aspect("equal")
axes.legend(frameon=False, loc="upper left")
figure.savefig(OUT / "first_rows.png")

improved = sum(after < before for before, after in zip(rows_before, rows_after, strict=True))
print(f"held-out loss {held_out_loss[0][1]:.2f} before, {held_out_loss[-1][1]:.2f} after; {improved} rows got better")

# %% [markdown]
# ![Loss of every held-out row before and after](../../docs/images/notebooks/first_rows.png)
#
# A dot below the dashed line is a row that got better: 63 of 64 did. So the mean did not fall by a few rows alone. The
# dots far below the line are answers that became much likelier.

# %% [markdown]
# ## The model, after
#
# The same questions, with the adapter, and without it: it can be switched off at any time.

# %%
after = [answer(model, question) for question in QUESTIONS]
for question, *texts in zip(QUESTIONS, before, after, strict=True):
    print(question, *texts, sep="\n    ")
with model.disable_adapter():
    switched_off = answer(model, QUESTIONS[0])
assert switched_off == before[0]

# %% [markdown]
# ## Save, and load again
#
# The adapter's folder holds the blocks, their configuration and a card that says how to load them. It goes onto a fresh
# copy of the base, and computes the same logits to the bit.

# %%
model.save_pretrained(OUT / "adapter")
for path in sorted((OUT / "adapter").iterdir()):
    print(f"{path.name:30} {path.stat().st_size / 2**20:8.2f} MiB")

inputs = tokenizer(QUESTIONS, padding=True, return_tensors="pt")
loaded = PeftModel.from_pretrained(load_base(), OUT / "adapter").eval()
with torch.no_grad():
    trained_logits = model(**inputs).logits
    loaded_logits = loaded(**inputs).logits
assert torch.equal(loaded_logits, trained_logits)

# %% [markdown]
# ## Merge
#
# `merge_and_unload` adds the blocks to the weights. What is left is a plain model of transformers, as fast as the base,
# which needs no flashbone. Each weight was rounded once, so its logits agree to rounding.

# %%
merged = loaded.merge_and_unload()
with torch.no_grad():
    merged_logits = merged(**inputs).logits
spread = trained_logits.square().mean().sqrt()
difference = ((merged_logits - trained_logits).abs().max() / spread).item()
print(f"merged against adapter: logits differ by at most {difference:.1e} of their RMS")
assert difference < 1e-4

merged.save_pretrained(OUT / "merged")
tokenizer.save_pretrained(OUT / "merged")

# %% [markdown]
# ## From here
#
# - Another variant is another word: `variant="bat-row"`, `"bat-col"`, `"mini"`, `"orthogonal"`.
# - The learning rate decides more than the variant. Try two or three.
# - `target_modules="all-linear"` adapts every linear layer.
# - `flashbone train` does all of this from one YAML file; `examples/demo/demo.yaml` is nearly this notebook.
