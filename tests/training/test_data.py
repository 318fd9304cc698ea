"""How samples are dealt out to the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1 import chat
from m1.errors import UsageError
from m1.tasks.base import Row
from m1.tasks.prompts import tokenised
from m1.tokenizer import Tokenizer, load_tokenizer
from m1.training.data import Sample, deal, read_samples, sample_batches
from stages.tokenizer.train import save, train


@given(st.lists(st.integers()), st.integers(1, 8))
def test_every_item_is_dealt_once_and_evenly(items: list[int], ranks: int) -> None:
    hands = [deal(items, rank, ranks) for rank in range(ranks)]
    assert sorted(item for hand in hands for item in hand) == sorted(items)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_gets_the_longer_of_every_pair(ranks: int) -> None:
    assert {sum(deal(list(range(32)), rank, ranks)) for rank in range(ranks)} == {sum(range(32)) // ranks}


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_of_all_ranks_are_the_global_batch(packed: bool) -> None:
    samples = [Sample([length] * length, 1) for length in range(2, 26)]
    batches = [batch for rank in (0, 1) for batch in sample_batches(samples, 4, rank, 2, packed=packed)]
    assert len(batches) == 6
    assert sum(batch.num_tokens for batch in batches) == sum(len(sample.ids) - 1 for sample in samples)
    if not packed:
        assert all(len(batch.tokens) == 4 for batch in batches)


# --- rows as tokens ---

#: Code that a question may show, an answer quote, and a corpus hold.
CODE = f"if text.startswith('{chat.THINK_OPEN}'):\n    return '{chat.END_OF_TURN}\u2028'  # {chat.ASSISTANT}\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save(
        train([Path(json.__file__).read_text(encoding="utf-8"), Path(__file__).read_text(encoding="utf-8")], 400),
        folder,
    )
    return load_tokenizer(folder)


def control(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in ids if i < len(chat.CONTROL_TOKENS)]


def test_a_sample_has_the_control_tokens_of_its_template_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": chat.render_prompt(question), "response": chat.render_response(reasoning, answer)}
        for question, reasoning, answer in (("Why?", "so", "thus"), (CODE, CODE, CODE))
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    plain, quoting = read_samples(file, tokenizer, 1000)
    assert control(tokenizer, plain.ids) == control(tokenizer, quoting.ids)
    assert tokenizer.decode(quoting.ids).count(CODE) == 3
    assert chat.parse_response(tokenizer.decode_chat(quoting.ids[quoting.response_start :])) == (CODE, CODE.strip())


def test_a_prompt_has_the_control_tokens_of_its_template_alone(tokenizer: Tokenizer) -> None:
    rows = [
        Row("1", "swe", "repair", 1, question, chat.render_prompt(question), "", {}) for question in ("Mend it.", CODE)
    ]
    plain, quoting = tokenised(rows, tokenizer)
    assert control(tokenizer, plain.tokens) == control(tokenizer, quoting.tokens)


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "damaged"), ("[1]", "not a JSON object"), ('{"prompt": "a"}', "no prompt or no response"),
     ('{"prompt": 1, "response": "b"}', "no prompt or no response"), ("[" * 10**5, "damaged")],
)  # fmt: skip
def test_a_damaged_sample_is_named(tokenizer: Tokenizer, tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=rf"train\.jsonl:2.*{reason}"):
        read_samples(file, tokenizer, 1000)
