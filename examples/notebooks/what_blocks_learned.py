# %% [markdown]
# # What the blocks learned
#
# A small BERT learns to sort news into five topics four times: with Bone, with two of its variants, and with a LoRA of
# the same size. Then we open the adapters and look at what is inside: which layers changed, by how much, and in which
# pattern. Everything runs offline, on a CPU. The figures shown come from a run on two CPU cores, shared with other
# programs; it took 172 s of CPU time.
#
# Once before, in the root of the repository, `make demo-classification` prepares the environment, the model (MiniLM,
# 22M parameters) and the news. Then open this file in VS Code or, with jupytext, in Jupyter, or run it as a script:
#
#     .venv/bin/python -m examples.notebooks.what_blocks_learned

# %%
import json
import random
import sys
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from flashbone import BoneConfig
from flashbone.ops.rotation import rotation_offset

# %% [markdown]
# ## What can be changed
#
# Jupyter starts in the notebook's own folder, a script in the root of the repository; `ROOT` is the latter.

# %%
HERE = Path.cwd()
ROOT = HERE.parents[1] if HERE.name == "notebooks" else HERE
MODEL = ROOT / ".cache/classification/minilm"
NEWS = ROOT / ".cache/classification/news"
OUT = ROOT / ".cache/notebooks/what_blocks_learned"

BLOCK_SIZE = 32  # r
STEPS, BATCH, WORDS = 48, 16, 48
HELD_OUT = 128
HEAD_RATE = 5e-3  # of the new classification head, which every method trains as well
LOOK_AT = "encoder.layer.3.attention.self.query"  # the layer whose change is drawn

# %%
if missing := [path for path in (MODEL, NEWS) if not path.is_dir()]:
    sys.exit(f"{missing[0]} is not there; run in {ROOT}: .venv/bin/python -m examples.classification.prepare")
logging.set_verbosity_error()  # no report that the classification head is new
OUT.mkdir(parents=True, exist_ok=True)
plt.rcParams.update({"font.size": 13, "figure.dpi": 110, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
COLOURS = {"bone": "#0468b3", "bat-row": "#d55e00", "orthogonal": "#009e73", "LoRA": "#222222"}
MARKERS = {"bone": "o", "bat-row": "s", "orthogonal": "^", "LoRA": "x"}  # so that nothing hangs on colour alone

# %% [markdown]
# ## Four adapters
#
# All go on every linear layer of the encoder. `bone` has r numbers for each output; `bat-row` one r x r block for each
# shard of r inputs; `orthogonal` one r x r block for the whole layer, from which a rotation is made. A LoRA of rank
# r / 2 has as many numbers as the first two. Each method has a learning rate of its own; none was searched for.

# %%
LAYERS = r".*encoder.*\.(query|key|value|dense)"
COMMON = {"target_modules": LAYERS, "task_type": TaskType.SEQ_CLS}
METHODS = {
    "bone": (BoneConfig(r=BLOCK_SIZE, variant="bone", **COMMON), 1e-3),
    "bat-row": (BoneConfig(r=BLOCK_SIZE, variant="bat-row", **COMMON), 1e-3),
    "orthogonal": (BoneConfig(r=BLOCK_SIZE, variant="orthogonal", **COMMON), 5e-3),
    "LoRA": (LoraConfig(r=BLOCK_SIZE // 2, lora_alpha=BLOCK_SIZE // 2, **COMMON), 2e-3),
}


def read_news(path, count=None):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:count]
    return [(" ".join(row["text"].split()[:WORDS]), row["label"]) for row in rows]


tokenizer = AutoTokenizer.from_pretrained(MODEL)
train_rows, held_out_rows = read_news(NEWS / "train.jsonl"), read_news(NEWS / "test.jsonl", HELD_OUT)
topics = sorted({topic for _, topic in train_rows})
print(f"{len(train_rows)} articles to learn from, {len(held_out_rows)} held out; topics: {', '.join(topics)}")


# %%
def batch_of(rows):
    texts, labels = zip(*rows, strict=True)
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
    return encoded, torch.tensor([topics.index(label) for label in labels])


def train(model, rate):
    """Plain AdamW with a falling rate; every method sees the same batches."""
    order = random.Random(0)
    blocks = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    optimizer = torch.optim.AdamW([{"params": blocks, "lr": rate}, {"params": head, "lr": HEAD_RATE}], weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / STEPS))
    model.train()
    losses = []
    for _ in range(STEPS):
        inputs, labels = batch_of(order.sample(train_rows, BATCH))
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model):
    inputs, labels = batch_of(held_out_rows)
    return (model.eval()(**inputs).logits.argmax(-1) == labels).float().mean().item()


models, losses, scores = {}, {}, {}
for name, (config, rate) in METHODS.items():
    torch.manual_seed(0)  # of the head, and of LoRA's A
    base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(topics))
    models[name] = get_peft_model(base, config)
    before = accuracy(models[name])
    losses[name] = train(models[name], rate)
    scores[name] = (before, accuracy(models[name]))
    models[name].save_pretrained(OUT / name)
    size = sum(p.numel() for n, p in models[name].named_parameters() if p.requires_grad and "classifier" not in n)
    print(f"{name:10} {size:8,} numbers, held-out accuracy {before:.2f} -> {scores[name][1]:.2f}")

