"""The rows of others that once failed, as they were given, against a clone made the same way."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from m1 import paths
from m1.errors import UsageError
from m1.rows import read_objects
from m1.tasks.swe.patches import apply_diff
from m1.tasks.swe.tasks import TaskSet
from stages.swe import ingest_run

CASES = paths.ROOT.parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside this checkout")

WRONG, RIGHT = "def f(x):\n    return x + 2\n", "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A repository of the fault and its mending with a test; its spec and its commits."""
    folder = tmp_path_factory.mktemp("case") / "small"
    subprocess.run(["git", "init", "-q", "-b", "main", folder], check=True)
    who = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    commits = []
    for code, test in ((WRONG, ""), (RIGHT, "from pkg.a import f\n\n\ndef test_f():\n    assert f(1) == 2\n")):
        for path, content in (("pkg/a.py", code), ("tests/test_a.py", test)):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(content)
        subprocess.run(["git", "-C", folder, "add", "-A"], check=True)
        subprocess.run(["git", "-C", folder, "commit", "-q", "-m", "x"], check=True, env={**os.environ, **who})
        head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        commits.append(head.stdout.strip())
    spec = folder.with_name("spec.yaml")
    spec.write_text((CASES / "swe-spec.yaml").read_text().replace("PATH-OF-A-SMALL-CLONE", str(folder)))
    return spec, commits


def case(name: str, to: Path, clone: tuple[Path, list[str]]) -> Path:
    """A copy of a case that names the commits of our clone instead of those it was tried on."""
    data = (CASES / name).read_bytes()
    base, mended = clone[1]
    for old, new in (
        ("a48bac3b9ae684bd7d75f23c856f5dd2cc1e6cba", base),
        ("9b03fb2fe628c3b7e875398cd37ed9675de0d901", mended),
    ):
        for encoding in ("ascii", "utf-16-le"):
            data = data.replace(old.encode(encoding), new.encode(encoding))
    (to / name).write_bytes(data)
    return to / name


def ingest(clone: tuple[Path, list[str]], out: Path, *what: str | Path) -> tuple[list[str], dict[str, str]]:
    """Ids of the tasks made, and reasons of the rows that were not used."""
    try:
        ingest_run.main(["--spec", str(clone[0]), "--repository", "small", "--out", str(out), *map(str, what)])
    except SystemExit as ended:
        assert ended.code == 2
    made = TaskSet(out).tasks if (out / "tasks.jsonl").exists() else []
    rejected = out / "rejected.jsonl"
    rows = read_objects(rejected).good if rejected.exists() else []
    return [task.id for task in made], {row["id"]: row["reason"] for _, row in rows}


@pytest.mark.parametrize(
    ("name", "made", "reasons"),
    [
        ("lower-case-fail_to_pass-no-tests-read.jsonl", [], {"x__y-1": "written FAIL_TO_PASS"}),
        ("FAIL_TO_PASS-is-one-JSON-string.jsonl", ["x__y-1"], {}),
        ("FAIL_TO_PASS-text-null.jsonl", ["good"], {"x__y-1": "is not a list of tests"}),
        ("one-of-two-without-issue-text.jsonl", ["x__y-1"], {"z": "has no problem_statement"}),
        ("line-separator-U2028-in-issue.jsonl", ["x__y-1"], {}),
        (
            "lone-surrogate-in-issue-bricks-the-set.jsonl",
            ["good"],
            {"instances-lone-surrogate-in-issue-bricks-the-set.jsonl:1": "surrogate"},
        ),
    ],
)
def test_instances(clone, tmp_path: Path, name: str, made: list[str], reasons: dict[str, str]) -> None:  # type: ignore[no-untyped-def]
    found, told = ingest(clone, tmp_path / "out", "--instances", case(f"instances-{name}", tmp_path, clone))
    assert found == made and told.keys() == reasons.keys()
    assert all(reason in told[key] for key, reason in reasons.items())
    if made:
        assert TaskSet(tmp_path / "out").tasks[0].fail_to_pass == ("tests/test_a.py::test_f",)


def test_utf_16(clone, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    file = case("instances-utf-16-as-PowerShell-writes.json", tmp_path, clone)
    assert ingest(clone, tmp_path / "out", "--instances", file) == ([], {})
    said = capsys.readouterr().err
    assert "looks like UTF-16. Save it as UTF-8." in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("close-issue-of-another-repository-by-keyword.json", {"pull 12": "closes other/project#7"}),
        ("close-issue-of-another-repository-by-reference.json", {"pull 12": "closes other/project#7"}),
    ],
)
def test_pulls_that_close_an_issue_of_another_repository(clone, tmp_path: Path, name: str, reasons) -> None:  # type: ignore[no-untyped-def]
    issues, pulls = case("github-issues.json", tmp_path, clone), case(f"github-pulls-{name}", tmp_path, clone)
    found, told = ingest(clone, tmp_path / "out", "--issues", issues, "--pulls", pulls)
    assert found == [] and told.keys() == reasons.keys()
    assert all(reason in told[key] for key, reason in reasons.items())


def test_a_pull_whose_commit_is_not_in_the_clone(clone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from m1.tasks.swe import sources
    from m1.tasks.swe.github import read_github
    from m1.tasks.swe.ingest import tasks_of_pulls

    issues, pulls = (
        case("github-issues.json", tmp_path, clone),
        case("github-pulls-one-commit-not-in-the-clone.json", tmp_path, clone),
    )
    told: dict[str, str] = {}
    [origin] = sources.load(clone[0]).repositories
    [(task, _)] = tasks_of_pulls(read_github(issues, pulls), origin, told.__setitem__)
    assert task.id == "small-12" and task.test_patch
    assert list(told) == ["pull 13"] and "has no commit ffff" in told["pull 13"]


@pytest.mark.parametrize(
    ("name", "path", "before", "after"),
    [
        ("quoted-non-ascii-path.diff", "pkg/ä.py", b"A = 1\n", b"A = 2\n"),
        ("mnemonic-prefix.diff", "pkg/a.py", WRONG.encode(), RIGHT.encode()),
    ],
)
def test_patches(name: str, path: str, before: bytes, after: bytes) -> None:
    assert apply_diff({path: before}, (CASES / f"patch-{name}").read_text(encoding="utf-8")) == {path: after}


def test_no_case_raises_anything_else(tmp_path: Path) -> None:
    for file in CASES.glob("*.json*"):
        try:
            read_objects(file)
        except UsageError as error:
            assert file.name in str(error) and len(json.dumps(str(error))) < 600
