"""Train a byte-level BPE on documents and write it in the layout of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from m1 import chat
from m1.errors import UsageError
from m1.files import write_json
from m1.tokenizer import Tokenizer as Reader

#: Ids from 0 in this order, and whether a token is special. The headers and tags are not: they are text to a reader, so
#: decoding never leaves them out.
FIRST_TOKENS = {token: token in chat.SPECIAL_TOKENS for token in (*chat.SPECIAL_TOKENS, *chat.ADDED_TOKENS)}


def _guards(tokens: Iterable[str]) -> str:
    """Jinja filters that do to a text what `m1.chat.quote` does for these tokens.

    The user's header comes twice: `replace` leaves out every second of those that overlap, as in
    `user name=user name=user`.
    """
    return "".join(f" | replace('{token}', '{token[0]}{chat.GUARD}{token[1:]}')" for token in (*tokens, chat.USER))


_OF_TURNS = (*chat.SPECIAL_TOKENS, chat.USER, chat.ASSISTANT)
#: Layout of `m1.chat` for transformers' `apply_chat_template`; content is a string or a list of typed parts. What a
#: user writes is quoted; what the assistant said is taken as rendered, with its tags, but opens and closes no turn.
CHAT_TEMPLATE = f"""\
{{#- The words below that look like control tokens have U+2060, which has no width, behind their first letter. -#}}
{{%- macro text(content) -%}}
{{%- if content is string -%}}{{{{ content }}}}
{{%- else -%}}{{%- for part in content -%}}
{{%- if part.type != 'text' -%}}
{{{{ raise_exception('content of type ' ~ part.type ~ ' is not text') }}}}
{{%- endif -%}}
{{{{ part.text }}}}{{%- endfor -%}}
{{%- endif -%}}
{{%- endmacro -%}}
{{%- set headers = {{'user': '{chat.USER}', 'assistant': '{chat.ASSISTANT}'}} -%}}
{{{{ '{chat.BEGIN_OF_DOCUMENT}' }}}}
{{%- for message in messages -%}}
{{%- if message.role not in headers -%}}
{{{{ raise_exception('role ' ~ message.role ~ ' is unknown: use user or assistant') }}}}
{{%- endif -%}}
{{%- if message.role == 'user' -%}}
{{%- set said = text(message.content) | replace('{chat.GUARD}', '{chat.GUARD * 2}'){_guards(chat.CONTROL_TOKENS)} -%}}
{{%- else -%}}
{{%- set said = text(message.content){_guards(_OF_TURNS)} -%}}
{{%- endif -%}}
{{{{ ('' if loop.first else '\\n') ~ '{chat.BEGIN_OF_TURN}' ~ headers[message.role] ~ '\\n' ~ said }}}}
{{{{- '{chat.END_OF_TURN}' }}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{ '\\n{chat.BEGIN_OF_TURN}{chat.ASSISTANT}\\n' }}}}{{%- endif -%}}
"""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with digits split one by one; the same texts give the same tokenizer.

    Raises:
        UsageError: the texts are too few for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in FIRST_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise UsageError(
            f"model.vocab_size={vocab_size} is not reachable: the corpus gives {reached} tokens",
            "Lower model.vocab_size or raise corpus.max_megabytes.",
        )
    return _with_flags(tokenizer)


def _with_flags(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer marks every token that it is given as special; restore the flags of `FIRST_TOKENS`."""
    content = json.loads(tokenizer.to_str())
    for entry in content["added_tokens"]:
        entry["special"] = FIRST_TOKENS[entry["content"]]
    return Tokenizer.from_str(json.dumps(content))


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, which AutoTokenizer reads offline.

    Roles of the tokens as in the released model: a turn's opening token is bos, its closing token eos, the end of a
    document unk, and there is no pad token.
    """
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    added = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }
        for number, (token, special) in enumerate(FIRST_TOKENS.items())
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": chat.BEGIN_OF_TURN,
        "eos_token": chat.END_OF_TURN,
        "unk_token": chat.END_OF_DOCUMENT,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def read_texts(documents: Path, max_bytes: float) -> Iterator[str]:
    """Texts of a corpus file in its order until `max_bytes` of them are read.

    Raises:
        UsageError: a line of it is no document.
    """
    size = 0
    with open(documents, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
                size += len(text.encode())
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise UsageError(
                    f"{documents}:{number} is damaged: {error}", "Make it again: python -m stages.corpus."
                ) from error
            if size > max_bytes:
                return
            yield text


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """How well the tokenizer compresses the texts: their bytes, tokens and bytes per token."""
    reader = Reader(tokenizer)
    size = tokens = 0
    for text in texts:
        size += len(text.encode())
        tokens += len(reader.encode(text))
    return {"bytes": size, "tokens": tokens, "bytes_per_token": round(size / tokens, 4)}