# %% [markdown]
# ## Where the blocks grew
#
# A block starts at zero. How far its entries are from zero now, as a root mean square, says where training worked.

# %%
KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
    "intermediate.dense": "MLP up",
    "output.dense": "MLP down",
}


def adapted_layers(model):
    """Name in the base model -> adapted layer."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.removeprefix("base_model.model.bert."): layer for name, layer in found.items()}


def place(name):
    """Number of the layer, and its kind."""
    number, kind = name.removeprefix("encoder.layer.").split(".", 1)
    return int(number), KINDS[kind]


def block_sizes(model):
    layers = adapted_layers(model)
    grid = torch.zeros(1 + max(place(name)[0] for name in layers), len(KINDS))
    for name, layer in layers.items():
        number, kind = place(name)
        grid[number, list(KINDS.values()).index(kind)] = layer.bone_block["default"].detach().square().mean().sqrt()
    return grid


block_rms = {name: block_sizes(models[name]) for name in ("bone", "bat-row", "orthogonal")}
figure, panels = plt.subplots(3, 1, figsize=(6, 9.5))
for axes, (name, grid) in zip(panels, block_rms.items(), strict=True):
    axes.imshow(grid.numpy(), cmap="cividis", aspect="auto")
    for (number, kind), value in zip(product(*map(range, grid.shape)), (1000 * grid).flatten().tolist(), strict=True):
        dark = value < 500 * (grid.min() + grid.max()).item()
        axes.text(kind, number, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    axes.set(title=f"{name}: RMS of a block's entries, 1/1000", ylabel="encoder layer", yticks=range(len(grid)))
    axes.set_xticks(range(len(KINDS)), KINDS.values(), rotation=20)
figure.savefig(OUT / "blocks_norms.png")

# %% [markdown]
# ![RMS of every block, by encoder layer and kind](../../docs/images/notebooks/blocks_norms.png)
#
# Yellow is large, dark blue small; each picture has its own scale, so read the numbers. Every block was used: in `bone`
# and `bat-row` none is more than about twice as large as another. In all three the largest is in the last layer:
# in `bone` the attention's output and the first layer of the MLP, in `bat-row` the values, in `orthogonal` the last
# layer of the MLP. AdamW's steps are about as long for small gradients as for large ones: that keeps such maps even.

# %% [markdown]
# ## How large the change is beside the weight
#
# `get_delta_weight` returns what an adapter adds to its layer's weight, for every variant and for LoRA. Its Frobenius
# norm over that of the weight is the relative change.


# %%
@torch.no_grad()
def deltas_of(model):
    return {name: layer.get_delta_weight("default") for name, layer in adapted_layers(model).items()}


deltas = {method: deltas_of(model) for method, model in models.items()}
weights = {name: layer.get_base_layer().weight.detach() for name, layer in adapted_layers(models["bone"]).items()}
relative = {
    method: {name: (delta.norm() / weights[name].norm()).item() for name, delta in found.items()}
    for method, found in deltas.items()
}

figure, axes = plt.subplots(figsize=(6.4, 4.6))
for shift, (method, changes) in enumerate(relative.items()):
    x = [list(KINDS.values()).index(place(name)[1]) + 0.18 * (shift - 1.5) for name in changes]
    y = [100 * change for change in changes.values()]
    axes.scatter(x, y, color=COLOURS[method], marker=MARKERS[method], s=36, label=method, alpha=0.8)
axes.set_xticks(range(len(KINDS)), KINDS.values(), rotation=20)
axes.set(ylabel="change, % of the weight's norm", yscale="log")
ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_ylim()[0] < tick < axes.get_ylim()[1]]
axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
axes.minorticks_off()
axes.grid(axis="y", alpha=0.3)
axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=0.6, handletextpad=0.1)
figure.savefig(OUT / "blocks_change.png")
for method, changes in relative.items():
    print(f"{method:10} median {100 * sorted(changes.values())[len(changes) // 2]:.1f} % of the weight's norm")

# %% [markdown]
# ![How large each layer's change is beside its weight, in four methods](../../docs/images/notebooks/blocks_change.png)
#
# One mark is one encoder layer. `bone` changed its weights by 5 to 13 %, `bat-row` by 6 to 13 %, LoRA by 2 to 8 %, and
# `orthogonal` by 37 to 66 %, with an eighteenth of the numbers. Yet the four sort the held-out news about equally well:
# 0.90, 0.92, 0.89 and 0.91 of 128 articles, where one article is 0.8 points. The size of a change does not say what it
# is worth; it also goes with the learning rate, which is five times that of `bone` for `orthogonal`.

# %% [markdown]
# ## The pattern of a change
#
# Four shards of inputs and outputs of one layer's change, in each method. Lines lie where a shard of r features ends.

# %%
shown = min(4 * BLOCK_SIZE, *weights[LOOK_AT].shape)
figure, panels = plt.subplots(2, 2, figsize=(6.4, 6.4), sharex=True, sharey=True)
for axes, (method, found) in zip(panels.flat, deltas.items(), strict=True):
    part = found[LOOK_AT][:shown, :shown]
    limit = part.abs().quantile(0.99).item()
    axes.imshow(
        part.numpy(), cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest", extent=(0, shown, shown, 0)
    )
    ends = range(0, shown + 1, BLOCK_SIZE)
    axes.set(title=method, xticks=ends, yticks=ends)
    axes.grid(color="#222222", linewidth=0.8)
figure.supxlabel("input feature")
figure.supylabel("output feature")
figure.savefig(OUT / "blocks_patterns.png")

bone_delta = deltas["bone"][LOOK_AT]
shards = bone_delta.split(BLOCK_SIZE, dim=1)
assert all(torch.equal(shard, shards[0][:, : shard.shape[1]]) for shard in shards)  # equal to the bit

# %% [markdown]
# ![A part of one layer's change, in four methods](../../docs/images/notebooks/blocks_patterns.png)
#
# Orange is below zero, purple above, and each picture has its own scale. In `bone` the four columns of squares are the
# same picture four times: along the input its change repeats every r features, to the bit, which the last line checks.
# Along the output it does not. `bat-row` and `orthogonal` multiply the weight, and no repeat can be seen in
# what they add. The LoRA is striped: whole rows and columns are strong or weak together.

# %% [markdown]
# ## How many directions a change has
#
# The singular values of the same layer's change, each method's largest as 1. How many are not zero is the rank.

# %%
singular_values = {method: torch.linalg.svdvals(found[LOOK_AT].double()) for method, found in deltas.items()}
ranks = {method: int((values > 1e-5 * values[0]).sum()) for method, values in singular_values.items()}

figure, axes = plt.subplots(figsize=(6, 4.4))
for method, values in singular_values.items():
    relative_values = (values / values[0])[: ranks[method]].tolist()
    axes.plot(range(1, len(relative_values) + 1), relative_values, color=COLOURS[method], linewidth=2)
    end = (len(relative_values), relative_values[-1])
    label = f"{method}, rank {ranks[method]}"
    axes.plot(*end, color=COLOURS[method], marker=MARKERS[method], markersize=8, label=label)
axes.axvline(BLOCK_SIZE, color="#777777", linestyle="--", linewidth=1)
axes.text(BLOCK_SIZE, 1.1, " r", color="#555555", fontweight="bold")
axes.set(xlabel="number of the singular value", ylabel="singular value / largest", xscale="log", yscale="log")
axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend(frameon=False, loc="lower left")
figure.savefig(OUT / "blocks_rank.png")
print("ranks:", ranks)

# %% [markdown]
# ![Singular values of one layer's change, in four methods](../../docs/images/notebooks/blocks_rank.png)
#
# Counted are singular values above 1/100,000 of the largest. `bone` stops at r = 32, the most that it can have; the
# LoRA of the same size stops at 16. Among its 16 the LoRA's first stands out: its second is a fifth of it, while that
# of `bone` is above a half. `bat-row` and `orthogonal` have nearly all of the layer's 384 directions. That is why they
# have no exact LoRA of a small rank: the 32nd of `orthogonal` is still 0.6 of its first, that of `bat-row` 0.13.

# %% [markdown]
# ## How far the rotations turn
#
# The block of `orthogonal` stands for a rotation Q of r features, that is r / 2 planes, each turned by an angle of its
# own. The angles are those of the eigenvalues of Q, which come in pairs.


# %%
@torch.no_grad()
def angles_of(block):
    Q = torch.eye(len(block)) + rotation_offset(block, use_orthogonal=True, eps=1e-6)
    assert (Q.T @ Q - torch.eye(len(block))).abs().max() < 1e-5  # it is a rotation
    turned = torch.linalg.eigvals(Q.double()).angle().rad2deg()
    return turned.sort(descending=True).values[: len(block) // 2].tolist()


angles = {name: angles_of(layer.bone_block["default"]) for name, layer in adapted_layers(models["orthogonal"]).items()}

figure, axes = plt.subplots(figsize=(6.4, 4.4))
last = max(place(name)[0] for name in angles)
for name, turned in angles.items():
    number, kind = place(name)
    x = list(KINDS.values()).index(kind) + 0.7 * (number / max(1, last) - 0.5)
    axes.scatter([x] * len(turned), turned, s=12, color=plt.get_cmap("viridis")(0.85 * number / max(1, last)))
    axes.plot(x, turned[0], marker="_", markersize=12, color="#222222")
axes.set_xticks(range(len(KINDS)), KINDS.values(), rotation=20)
axes.set(ylabel="angle of a plane (degrees)", ylim=(0, None))
axes.set_xlabel(f"kind of layer; in each, encoder layers 0 to {last} from left to right", fontsize=11)
axes.grid(axis="y", alpha=0.3)
figure.savefig(OUT / "blocks_angles.png")
largest_angle = max(turned[0] for turned in angles.values())
print(f"the largest angle is {largest_angle:.0f} degrees")

# %% [markdown]
# ![Angles of all planes of all rotations](../../docs/images/notebooks/blocks_angles.png)
#
# One column of dots is one rotation, one dot one of its 16 planes; a bar marks the largest. The planes of every
# rotation spread evenly, from a few degrees or less up to its largest, which is between 38 and 66. In each of the six
# kinds, the last encoder layer (the lightest dots, on the right) has the plane that turned furthest.
