"""The published snippets of the orthogonal variant as they are written, on the architectures that they name."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from flashbone import BoneConfig
from flashbone.train.monitor import trained_rotations

TOKENS = torch.randint(1000, (2, 12), generator=torch.Generator().manual_seed(0))


def bert(layers: int = 12):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers))  # else the shape of bert-base-uncased


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=6))  # gpt2, cut to half its layers


def losses_of(model, labels, steps: int = 5, lr: float = 5e-3) -> list[float]:
    # Both models start at a loss near chance, and nothing but the adapters is trained.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
def test_text_classification_on_bert_base():
    from peft import get_peft_model

    config = BoneConfig(
        bottleneck_size=64,
        target_modules=["attention.output"],
        dropout=0.1,
        use_orthogonal=True,
        orthogonal_eps=1e-6,
    )
    model = get_peft_model(bert(), config)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 12 * 64 * 64
    assert trainable / total <= 0.0005
    assert config.target_modules == {"attention.output.dense"}
    losses = losses_of(model.eval(), torch.tensor([0, 1]))
    assert losses[-1] < 0.3 * losses[0]
    for variant, P in trained_rotations(model).values():
        assert P.detach().abs().max() > 0.005
        assert variant.orthogonality_error(P) <= 2e-6 + 1e-6


@pytest.mark.slow
def test_a_small_model_on_gpt2():
    from peft import get_peft_model

    config = BoneConfig(
        bottleneck_size=32,
        target_modules=["attention.output"],
        dropout=0.05,
        use_orthogonal=True,
        orthogonal_eps=1e-6,
    )
    model = get_peft_model(gpt2(), config)
    assert model.get_nb_trainable_parameters()[0] == 6 * 32 * 32
    assert config.target_modules == {"attn.c_proj"}
    losses = losses_of(model.eval(), TOKENS)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("bottleneck_size", "dropout", "eps"),
    [(128, 0.15, 1e-5), *(pytest.param(*row, marks=pytest.mark.slow) for row in ((32, 0.0, 1e-8), (256, 0.3, 1e-4)))],
)
@pytest.mark.parametrize(
    ("make", "per_layer"), [pytest.param(bert, 2, id="bert"), pytest.param(gpt2, 2, id="gpt2", marks=pytest.mark.slow)]
)
def test_the_advanced_configuration(make, per_layer, bottleneck_size, dropout, eps):
    from peft import get_peft_model

    config = BoneConfig(
        bottleneck_size=bottleneck_size,
        target_modules=["attention.output", "intermediate"],
        dropout=dropout,
        use_orthogonal=True,
        orthogonal_eps=eps,
    )
    base = bert(4) if make is bert else make()
    layers = base.config.num_hidden_layers
    model = get_peft_model(base, config)
    assert model.get_nb_trainable_parameters()[0] == layers * per_layer * bottleneck_size**2
    labels = torch.tensor([0, 1]) if make is bert else TOKENS
    losses = losses_of(model.train(), labels, steps=2)
    assert all(torch.isfinite(torch.tensor(losses)))
    blocks = trained_rotations(model)
    assert len(blocks) == layers * per_layer
    assert all(P.detach().abs().max() > 0.002 for _, P in blocks.values())
    assert all(variant.eps == eps for variant, _ in blocks.values())
