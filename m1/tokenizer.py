"""The tokenizer of a profile, as the stages use it: text to ids and back."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as _Backend

from m1 import chat
from m1.errors import UsageError

FILE = "tokenizer.json"


class Tokenizer:
    """A byte-level BPE tokenizer whose added tokens (`m1.chat`) are recognised wherever they stand in a text.

    Attributes:
        vocab_size: number of ids, added tokens included.
        eos_id: id of the token that closes a turn; generation ends with it.
        end_of_document_id: id of the token between documents in pretraining.
    """

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id = self.token_id(chat.END_OF_TURN)
        self.end_of_document_id = self.token_id(chat.END_OF_DOCUMENT)

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
        """Ids of a text; nothing is added to it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts; faster than one by one."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, added tokens included: `decode(encode(text)) == text`."""
        return self._backend.decode(ids, skip_special_tokens=False)


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
