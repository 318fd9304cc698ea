"""The tokenizer of a profile, as the stages use it: text to ids and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as _Backend

from m1 import chat
from m1.errors import UsageError

FILE = "tokenizer.json"


class Tokenizer:
    """A byte-level BPE tokenizer. Text never becomes a control token; only a rendered conversation has any (`m1.chat`).

    A vocabulary in which a role header or a tag is no token of its own spells it out, wherever it comes from.

    Attributes:
        vocab_size: number of ids, added tokens included.
        eos_id: id of the token that closes a turn; generation ends with it.
        end_of_document_id: id of the token between documents in pretraining.
    """

    def __init__(self, backend: _Backend) -> None:
        self._backend, self._plain = backend, _without_added_tokens(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id = self.token_id(chat.END_OF_TURN)
        self.end_of_document_id = self.token_id(chat.END_OF_DOCUMENT)
        found = {token: backend.token_to_id(token) for token in chat.CONTROL_TOKENS}
        self._control: dict[str, int] = {token: number for token, number in found.items() if number is not None}
        self._control_text = {number: token for token, number in self._control.items()}
        for token, number in self._control.items():
            if number in self.encode(token):
                raise UsageError(
                    f"the tokenizer's merges make the control token {token!r} out of text",
                    "Rebuild it: python -m stages.tokenizer.",
                )

    def token_id(self, token: str) -> int:
        """Id of one token given by its text.

        Raises:
            UsageError: the vocabulary has no such token.
        """
        found = self._backend.token_to_id(token)
        if found is None:
            raise UsageError(f"the tokenizer has no token {token!r}", "Rebuild it: python -m stages.tokenizer.")
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added to it, and none of them is a control token, whatever the text spells."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts; faster than one by one."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_chat(self, rendered: str) -> list[int]:
        """Ids of a rendered conversation, or a part of one: of its control tokens, and of the text between them."""
        return self.encode_chats([rendered])[0]

    def encode_chats(self, rendered: Sequence[str]) -> list[list[int]]:
        """Ids of several rendered conversations; faster than one by one."""
        split = [chat.pieces(each) for each in rendered]
        texts = (part for pieces in split for part, is_token in pieces if not (is_token and part in self._control))
        ids = iter(self.encode_batch(list(texts)))
        return [[i for part, is_token in pieces for i in self._ids(part, is_token, ids)] for pieces in split]

    def _ids(self, part: str, is_token: bool, texts: Iterator[list[int]]) -> list[int]:
        return [self._control[part]] if is_token and part in self._control else next(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens by their names: `decode(encode(text)) == text`."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def decode_chat(self, ids: Sequence[int]) -> str:
        """A conversation, or a part of one, rendered: text in it that spells a control token is guarded."""
        runs = itertools.groupby(ids, self._control_text.get)
        return "".join(
            token * len(list(run)) if token is not None else chat.quote(self.decode(list(run))) for token, run in runs
        )


def _without_added_tokens(backend: _Backend) -> _Backend:
    """The same vocabulary and merges, to which a token is nothing but its merges."""
    content = json.loads(backend.to_str())
    return _Backend.from_str(json.dumps({**content, "added_tokens": []}))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read `tokenizer.json` from the folder that the tokenizer stage wrote.

    Raises:
        UsageError: the file is missing or damaged.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise UsageError(f"no tokenizer at {file}", "Make it: python -m stages.tokenizer --profile <profile>.")
    try:
        return Tokenizer(_Backend.from_file(str(file)))
    except UsageError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"{file} is damaged: {error}", "Rebuild it: python -m stages.tokenizer.") from error
