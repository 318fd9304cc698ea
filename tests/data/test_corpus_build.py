"""The whole corpus stage on local folders: shares, accounts, the same bytes each time, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_inputs import local_source, sentences, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import stage_command
from m1 import paths
from m1.data import corpus_spec as spec
from m1.errors import UsageError
from m1.files import read_rows
from stages.corpus import mixture
from stages.corpus.build import build

#: The real checkout; the tests' own stands in its place.
ROOT = paths.ROOT
PROFILE = paths.PROFILES / "tiny.yaml"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def two_sources(checkout: Path, write_spec: Any) -> str:
    """200 kB of letters and 20 kB of notes, with planted rejects."""
    write_texts(
        checkout,
        {
            **{f"letters/{i}.txt": sentences(i, 60) for i in range(60)},
            **{f"notes/{i}.txt": sentences(1000 + i, 40) for i in range(8)},
            "letters/copy.txt": sentences(3, 60),
            "letters/short.txt": "Too short.",
            "letters/latin.txt": b"caf\xe9 " * 100,
        },
    )
    return write_spec(
        [
            local_source("letters", include=["letters/**"], weight=0.6),
            local_source("notes", include=["notes/**"], weight=0.4, domain="qa"),
        ],
        filters={"prose": {"quality": {}}},
        max_document_characters=2000,
    )


def build_to(output: Path, *, max_bytes: int = 100_000, seed: int = 1, headroom: float = 10) -> dict[str, Any]:
    output.mkdir()
    loaded = spec.load("corpus-test").model_copy(update={"headroom": headroom})
    return build(loaded, max_bytes=max_bytes, seed=seed, output=output)


def test_accounts_add_up(checkout: Path, write_spec: Any, tmp_path: Path) -> None:
    two_sources(checkout, write_spec)
    output = tmp_path / "out"
    summary = build_to(output)
    documents, rejected = read_lines(output / "documents.jsonl"), read_lines(output / "rejected.jsonl")
    assert len(documents) == summary["documents"]
    assert sum(len(d["text"].encode()) for d in documents) == summary["bytes"] <= 100_000
    assert len({d["id"] for d in documents}) == len(documents)
    assert all(len(d["text"]) <= 2000 for d in documents)
    assert {d["licence"] for d in documents} == {"CC0-1.0"}
    reasons = {d["id"]: d["reason"] for d in rejected}
    assert reasons["letters/letters/short.txt"] == "gopher_short_doc"
    assert reasons["letters/letters/latin.txt"] == "not_utf8"
    duplicates = [d for d in rejected if d["reason"] == "exact_duplicate"]
    assert {duplicates[0]["id"], duplicates[0]["duplicate_of"]} == {"letters/letters/copy.txt", "letters/letters/3.txt"}
    assert summary["rejected"] == {"exact_duplicate": 1, "gopher_short_doc": 1, "not_utf8": 1}
    letters = summary["sources"]["letters"]
    assert letters["documents_found"] == letters["documents_read"] == 63
    assert letters["documents_clean"] == 60
    assert (output / "licences" / "letters.txt").read_text() == "Do as you like.\n"


def test_shares_follow_weights_as_far_as_sources_reach(checkout: Path, write_spec: Any, tmp_path: Path) -> None:
    two_sources(checkout, write_spec)
    small = build_to(tmp_path / "small", max_bytes=30_000)["sources"]
    assert small["notes"]["bytes_kept"] == pytest.approx(12_000, abs=4000)  # a document is about 3 kB
    assert small["letters"]["bytes_kept"] == pytest.approx(18_000, abs=4000)
    large = build_to(tmp_path / "large", max_bytes=150_000)["sources"]
    assert large["notes"]["bytes_kept"] == large["notes"]["bytes_clean"]
    total = sum(source["bytes_kept"] for source in large.values())
    assert total == pytest.approx(150_000, abs=8000)


def test_documents_beyond_the_need_are_not_read(checkout: Path, write_spec: Any, tmp_path: Path) -> None:
    two_sources(checkout, write_spec)
    summary = build_to(tmp_path / "out", max_bytes=30_000, headroom=1.0)["sources"]["letters"]
    assert summary["documents_found"] == 63
    assert summary["documents_read"] < 15


def test_same_bytes_in_another_process_and_another_order_with_another_seed(
    checkout: Path, write_spec: Any, tmp_path: Path
) -> None:
    two_sources(checkout, write_spec)
    build_to(tmp_path / "here")
    build_to(tmp_path / "other", seed=2)
    program = (
        "import sys; from pathlib import Path; from m1 import paths\n"
        "from m1.data import corpus_spec; from stages.corpus import build\n"
        "paths.ROOT = Path(sys.argv[1]); out = Path(sys.argv[2]); out.mkdir()\n"
        "loaded = corpus_spec.load('corpus-test', paths.ROOT / 'data_specs').model_copy(update={'headroom': 10.0})\n"
        "build.build(loaded, max_bytes=100_000, seed=1, output=out)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, checkout, tmp_path / "there"], env=environment, check=True)
    for name in ("documents.jsonl", "rejected.jsonl"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert (tmp_path / "here" / "documents.jsonl").read_bytes() != (tmp_path / "other" / "documents.jsonl").read_bytes()


def test_hub_source_from_a_local_data_set(checkout: Path, write_spec: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"body": sentences(i, 20), "year": 2000 + i} for i in range(6)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "rows", "kind": "hub", "licence": "CC0-1.0", "domain": "prose", "weight": 1.0}
    source |= {"dataset": str(folder), "text_column": "body", "max_rows": 5}
    write_spec([source])
    build_to(tmp_path / "out")
    assert {d["text"] for d in read_lines(tmp_path / "out" / "documents.jsonl")} == {row["body"] for row in rows[:5]}
    write_spec([source | {"text_column": "text"}])
    with pytest.raises(UsageError, match="no column text; the data set has body, year"):
        build_to(tmp_path / "again")


def test_one_bad_row_costs_that_row(checkout: Path, write_spec: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    good = [json.dumps({"text": f"{sentences(i, 20)}\u2028more"}, ensure_ascii=False).encode() for i in range(3)]
    bad = [b'{"text": null}', b'{"text": 7}', b'{"other": "x"}', b'{"text": "a\\ud800"}', b"{", b"[1]", b"\xff",
           b'{"text": "a", "text": "b"}', b"[" * 10**5, b'{"text": ""}']  # fmt: skip
    lines = [*bad[:5], good[0], *bad[5:], *good[1:]]
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n")
    write_spec(
        [{"name": "rows", "kind": "hub", "licence": "MIT", "domain": "prose", "weight": 1, "dataset": str(folder)}]
    )
    summary = build_to(tmp_path / "out")
    assert summary["documents"] == 3
    assert summary["rejected"] == {"empty": 1, "no_text": 3, "not_json": 6}
    rejected = read_rows(tmp_path / "out" / "rejected.jsonl", "")
    assert {row["id"]: row["reason"] for row in rejected}["rows/row-000000000"] == "no_text" and len(rejected) == 10
    assert all("\u2028more" in row["text"] for row in read_rows(tmp_path / "out" / "documents.jsonl", ""))


def test_the_shared_row_without_text(checkout: Path, write_spec: Any, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    text = "Some words that are long enough to count as a document here."
    for name in ("train.jsonl", "train.json"):  # read by us, and by `datasets`
        (folder / name).write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": None}) + "\n")
        spec_of = {
            "name": "rows",
            "kind": "hub",
            "licence": "MIT",
            "domain": "prose",
            "weight": 1,
            "dataset": str(folder),
        }
        write_spec([spec_of])
        assert build_to(tmp_path / name)["rejected"] == {"no_text": 1}
        (folder / name).unlink()


def test_one_bad_file_costs_that_file(checkout: Path, write_spec: Any, tmp_path: Path) -> None:
    module = '"""\\ud800' + " Other words about a module, enough of them to be kept here." * 3 + '"""\n'
    write_texts(
        checkout, {"bad.txt": module, "good.txt": module.replace("\\ud800", ""), "utf16.txt": "x".encode("utf-16")}
    )
    with open(os.fsencode(checkout / "texts") + b"/caf\xe9.txt", "w", encoding="utf-8") as file:
        file.write(f'"""{sentences(1, 9)}"""')
    write_spec([local_source(format="docstrings")])
    assert build_to(tmp_path / "out")["rejected"] == {"lone_surrogate": 1, "not_utf8": 1}
    found = {row["id"] for row in read_rows(tmp_path / "out" / "documents.jsonl", "")}
    assert found == {"notes/good.txt", "notes/caf\\udce9.txt"}


def test_source_without_anything_left_is_an_error(checkout: Path, write_spec: Any, tmp_path: Path) -> None:
    write_texts(checkout, {"a.txt": "Short."})
    write_spec([local_source()], filters={"prose": {"quality": {}}})
    with pytest.raises(UsageError, match=r"source notes has no document left after cleaning.*gopher_short_doc"):
        build_to(tmp_path / "out")


def write_profile(checkout: Path) -> Path:
    content = yaml.safe_load(PROFILE.read_text())
    content |= {"name": "mini", "corpus": {"spec": "corpus-test", "max_megabytes": 0.1}}
    path = checkout / "mini.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_command_replaces_the_data_set_only_when_it_is_complete(
    checkout: Path, write_spec: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    two_sources(checkout, write_spec)
    arguments = ["--profile", str(write_profile(checkout))]
    stage_command.main("stages.corpus", arguments)
    folder = paths.data_dir("mini", "corpus")
    before = (folder / "documents.jsonl").read_bytes()
    assert json.loads((folder / "summary.json").read_text())["bytes"] > 50_000

    # A file-size limit stands for a full disk: writing fails half-way with the system's own error.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            stage_command.main("stages.corpus", arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 4
    assert "Free disk space" in capsys.readouterr().err
    assert (folder / "documents.jsonl").read_bytes() == before
    # Beside it stands what it was made by, and nothing half-written.
    assert sorted(path.name for path in folder.parent.iterdir()) == [".identity", "corpus"]


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.floats(0.01, 10), st.integers(0, 10**6)), min_size=1, max_size=6
    ),
    st.integers(1, 10**6),
)
def test_quotas(sources: dict[str, tuple[float, int]], total: int) -> None:
    weights = {name: weight for name, (weight, _) in sources.items()}
    available = {name: size for name, (_, size) in sources.items()}
    taken = mixture.quotas(weights, available, total)
    assert all(0 <= taken[name] <= available[name] for name in sources)
    reachable = min(total, sum(available.values()))
    assert reachable - len(sources) <= sum(taken.values()) <= total
    # Whoever is not exhausted gets bytes in proportion to the weight, and no less per weight than the exhausted.
    unit = [taken[name] / weights[name] for name in sources if taken[name] < available[name]]
    slack = 2 / min(weights.values())
    if unit:
        assert max(unit) - min(unit) <= slack
        assert all(taken[name] / weights[name] <= max(unit) + slack for name in sources)


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="ab \n", max_size=400), st.integers(4, 50))
def test_split_document(text: str, limit: int) -> None:
    parts = mixture.split_document(text, limit)
    assert "".join(parts) == text
    assert all(len(part) <= limit for part in parts)
    assert len(parts) == 1 or all(parts)
