"""The tokenizer loses nothing, keeps the tokens of a conversation whole, and is the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1 import chat, paths
from m1.errors import UsageError
from m1.tokenizer import Tokenizer, load_tokenizer
from stages.tokenizer.train import read_texts, save, train

VOCABULARY = 600
TOKENS = (*chat.SPECIAL_TOKENS, *chat.ADDED_TOKENS)
#: Arbitrary Unicode with tokens of a conversation strewn in.
TEXTS = st.lists(st.one_of(st.text(max_size=20), st.sampled_from(TOKENS)), max_size=12).map("".join)


def sources() -> list[str]:
    return [path.read_text() for path in sorted((paths.ROOT / "m1" / "run").glob("*.py"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on this project's own sources."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save(train(sources(), VOCABULARY), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def hub_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_ids_of_the_first_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCABULARY
    assert [tokenizer.token_id(token) for token in TOKENS] == list(range(len(TOKENS)))
    assert [tokenizer.encode(token) for token in TOKENS] == [[i] for i in range(len(TOKENS))]
    assert tokenizer.eos_id == TOKENS.index(chat.END_OF_TURN)
    assert tokenizer.end_of_document_id == TOKENS.index(chat.END_OF_DOCUMENT)
    with pytest.raises(UsageError, match="has no token '<pad>'"):
        tokenizer.token_id("<pad>")


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < VOCABULARY for i in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@settings(deadline=None, max_examples=50)
@given(TEXTS)
def test_transformers_agrees(tokenizer: Tokenizer, hub_tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.encode(text)
    assert hub_tokenizer.encode(text, add_special_tokens=False) == ids
    assert hub_tokenizer(text)["input_ids"] == ids
    assert hub_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("1234567890")
    assert [tokenizer.decode([i]) for i in ids] == list("1234567890")


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=10))
def test_prompt_and_response_concatenate(tokenizer: Tokenizer, question: str, reasoning: str, answer: str) -> None:
    prompt, response = chat.render_prompt(question), chat.render_response(reasoning, answer)
    assert tokenizer.encode(prompt + response) == tokenizer.encode(prompt) + tokenizer.encode(response)


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=10), st.booleans())
def test_chat_template(hub_tokenizer, question: str, reasoning: str, answer: str, typed: bool) -> None:  # type: ignore[no-untyped-def]
    def content(text: str):  # type: ignore[no-untyped-def]
        half = len(text) // 2
        parts = [{"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}]
        return parts if typed else text

    def render(messages: list, add_generation_prompt: bool) -> str:  # type: ignore[type-arg]
        return hub_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    user = {"role": "user", "content": content(question)}
    prompt, response = chat.render_prompt(question), chat.render_response(reasoning, answer)
    assistant = {"role": "assistant", "content": content(response.removesuffix(chat.END_OF_TURN))}
    assert render([user], True) == prompt
    assert render([user, assistant], False) == prompt + response
    again = prompt.removeprefix(chat.BEGIN_OF_DOCUMENT)
    assert render([user, assistant, user], True) == f"{prompt}{response}\n{again}"


def test_chat_template_refuses_what_it_cannot_say(hub_tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Exception, match="role tool is unknown"):
        hub_tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(Exception, match="content of type image is not text"):
        hub_tokenizer.apply_chat_template(picture, tokenize=False)


def test_roles_of_tokens(hub_tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert hub_tokenizer.eos_token == chat.END_OF_TURN
    assert hub_tokenizer.bos_token == chat.BEGIN_OF_TURN
    assert hub_tokenizer.unk_token == chat.END_OF_DOCUMENT
    assert hub_tokenizer.pad_token is None
    assert len(hub_tokenizer) == VOCABULARY
    ids = hub_tokenizer.encode(chat.render_prompt("Why?") + chat.render_response("so", "thus"))
    shown = hub_tokenizer.decode(ids, skip_special_tokens=True)
    assert shown == "user name=user\nWhy?\nai name=assistant\n<think>so</think><answer>thus</answer>"


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    save(train(sources(), VOCABULARY), tmp_path)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_too_little_text_for_the_vocabulary() -> None:
    with pytest.raises(UsageError, match=r"model\.vocab_size=5000 is not reachable"):
        train(["a few words only"], 5000)


def test_missing_and_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_training_text_is_cut_at_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": character * 100}) + "\n" for character in "abc"))
    assert list(read_texts(path, 250)) == ["a" * 100, "b" * 100]
    assert len(list(read_texts(path, 300))) == 3
