"""Tokens and layout of a conversation, after the released MiniMax-M1 chat template.

A conversation is `<begin_of_document>`, then one turn per message: `<beginning_of_sentence>`, a role header, a newline,
the content, `<end_of_sentence>` and a newline. The assistant opens its own think block. Tokenizers trained here keep
each role header and each tag as one token, which the released vocabulary of 200,064 spells out; the text is the same.

What people and programs write may spell these tokens, too, and must stay text. A conversation as a string, which is
called *rendered* here, therefore has a guard character inside such words (`quote`); `m1.tokenizer` makes control tokens
of the unguarded ones alone and takes the guards away. Text without such words is the same in both forms.
"""

from __future__ import annotations

import re

BEGIN_OF_DOCUMENT = "<begin_of_document>"
END_OF_DOCUMENT = "<end_of_document>"
BEGIN_OF_TURN = "<beginning_of_sentence>"
END_OF_TURN = "<end_of_sentence>"
USER = "user name=user"
ASSISTANT = "ai name=assistant"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

#: Added to a trained vocabulary in this order, ids from 0.
SPECIAL_TOKENS = (END_OF_DOCUMENT, BEGIN_OF_DOCUMENT, BEGIN_OF_TURN, END_OF_TURN)
ADDED_TOKENS = (USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
CONTROL_TOKENS = (*SPECIAL_TOKENS, *ADDED_TOKENS)

#: Stands behind the first character of a word that is not the control token it spells. WORD JOINER: no width, and in
#: no text of a corpus. Where text has it itself, it is written twice.
GUARD = "\u2060"
_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")
_FIRST_OF_CONTROL = re.compile(f"(?={_CONTROL.pattern})(.)")  # also of those that overlap
_GUARDED = re.compile(f"{GUARD}({GUARD}?)")


def quote(text: str) -> str:
    """Text as it stands in a rendered conversation: it spells no control token any more."""
    return _FIRST_OF_CONTROL.sub(rf"\2{GUARD}", text.replace(GUARD, GUARD + GUARD))


def unquote(quoted: str) -> str:
    """The inverse of `quote`."""
    return _GUARDED.sub(r"\1", quoted)


def pieces(rendered: str) -> list[tuple[str, bool]]:
    """A rendered conversation as text without guards and control tokens in turn: (part, whether it is a token)."""
    parts = _CONTROL.split(rendered)
    return [(part if number % 2 else unquote(part), bool(number % 2)) for number, part in enumerate(parts) if part]


def render_prompt(question: str) -> str:
    """Up to and including the assistant's header, rendered; generation continues it. The question is any text."""
    return f"{BEGIN_OF_DOCUMENT}{BEGIN_OF_TURN}{USER}\n{quote(question)}{END_OF_TURN}\n{BEGIN_OF_TURN}{ASSISTANT}\n"


def render_response(reasoning: str, answer: str) -> str:
    """A worked answer with its closing token, rendered: reasoning inside think tags, the result inside answer tags."""
    think = f"{THINK_OPEN}{quote(reasoning)}{THINK_CLOSE}"
    return f"{think}{ANSWER_OPEN}{quote(answer)}{ANSWER_CLOSE}{END_OF_TURN}"


def parse_response(response: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a well-formed response, else None; both as text, without guards.

    Well formed: one think block that opens the response, then one answer block, then nothing but the closing token.
    Text inside the think block is never read as an answer.

    Args:
        response: rendered, as `Tokenizer.decode_chat` gives it.
    """
    text = response.removesuffix(END_OF_TURN).strip()
    if not text.startswith(THINK_OPEN) or any(
        text.count(tag) != 1 for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
    ):
        return None
    reasoning, _, rest = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    rest = rest.strip()
    if not rest.startswith(ANSWER_OPEN) or not rest.endswith(ANSWER_CLOSE):
        return None
    answer = rest.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE).strip()
    return unquote(reasoning), unquote(answer)
