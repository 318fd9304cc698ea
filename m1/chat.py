"""Tokens and layout of a conversation, after the released MiniMax-M1 chat template.

A conversation is `<begin_of_document>`, then one turn per message: `<beginning_of_sentence>`, a role header, a newline,
the content, `<end_of_sentence>` and a newline. The assistant opens its own think block. Tokenizers trained here keep
each role header and each tag as one token, which the released vocabulary of 200,064 spells out; the text is the same.
"""

from __future__ import annotations

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


def render_prompt(question: str) -> str:
    """Text up to and including the assistant's header; generation continues it."""
    return f"{BEGIN_OF_DOCUMENT}{BEGIN_OF_TURN}{USER}\n{question}{END_OF_TURN}\n{BEGIN_OF_TURN}{ASSISTANT}\n"


def render_response(reasoning: str, answer: str) -> str:
    """A worked answer with its closing token: reasoning inside think tags, the result inside answer tags."""
    return f"{THINK_OPEN}{reasoning}{THINK_CLOSE}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}{END_OF_TURN}"


def parse_response(response: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a well-formed response, else None.

    Well formed: one think block that opens the response, then one answer block, then nothing but the closing token.
    Text inside the think block is never read as an answer.
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
    return reasoning, rest.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE).strip()
