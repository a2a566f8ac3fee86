"""The tokenizer of RWKV's world models for transformers: greedy longest match over UTF-8 bytes, exact and fast."""

import os
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from flashbone.errors import FormatError
from flashbone.rwkv.longest_match import LongestMatch
from flashbone.rwkv.vocabulary import VOCABULARY_NAME, packaged_vocabulary, read_vocabulary, write_vocabulary

END_OF_TEXT = "<|endoftext|>"  # id 0: between documents in pretraining; no vocabulary file has it
END_OF_ANSWER = "\x17"  # token 24, by which RWKV-PEFT ends answers

# "\n\n" separates rounds in pretraining, so no content may hold it, and no space may follow the last "Assistant:"
# (the tokens that answers begin with hold it); both as the cards of RWKV-7 World and G1 say.
CHAT_TEMPLATE = """\
{%- set names = {'system': 'System', 'user': 'User', 'assistant': 'Assistant'} -%}
{%- for message in messages -%}
{%- if message['role'] not in names -%}
{{- raise_exception("RWKV's chat format has the roles system, user and assistant, not " + message['role']) -}}
{%- endif -%}
{%- set lines = message['content'].replace('\\r\\n', '\\n').strip().split('\\n') | select -%}
{{- names[message['role']] + ': ' + lines | join('\\n') + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""

_UNKNOWN = "\ufffd"


class RwkvTokenizer(PreTrainedTokenizer):
    """Encodes as the `rwkv` package does, token for token, and decodes what it encoded exactly.

    `vocab_file` is a vocabulary file; without one, that of the installed `rwkv` package is taken. `"<|endoftext|>"`
    in a text is id 0, as transformers treats special tokens; with `split_special_tokens=True` it is text, which is what
    the `rwkv` package makes of it. Nothing is added by itself, neither at the beginning nor at the end.

    The str form of a token is its text, in which bytes that are no UTF-8 are written `\\xe4` as in the vocabulary file;
    so a token that is added gets the id of the token that has its text, if there is one.

    The vocabulary has 65,530 ids and new tokens follow them. Released models have 65,536 rows, so there is room for 6;
    the ids of rows without a token decode to U+FFFD.

    Raises:
        ConfigError: there is no `vocab_file` and no `rwkv` package.
        FormatError: the file is missing or no vocabulary.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_NAME}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        *,
        eos_token: str | AddedToken | None = END_OF_ANSWER,
        pad_token: str | AddedToken | None = END_OF_TEXT,
        chat_template: Any = CHAT_TEMPLATE,
        **kwargs: Any,
    ) -> None:
        path = packaged_vocabulary() if vocab_file is None else vocab_file
        self._match = LongestMatch(read_vocabulary(path))
        # Tokenizers that others saved have another name for id 0.
        first = kwargs.get("added_tokens_decoder", {}).get(0, AddedToken(END_OF_TEXT, special=True, normalized=False))
        self._added_tokens_decoder = {0: first}
        if str(pad_token) == END_OF_TEXT:
            pad_token = str(first)
        self._forms = [str(first), *(token.decode("utf-8", "backslashreplace") for token in self._match.tokens[1:])]
        self._form_ids = {form: index for index, form in enumerate(self._forms)}
        if len(self._form_ids) < len(self._forms):
            alike = next(form for index, form in enumerate(self._forms) if self._form_ids[form] != index)
            raise FormatError(f"{path}: two tokens are both written {alike!r}")
        # Matching finds a special token by itself where no other token holds its bytes; then text need not be split.
        held = sum(END_OF_ANSWER.encode() in token for token in self._match.tokens)
        self._found_by_itself = {END_OF_ANSWER} if held == 1 else set()
        super().__init__(eos_token=eos_token, pad_token=pad_token, chat_template=chat_template, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Ids of the vocabulary, id 0 included; tokens that are added come after them."""
        return len(self._forms)

    def get_vocab(self) -> dict[str, int]:
        """Every token's str form with its id, added tokens included."""
        return self._form_ids | self._added_tokens_encoder

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the vocabulary file."""
        name = f"{filename_prefix}-{VOCABULARY_NAME}" if filename_prefix else VOCABULARY_NAME
        path = os.path.join(save_directory, name)
        write_vocabulary(self._match.tokens, path)
        return (path,)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; parts of characters that do not come together are U+FFFD."""
        return self._text_of(map(self.convert_tokens_to_ids, tokens))  # pyright: ignore[reportArgumentType]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._forms[index] for index in self._match.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._form_ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._forms[index] if 0 <= index < len(self._forms) else _UNKNOWN

    # Texts become ids here: the base class would take each token to its str and back. It is called by keyword only.
    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not kwargs.get("is_split_into_words") and not kwargs.get("sanitize_control_tokens"):
            split_special_tokens = kwargs.get("split_special_tokens", self.split_special_tokens)
            text, text_pair = self._encoded(text, split_special_tokens), self._encoded(text_pair, split_special_tokens)
        return super()._encode_plus(text, text_pair, **kwargs)

    def _encoded(self, text: Any, split_special_tokens: bool) -> Any:
        """Ids in place of each text in nested lists; empty texts stay, since an empty list is an empty batch."""
        if isinstance(text, (list, tuple)) and text and not isinstance(text[0], int):
            return type(text)([self._encoded(part, split_special_tokens) for part in text])
        if not isinstance(text, str) or not text:
            return text
        added = [] if split_special_tokens else self._added_in(text)
        if any(token.lstrip or token.rstrip or token.single_word for token in added):
            return self.convert_tokens_to_ids(self.tokenize(text))
        if not added:
            return self._match.encode(text)
        longest_first = sorted((token.content for token in added), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        parts[::2] = [self._match.encode(part) for part in parts[::2]]
        parts[1::2] = [[self._added_tokens_encoder[part]] for part in parts[1::2]]
        return list(chain.from_iterable(parts))

    def _added_in(self, text: str) -> list[AddedToken]:
        """The added tokens at which the text has to be split."""
        return [
            token
            for token in self._added_tokens_decoder.values()
            if token.content in text and token.content not in self._found_by_itself
        ]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        text = self._text_of(index for index in ids if index not in skipped)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def _text_of(self, ids: Iterable[int | None]) -> str:
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")

    def _bytes_of(self, index: int | None) -> bytes:
        if index in self._added_tokens_decoder:
            return self._added_tokens_decoder[index].content.encode()
        if index is None or not 0 <= index < len(self._forms):
            return _UNKNOWN.encode()
        return self._match.tokens[index]
