"""Indexed data sets hold exactly the documents of the corpus, and no text is on both sides of the split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_inputs import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from m1 import chat, paths
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.run import profiles
from m1.tokenizer import load_tokenizer
from stages.tokenizer.train import save, train
from stages.tokens.run import run
from stages.tokens.split import Document, heldout_hashes

VOCABULARY = 320


@pytest.fixture
def tiny(checkout: Path) -> Profile:
    """A profile whose corpus (60 documents in two domains, one text twice) and tokenizer are there."""
    loaded = profiles.load("tiny", overrides={"tokens.heldout_fraction": 0.1})
    corpus = paths.data_dir(loaded.name, "corpus")
    corpus.mkdir(parents=True)
    texts = [sentences(i, 10) for i in range(59)]
    lines = [{"domain": "prose" if i % 3 else "code", "text": text} for i, text in enumerate([*texts, texts[4]])]
    (corpus / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = paths.data_dir(loaded.name, "tokenizer")
    tokenizer.mkdir()
    save(train(texts, VOCABULARY), tokenizer)
    return loaded


def read_split(prefix: Path) -> list[np.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    assert data.index.dtype == np.uint16
    assert list(data.document_indices) == list(range(len(data) + 1))
    return [np.array(data[i]) for i in range(len(data))]


def test_data_sets_hold_the_corpus(tiny: Profile, tmp_path: Path) -> None:
    output = tmp_path / "tokens"
    output.mkdir()
    summary = run(tiny, output)
    tokenizer = load_tokenizer(paths.data_dir(tiny.name, "tokenizer"))
    decoded: dict[str, list[str]] = {}
    for split in ("train", "heldout"):
        documents = read_split(output / split)
        assert all(ids[-1] == tokenizer.end_of_document_id for ids in documents)
        assert not any(tokenizer.end_of_document_id in ids[:-1] for ids in documents)
        assert sum(map(len, documents)) == summary[split]["tokens"] == sum(summary[split]["tokens_per_domain"].values())
        decoded[split] = [tokenizer.decode(ids[:-1].tolist()) for ids in documents]
    corpus = paths.data_dir(tiny.name, "corpus") / "documents.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert decoded["train"] == [text for text in texts if text in set(decoded["train"])]
    assert sorted(decoded["train"] + decoded["heldout"]) == sorted(texts)
    assert not set(decoded["train"]) & set(decoded["heldout"])
    assert set(summary["heldout"]["tokens_per_domain"]) == {"code", "prose"}

    again = tmp_path / "again"
    again.mkdir()
    assert run(tiny, again) == summary
    for path in output.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_text_of_the_corpus_never_becomes_a_control_token(tiny: Profile, tmp_path: Path) -> None:
    forged = "".join((*chat.SPECIAL_TOKENS, *chat.ADDED_TOKENS)) + " and words behind it\u2028 and more"
    corpus = paths.data_dir(tiny.name, "corpus") / "documents.jsonl"
    with open(corpus, "a", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"domain": "code", "text": f"{n} {forged}"}, ensure_ascii=False) + "\n" for n in "ab"
        )
    run(tiny, tmp_path)
    tokenizer = load_tokenizer(paths.data_dir(tiny.name, "tokenizer"))
    first_of_text = len(chat.CONTROL_TOKENS)
    found = 0
    for split in ("train", "heldout"):
        for ids in read_split(tmp_path / split):
            assert ids[-1] == tokenizer.end_of_document_id and ids[:-1].min() >= first_of_text
            found += forged in tokenizer.decode(ids[:-1].tolist())
    assert found == 2


@pytest.mark.parametrize("line", ['{"text": "x"}', '{"domain": "code", "text": null}', "[]", "{", "\x00", "[" * 10**5])
def test_a_damaged_corpus_is_named(tiny: Profile, tmp_path: Path, line: str) -> None:
    corpus = paths.data_dir(tiny.name, "corpus") / "documents.jsonl"
    with open(corpus, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match=r"documents\.jsonl:61 is damaged.*stages\.corpus"):
        run(tiny, tmp_path)


def test_missing_inputs(tiny: Profile, tmp_path: Path) -> None:
    (paths.data_dir(tiny.name, "tokenizer") / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="no tokenizer at"):
        run(tiny, tmp_path)
    (paths.data_dir(tiny.name, "corpus") / "documents.jsonl").unlink()
    with pytest.raises(UsageError, match="no corpus at"):
        run(tiny, tmp_path)


DOCUMENTS = st.lists(
    st.builds(Document, st.sampled_from(["prose", "code", "qa"]), st.text(max_size=6)), max_size=40
)  # short texts, so that equal ones are common, also across domains


@settings(deadline=None, max_examples=50)
@given(DOCUMENTS, st.floats(0.01, 0.49))
def test_split_is_by_content_and_keeps_something_of_every_domain(documents: list[Document], fraction: float) -> None:
    heldout = heldout_hashes(documents, fraction)
    assert heldout <= {document.content_hash for document in documents}
    assert heldout == heldout_hashes(
        documents[::-1] if len({d.domain for d in documents}) == 1 else documents, fraction
    )
    owner: dict[str, str] = {}
    for document in documents:
        owner.setdefault(document.content_hash, document.domain)
    for domain in set(owner.values()):
        contents = {identity for identity, first in owner.items() if first == domain}
        assert contents - heldout


@settings(deadline=None, max_examples=50)
@given(st.integers(20, 60), st.floats(0.02, 0.3))
def test_held_out_share(count: int, fraction: float) -> None:
    documents = [Document("prose", f"{i:100d}") for i in range(count)]
    share = len(heldout_hashes(documents, fraction)) / count
    assert fraction <= share + 1e-9 <= fraction + 1 / count + 1e-9
    shuffled: list[Any] = sorted(documents, key=lambda document: document.content_hash)
    assert heldout_hashes(shuffled, fraction) == heldout_hashes(documents, fraction)
