"""A conversation with a model: its turns, and the memory that answers go on from."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from flashbone.errors import ConfigError
from flashbone.files import outputs
from flashbone.generation.speaker import BLANK_LINE, Speaker, Writing
from flashbone.train.data.tokens import Talk
from flashbone.train.decoding import Decoding, positions

Write = Callable[[str], None]
STAND_IN = "\u2063answer\u2063"  # in an answer's place, to see what a template writes after it
LEAST_ROOM = 8  # tokens


@dataclass
class Past:
    """What the model has seen.

    Attributes:
        ids: all tokens, the last answer's included.
        past: the model's memory.
        seen: so many of the tokens are in it.
    """

    ids: list[int]
    past: Any
    seen: int


@dataclass
class Chat:
    """A conversation.

    Attributes:
        adapter: the name of the one that answers; None for the base alone.
        system: the system prompt.
        turns: questions and answers so far.
        processed: tokens that went through the model for the last prompt.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    speaker: Speaker
    decoding: Decoding
    adapter: str | None = None
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    memory: Past | None = None
    processed: int = 0

    def __post_init__(self) -> None:
        if self.speaker.tokenizer.chat_template is None:
            raise ConfigError(
                f"{self.speaker.base}: its tokenizer has no chat template; give one with --chat-template FILE.jinja,"
                " or let it go on with a text by `flashbone generate --prompt`"
            )
        if self.decoding.seed is not None:
            torch.manual_seed(self.decoding.seed)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the chat template sees it."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def use(self, adapter: str | None) -> None:
        """Answer with another adapter from here on.

        Raises:
            ConfigError: there is no such adapter.
        """
        names = list(self.speaker.keys)
        if adapter is not None and adapter not in names:
            listed = f"there are {', '.join(names)}, and off" if names else "there are none; start with --adapter A"
            raise ConfigError(f"adapter {adapter}: no such name; {listed}")
        if adapter != self.adapter:
            self.adapter, self.memory = adapter, None

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns, self.memory = [], None

    def say(self, text: str, write: Write) -> bool:
        """Ask, and hand the answer on word by word; returns whether it ended by itself.

        On Ctrl-C what was written so far is the answer, and KeyboardInterrupt is raised. A question without any word of
        an answer is no turn.

        Raises:
            ConfigError: the conversation is too long.
            FormatError: the chat template refuses it.
        """
        self.turns.append({"role": "user", "content": text})
        speaker = self.speaker
        writing = Writing(speaker.tokenizer, write, speaker.stops)
        ids, past = [], None
        try:
            ids, past = self._next()
            decoding = self._fitting(len(ids))
            self.processed = len(ids) - (0 if past is None else past.get_seq_length())
            past = speaker.stream(ids, self.adapter, decoding, writing, past)
        except KeyboardInterrupt:
            # A state changes only when a call ends; other memories may be cut off in the middle.
            self._remember(ids, writing, past if speaker.is_rwkv else None)
            raise
        except Exception:
            self.turns.pop()
            self.memory = None
            raise
        self._remember(ids, writing, past)
        return writing.ids[-1:] != [] and writing.ids[-1] in speaker.stops

    def _remember(self, ids: list[int], writing: Writing, past: Any) -> None:
        answer = self.speaker.text(writing.ids)
        if not answer.strip():  # templates refuse such a turn
            self.turns.pop()
            self.memory = None
            return
        self.turns.append({"role": "assistant", "content": answer})
        self.memory = None if past is None else Past([*ids, *writing.ids], past, past.get_seq_length())

    def _next(self) -> tuple[list[int], Any]:
        """The tokens that the model is to answer, and the memory of their beginning."""
        memory = self.memory
        if self.speaker.is_rwkv:
            return self._next_of_a_state(memory)
        talk = Talk(self.messages, [], self.speaker.tokenizer, {})  # pyright: ignore[reportArgumentType]
        ids = talk.ids(talk.written(talk.messages, answer_follows=True))
        if memory is None:
            return ids, None
        pairs = zip(memory.ids[: memory.seen], ids[:-1], strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if shared < memory.seen:
            try:
                memory.past.crop(shared - memory.seen)
            except (AttributeError, NotImplementedError, ValueError):  # one that cannot go back, as of a window
                return ids, None
        return ids, memory.past

    def _next_of_a_state(self, memory: Past | None) -> tuple[list[int], Any]:
        """A state has seen what was said and cannot go back, so it gets what comes after that alone: a turn costs the
        same however long the conversation is."""
        from flashbone.rwkv.state import RwkvState

        tokenizer = self.speaker.tokenizer
        if memory is None:
            talk = Talk(self.messages, [], tokenizer, {})  # pyright: ignore[reportArgumentType]
            return talk.ids(talk.written(talk.messages, answer_follows=True)), RwkvState()
        last = [{"role": "user", "content": "-"}, {"role": "assistant", "content": STAND_IN}, self.turns[-1]]
        talk = Talk(last, [], tokenizer, {})  # pyright: ignore[reportArgumentType]
        rest = talk.written(talk.messages, answer_follows=True).partition(STAND_IN)[2]
        if memory.ids and tokenizer.decode(memory.ids[-1:]) == BLANK_LINE:
            rest = rest.removeprefix(BLANK_LINE)
        memory.past.tokens_seen = 0
        return [*memory.ids[memory.seen :], *talk.ids(rest)], memory.past

    def _fitting(self, tokens: int) -> Decoding:
        """The decoding with as many new tokens as the model has positions left."""
        limit = positions(self.speaker.model)
        if limit is None or self.speaker.is_rwkv or tokens + self.decoding.max_new_tokens <= limit:
            return self.decoding
        if limit - tokens < LEAST_ROOM:
            raise ConfigError(
                f"the conversation has {tokens} tokens, and the model sees {limit}; /reset begins a new one"
            )
        return replace(self.decoding, max_new_tokens=limit - tokens)

    def compare(self, text: str | None = None) -> Iterator[tuple[str, str]]:
        """What the base and each adapter answer to a question, or to the last one again; it becomes no turn.

        Raises:
            ConfigError: there is no question.
        """
        asked = [turn for turn in self.turns if turn["role"] == "user"]
        before = self.turns
        if text is None:
            if not asked:
                raise ConfigError("/compare: there is no question yet; ask one, or give it: /compare What is ...?")
            before = self.turns[: max(i for i, turn in enumerate(self.turns) if turn["role"] == "user")]
        question = text if text is not None else asked[-1]["content"]
        for adapter in (None, *self.speaker.keys):
            other = replace(
                self, adapter=adapter, turns=list(before), memory=None, decoding=replace(self.decoding, seed=self._seed)
            )
            other.say(question, lambda words: None)
            answers = other.turns[len(before) + 1 :]
            yield adapter or "base", answers[0]["content"] if answers else ""

    @property
    def _seed(self) -> int | None:
        """All of a comparison draw the same numbers."""
        return (self.decoding.seed or 0) if self.decoding.samples else None

    def save(self, file: Path) -> None:
        """Write the conversation as a row that `flashbone train` reads.

        Raises:
            ConfigError: there is nothing to write.
            FlashboneError: the file exists, or cannot be written.
        """
        if not self.turns:
            raise ConfigError("/save: nothing has been said yet")
        outputs.check(file, 2**16, None, is_file=True)
        row = {"messages": self.messages, "model": self.speaker.base, "adapter": self.adapter}
        outputs.write_text(file, json.dumps(row, ensure_ascii=False) + "\n")
