"""What a training changed, to be read: answers to held-out prompts before and after, or rows of a wrong class."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from flashbone.train.data.images import has_images
from flashbone.train.data.loading import Data
from flashbone.train.data.tokens import Talk, tokenise
from flashbone.train.decoding import Decoding, answering, continuations, positions, text_of
from flashbone.train.tokenizers import stop_tokens

log = logging.getLogger(__name__)

NEW_TOKENS = 64
MOST_OF_A_TEXT = 400  # characters that summary.json keeps of a prompt
LOOKED_AT = 50  # held-out rows, at least, for prompts that are not the same
CLASSIFIED = 500  # held-out rows in which wrong classes are looked for


@dataclass(frozen=True)
class Sample:
    """An answer before and after, or a wrong class.

    Attributes:
        prompt: the end of a held-out prompt, or a text.
        wanted: the answer in the data, or the right class.
        before: what the model answered before training; of a class null.
        after: what it answers now.
    """

    prompt: str
    wanted: str
    before: str | None
    after: str


@dataclass
class Samples:
    """Held-out rows that are shown.

    Attributes:
        count: How many.
        prompts: Tokens of prompts, none of a classifier's.
        texts: The end of each prompt, and the answer that is wanted.
        before: What the model answered before training.
    """

    trainer: Any
    data: Data
    count: int
    prompts: list[list[int]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    before: list[str] = field(default_factory=list)

    @property
    def _is_classifier(self) -> bool:
        return bool(self.data.labels)

    def ask_before(self) -> None:
        """Let the model answer, in the main process alone; the state of random numbers stays what it was."""
        if not self.data.eval or not self.count or self._is_classifier:
            return
        if has_images(self.data.eval):
            log.info("samples: rows with images are not shown; samples: 0 leaves this line out")
            return
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            log.info("samples: the model is sharded, so no answers are shown; samples: 0 leaves this line out")
            return
        self._choose()
        self.before = self._answers()

    def after(self) -> list[Sample]:
        """The samples of a trained model. Every process calls this."""
        if not self.data.eval or not self.count:
            return []
        if self._is_classifier:
            return self._wrong_classes()
        asked = zip(self.texts, self.before, self._answers() if self.prompts else [], strict=True)
        return [Sample(prompt, wanted, before, after) for (prompt, wanted), before, after in asked]

    def _choose(self) -> None:
        """Rows from all over the held-out ones: at most `count` that have a prompt, each another one."""
        rows, tokenizer = self.data.eval, self.trainer.processing_class
        assert rows is not None
        limit = positions(self.trainer.model)
        spread = range(0, len(rows), max(1, len(rows) // self.count))
        for number in dict.fromkeys([*spread, *range(min(len(rows), LOOKED_AT))]):
            if len(self.prompts) == self.count:
                return
            asked = _asked({name: value for name, value in rows[number].items() if value is not None}, tokenizer)
            if asked is not None:
                ids, prompt, wanted = asked
                ids = ids if limit is None else ids[-max(1, limit - NEW_TOKENS) :]
                if ids in self.prompts:
                    continue
                self.prompts.append(ids)
                self.texts.append((prompt[-MOST_OF_A_TEXT:], wanted[:MOST_OF_A_TEXT]))

    def _answers(self) -> list[str]:
        if self.trainer.args.process_index != 0:
            return [""] * len(self.prompts)
        accelerator, tokenizer = self.trainer.accelerator, self.trainer.processing_class
        model = accelerator.unwrap_model(self.trainer.model)
        stops, decoding = stop_tokens(model, tokenizer), Decoding(NEW_TOKENS)
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with answering(model), torch.random.fork_rng(cuda):
            answers = continuations(model, tokenizer, self.prompts, stops, decoding, amp=accelerator.autocast)
        return [text_of(tokenizer, ids, stops) for ids in answers]

    def _wrong_classes(self) -> list[Sample]:
        rows, labels = self.data.eval, self.data.labels
        assert rows is not None
        held_out = self.trainer.eval_dataset
        logits = self.trainer.predict(held_out.select(range(min(len(held_out), CLASSIFIED)))).predictions
        predicted = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
        pairs = [(rows[number], labels[predicted[number]]) for number in range(len(predicted))]
        wrong = [(row, got) for row, got in pairs if row["label"] != got][: self.count]
        return [Sample(row["text"][:MOST_OF_A_TEXT], row["label"], None, got) for row, got in wrong]


def _asked(example: dict[str, Any], tokenizer: Any) -> tuple[list[int], str, str] | None:
    """The tokens of an example's first prompt, its end as text, and the answer; None where there is nothing to ask.

    Of a text, of which every token is learned, the beginning is the prompt.
    """
    row = tokenise(example, tokenizer)[0]
    start = row.learned.index(True) if True in row.learned else 0
    if start == 0:
        start = min(len(row.ids) // 2, NEW_TOKENS)
    if not 0 < start < len(row.ids):
        return None
    learned_end = row.ends[0] if row.ends else len(row.ids)
    prompt, wanted = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (row.ids[:start], row.ids[start:learned_end])
    )
    if "conversation" in example:
        talk = Talk.read(example["conversation"], tokenizer)
        prompt = next(m["content"] for m in reversed(talk.messages[: talk.learned.index(True)]))
    return row.ids[:start], prompt, wanted
