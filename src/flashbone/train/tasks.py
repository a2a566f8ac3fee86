"""The tasks of a recipe in one table: what each trains, by which trainer, and what it measures of held-out rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["sft", "dpo", "kto", "reward", "grpo", "classification"]

# Of a language model's `training`, where TRL's class lacks them.
_OF_TOKENIZER: dict[str, Any] = {"chat_template_path": str | None, "eos_token": str | None}

# Figures of held-out rows: their names in metrics.jsonl, in summary.json (with _before and _after), and in words.
MEASURED = (
    ("eval_loss", "eval_loss", "held-out loss"),
    ("eval_accuracy", "eval_accuracy", "held-out accuracy"),
    ("eval_macro_f1", "eval_macro_f1", "held-out macro-F1"),
    ("eval_rewards/accuracies", "eval_reward_accuracy", "held-out reward accuracy"),
    ("eval_rewards/margins", "eval_reward_margin", "held-out reward margin"),
    ("eval_reward", "eval_reward", "held-out reward"),
)


@dataclass(frozen=True)
class TaskKind:
    """What a task is.

    Attributes:
        arguments: the class that `training` is passed to.
        trainer: the class of its trainer.
        more: names in `training` beyond the fields of that class, with their types.
        is_trl: whether these are TRL's, or else transformers'.
        task_type: PEFT's name for it.
        learning_rate: unless the recipe sets another.
        answers: whether the model answers prompts, so that answers can be shown.
    """

    arguments: str
    trainer: str
    more: Mapping[str, Any] = field(default_factory=dict)
    is_trl: bool = True
    task_type: str = "CAUSAL_LM"
    learning_rate: float = 2e-4
    answers: bool = True

    @property
    def is_classifier(self) -> bool:
        """Whether the model has a head of its own in the place of its vocabulary."""
        return self.task_type == "SEQ_CLS"

    def arguments_class(self) -> type:
        """The class that `training` is passed to."""
        return _imported(self.arguments, self.is_trl)

    def trainer_class(self) -> type:
        """The class of its trainer."""
        return _imported(self.trainer, self.is_trl)


TASKS: dict[Task, TaskKind] = {
    "sft": TaskKind("SFTConfig", "SFTTrainer"),
    "dpo": TaskKind("DPOConfig", "DPOTrainer", _OF_TOKENIZER, learning_rate=5e-5),
    "kto": TaskKind("KTOConfig", "KTOTrainer", _OF_TOKENIZER, learning_rate=5e-5),
    "reward": TaskKind("RewardConfig", "RewardTrainer", task_type="SEQ_CLS", answers=False),
    "grpo": TaskKind("GRPOConfig", "GRPOTrainer", _OF_TOKENIZER, learning_rate=5e-5),
    "classification": TaskKind(
        "TrainingArguments", "Trainer", {"max_length": int | None}, is_trl=False, task_type="SEQ_CLS", answers=False
    ),
}


def _imported(name: str, is_trl: bool) -> Any:
    if is_trl:
        import trl as library  # which imports its parts when they are asked for
    else:
        import transformers as library
    return getattr(library, name)
