"""Whatever rows of others hold, one bad row costs that row, and its reason is kept beside the result."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.errors import M1Error, UsageError
from m1.rows import read_json, read_objects
from m1.tasks.swe import sources
from m1.tasks.swe.github import Reference, closed_in, read_github, slug_of_url
from m1.tasks.swe.ingest import names_of_tests, read_instances, tasks_of_instances, tasks_of_pulls
from m1.tasks.swe.patches import make_diff
from m1.tasks.swe.sources import Repository, read_archive
from m1.tasks.swe.tasks import TaskSet
from stages.swe import ingest_run
from stages.swe.predictions import read_predictions

WRONG, RIGHT = b"def f(x):\n    return x + 2\n", b"def f(x):\n    return x + 1\n"
TEST = b"from pkg.a import f\n\n\ndef test_f():\n    assert f(1) == 2\n"
PATCH = make_diff({"pkg/a.py": WRONG}, {"pkg/a.py": RIGHT})


class Small:
    """A clone with one package and one test: a fault, and its mending together with its test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "init", "-q", "-b", "main", folder], check=True)
        self.base = self.commit({"pkg/a.py": WRONG})
        self.mended = self.commit({"pkg/a.py": RIGHT, "tests/test_a.py": TEST})
        self.origin = Repository(name="small", licence="MIT", code=["pkg"], tests=["tests"], path=str(folder))
        self.spec = folder.with_name("spec.yaml")
        self.spec.write_text(
            "description: one small repository\nenvironments: {default: {requirements: []}}\n"
            f"repositories:\n  - {{name: small, licence: MIT, code: [pkg], tests: [tests], path: '{folder}'}}\n"
        )

    def commit(self, files: dict[str, bytes]) -> str:
        for path, content in files.items():
            (self.folder / path).parent.mkdir(exist_ok=True)
            (self.folder / path).write_bytes(content)
        who = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "core.autocrlf=false"]
        subprocess.run(["git", "-C", self.folder, "add", "-A"], check=True)
        subprocess.run(["git", "-C", self.folder, *who, "commit", "-q", "-m", "words"], check=True)
        done = subprocess.run(["git", "-C", self.folder, "rev-parse", "HEAD"], check=True, capture_output=True)
        return done.stdout.decode().strip()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("clones") / "small")


def row(small: Small, **changes: Any) -> dict[str, Any]:
    content = {
        "instance_id": "x__y-1", "repo": "x/y", "base_commit": small.base, "patch": PATCH, "test_patch": "",
        "problem_statement": "f is wrong", "FAIL_TO_PASS": '["tests/test_a.py::test_f"]', "PASS_TO_PASS": "[]",
    }  # fmt: skip
    return {name: value for name, value in {**content, **changes}.items() if value is not ...}


def ingested(small: Small, out: Path, lines: bytes | list[Any], name: str = "set.jsonl") -> dict[str, str]:
    """Reasons by row of what was rejected, after the command has made a set with the one good row in it."""
    file = out.with_name(name)
    if isinstance(lines, list):
        lines = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file.write_bytes(lines)
    ingest_run.main(["--spec", str(small.spec), "--repository", "small", "--instances", str(file), "--out", str(out)])
    [task] = TaskSet(out).tasks
    assert task.id == "good" and task.fail_to_pass == ("tests/test_a.py::test_f",)
    return {each["id"]: each["reason"] for _, each in read_objects(out / "rejected.jsonl").good}


BAD = {
    "lower-case name of the tests": (
        {"FAIL_TO_PASS": ..., "fail_to_pass": '["tests/test_a.py::test_f"]'}, "written FAIL_TO_PASS"),
    "no tests": ({"FAIL_TO_PASS": ...}, "names no tests"),
    "an empty list of tests": ({"FAIL_TO_PASS": "[]"}, "names no tests"),
    "null as text": ({"FAIL_TO_PASS": "null"}, "'null' is not a list of tests"),
    "a number as text": ({"FAIL_TO_PASS": "7"}, "is not a list of tests"),
    "a table of tests": ({"FAIL_TO_PASS": {"a": 1}}, "is not a list of tests"),
    "text that is no JSON": ({"FAIL_TO_PASS": "tests/test_a.py::test_f"}, "is not JSON"),
    "a test that is a number": ({"FAIL_TO_PASS": [1]}, "1 is not the name of a test"),
    "a test without a name": ({"FAIL_TO_PASS": [" "]}, "is not the name of a test"),
    "an option in place of a test": ({"FAIL_TO_PASS": ["--co"]}, "is not the name of a test"),
    "wrong tests that pass": ({"PASS_TO_PASS": "null"}, "is not a list of tests"),
    "an endless list of tests": ({"FAIL_TO_PASS": "[" * 10**5}, "is not JSON"),
    "no issue": ({"problem_statement": ""}, "has no problem_statement"),
    "a blank issue": ({"problem_statement": " \n\t"}, "has no problem_statement"),
    "an issue that is null": ({"problem_statement": None}, "has no problem_statement"),
    "an issue that is a list": ({"problem_statement": ["f"]}, "problem_statement is not text but ['f']"),
    "half of a surrogate pair": ({"problem_statement": "a\ud835b"}, "surrogate"),
    "half of one in a name": ({"\ud835": 1}, "surrogate"),
    "a NUL": ({"problem_statement": "a\0b"}, "NUL"),
    "a NUL in the commit": ({"base_commit": "a\0b"}, "NUL"),
    "an option in place of a commit": ({"base_commit": "--output=x"}, "not a commit's hash"),
    "a branch in place of a commit": ({"base_commit": "main"}, "not a commit's hash"),
    "a commit that is not there": ({"base_commit": "f" * 40}, "has no commit ffffffffff"),
    "a patch that is words": ({"patch": "words"}, "no file header"),
    "a patch that does not fit": ({"patch": PATCH.replace("x + 2", "y")}, "does not apply"),
    "a patch outside of the tree": ({"patch": PATCH.replace("pkg/a.py", "../a.py")}, "leaves the tree"),
    "a binary patch": ({"patch": "diff --git a/b b/b\nindex 1..2\nGIT binary patch\n"}, "binary"),
    "a patch of a number": ({"patch": 7}, "patch is not text"),
    "a test patch that is a list": ({"test_patch": []}, "test_patch is not text"),
    "a test patch that does not fit": ({"test_patch": PATCH}, "does not fit"),
    "an id that is a number": ({"instance_id": 7}, "instance_id is not text"),
    "an id with a line end": ({"instance_id": "a\nb"}, "control characters"),
    "a long id": ({"instance_id": "a" * 300}, "too long"),
    "no repo": ({"repo": ...}, "has no repo"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_instance_costs_that_instance(
    small: Small, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, reason = BAD[kind]
    [told] = ingested(small, tmp_path / "out", [row(small, **changes), row(small, instance_id="good")]).values()
    assert reason in told
    shown = capsys.readouterr()
    assert "1 row not used" in shown.err and str(tmp_path / "out" / "rejected.jsonl") in shown.err
    assert shown.out.startswith("1 tasks")


LINES = {
    "not JSON": (b"{", "not JSON"),
    "a list": (b"[1]", "not a JSON object but [1]"),
    "null": (b"null", "not a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "a name given twice": (b'{"instance_id": "a", "instance_id": "b"}', "'instance_id' is given twice"),
    "one given twice inside": (b'{"a": [{"b": 1, "b": 2}]}', "'b' is given twice"),
    "deep": (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 100 deep"),
    "endless": (b"[" * 10**6, "nested more than 100 deep"),
    "a huge integer": (b'{"a": ' + b"9" * 10**5 + b"}", "too large"),
    "a huge number": (b'{"a": 1e999}', "too large"),
    "no number": (b'{"a": NaN}', "not finite"),
    "NULs": (b"\0\0\0", "not JSON"),
    "cut off": (b'{"instance_id": "x', "not JSON"),
}


@pytest.mark.parametrize("kind", LINES)
def test_one_bad_line_costs_that_line(small: Small, tmp_path: Path, kind: str) -> None:
    line, reason = LINES[kind]
    good = json.dumps(row(small, instance_id="good")).encode()
    [told] = ingested(small, tmp_path / "out", good + b"\n\n" + line + b"\n").items()
    assert told[0] == "set.jsonl:3" and reason in told[1]


@pytest.mark.parametrize(
    "kind", [name for name in LINES if name in ("a list", "null", "one given twice inside", "deep")]
)
def test_one_bad_item_of_a_list_costs_that_item(small: Small, tmp_path: Path, kind: str) -> None:
    line, reason = LINES[kind]
    good = json.dumps(row(small, instance_id="good")).encode()
    [told] = ingested(small, tmp_path / "out", b"[" + line + b"," + good + b"]", "set.json").items()
    assert told[0] == "set.json[0]" and reason in told[1]


def test_the_second_of_two_with_one_id_is_not_used(small: Small, tmp_path: Path) -> None:
    rows = [row(small, instance_id="good"), row(small, instance_id="good", problem_statement="other")]
    assert ingested(small, tmp_path / "out", rows) == {"good": "'good' is given twice"}


@pytest.mark.parametrize("value", ['"tests/test_a.py::test_f"', ["tests/test_a.py::test_f"]])
def test_one_test_as_json_text_is_one_test(small: Small, tmp_path: Path, value: object) -> None:
    assert names_of_tests(value) == ("tests/test_a.py::test_f",)
    with pytest.raises(FileNotFoundError):  # nothing was rejected, so there is no such file
        (tmp_path / "rejected.jsonl").read_text()
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(row(small, FAIL_TO_PASS=value)) + "\n")
    [read] = read_instances(str(file), tests_named=True)
    [(task, _)] = tasks_of_instances([read], small.origin, pytest.fail)
    assert task.fail_to_pass == ("tests/test_a.py::test_f",)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_lines_end_at_line_feeds_alone(small: Small, tmp_path: Path, separator: str) -> None:
    file = tmp_path / "x.jsonl"
    content = json.dumps(row(small, problem_statement=f"a{separator}b"), ensure_ascii=False)
    file.write_bytes(b"\xef\xbb\xbf" + content.encode() + b"\r\n")  # with a byte order mark and Windows' line end
    [read] = read_instances(str(file), reject=lambda *told: pytest.fail(str(told)))
    assert read["problem_statement"] == f"a{separator}b"


def test_a_file_that_cannot_be_read_is_one_clear_error(small: Small, tmp_path: Path) -> None:
    content = json.dumps([row(small)])
    for name, data, reason in [
        ("a.json", content.encode("utf-16"), "looks like UTF-16"),
        ("b.json", content.encode("utf-16-le"), "looks like UTF-16"),
        ("c.jsonl", content.encode("utf-16-be"), "looks like UTF-16"),
        ("d.json", content.encode("utf-32"), "looks like UTF-32"),
        ("e.json", content[:-5].encode(), "not JSON"),
        ("f.json", b"", "not JSON"),
        ("g.jsonl", b"", "holds no rows"),
        ("h.json", b"[]", "holds no rows"),
        ("i.json", b"7", "expected a list of objects"),
        ("j.json", b"[" * 10**6, "nested more than"),
        ("k.json", b'{"a": {}, "a": {}}', "'a' is given twice"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=reason) as caught:
            read_instances(str(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "folder.json").mkdir()
    for read in (read_objects, read_predictions, read_json):
        with pytest.raises(UsageError, match="cannot read"):
            read(tmp_path / "folder.json")
        with pytest.raises(UsageError, match="cannot read"):
            read(tmp_path / "none.json")
    with pytest.raises(UsageError, match="no file"):
        read_instances(str(tmp_path / "none.json"))


def test_a_folder_of_json_lines_is_read_row_by_row(small: Small, tmp_path: Path) -> None:
    lines = [b'{"problem_statement": "\\ud800"}', b"{", json.dumps(row(small, instance_id="good")).encode()]
    (tmp_path / "test.jsonl").write_bytes(b"\n".join(lines))
    told: list[str] = []
    [read] = read_instances(str(tmp_path), reject=lambda name, reason: told.append(name))
    assert read["instance_id"] == "good" and told == ["test.jsonl:1", "test.jsonl:2"]
    with pytest.raises(UsageError, match="split"):
        read_instances(str(tmp_path), split="nowhere")


def test_no_set_is_made_where_no_row_is_left(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ingested(small, tmp_path / "out", [row(small, base_commit="f" * 40)])
    assert ended.value.code == 2
    assert "has no commit" in capsys.readouterr().err and not (tmp_path / "out" / "tasks.jsonl").exists()
    assert (tmp_path / "out" / "rejected.jsonl").exists()


def test_a_clone_that_is_none_is_told_once(small: Small, tmp_path: Path) -> None:
    with pytest.raises(M1Error, match="failed: fatal: "):
        sources.commit_of(Path("/"), "HEAD")
    with pytest.raises(M1Error, match="has no commit --all"):
        sources.commit_of(small.folder, "--all")


def test_git_looks_at_the_clone_whatever_the_environment_says(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path / "other"], check=True)
    for name in ("GIT_DIR", "GIT_OBJECT_DIRECTORY"):
        monkeypatch.setenv(name, str(tmp_path / "other" / ".git"))
    assert sources.read_commit(small.folder, small.mended)["pkg/a.py"] == RIGHT


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*row.__annotations__, "instance_id", "repo", "base_commit", "patch",
       "test_patch", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS", "other"]), JSON, max_size=4))  # fmt: skip
def test_any_values_of_a_row_are_taken_or_told(small: Small, tmp_path_factory, changes: dict[str, Any]) -> None:
    """Beside a good row; whatever is taken can be written and read again."""
    folder = tmp_path_factory.mktemp("rows")
    file = folder / "x.jsonl"
    file.write_text(json.dumps({**row(small), **changes}) + "\n" + json.dumps(row(small, instance_id="good")) + "\n")
    told: list[str] = []
    rows = read_instances(str(file), reject=lambda name, reason: told.append(reason), tests_named=True)
    made = tasks_of_instances(rows, small.origin, lambda name, reason: told.append(reason))
    assert len(made) + len(told) == 2 and all(told)
    ingest_run.write_set(folder / "set", sources.load(small.spec), made)
    assert len(TaskSet(folder / "set").tasks) == len(made)


# --- GitHub ---


def exported(tmp_path: Path, small: Small, *pulls: dict[str, Any], issues: object = None) -> tuple[Path, Path]:
    first, second = tmp_path / "issues.json", tmp_path / "pulls.json"
    first.write_text(json.dumps([{"number": 7, "title": "something else", "body": None}] if issues is None else issues))
    plain = {"title": "x", "body": "", "mergeCommit": {"oid": small.mended}, "closingIssuesReferences": []}
    second.write_text(json.dumps([{**plain, "number": n, **pull} for n, pull in enumerate(pulls, 12)]))
    return first, second


OTHER = {"number": 7, "repository": {"name": "project", "owner": {"login": "other"}}, "url": "x"}


@pytest.mark.parametrize(
    "pull",
    [
        {"body": "Fixes other/project#7"},
        {"body": "Fixes: other/project#7"},
        {"body": "Fixes https://github.com/other/project/issues/7"},
        {"title": "fixes other/project#7"},
        {"closingIssuesReferences": [OTHER]},
        {"closingIssuesReferences": [{"number": 7, "url": "https://github.com/other/project/issues/7"}]},
        {"body": "<!-- Fixes #7 -->"},
        {"body": "<!--\nFixes #7\n\nFixes #7\n-->"},
        {"body": "words <!-- write Fixes #7 here --> words"},
        {"body": "`Fixes #7`"},
        {"body": "```\nFixes #7\n```"},
        {"body": "~~~text\nFixes #7\n~~~"},
        {"body": "words\n\n    Fixes #7\n"},
        {"body": "<code>Fixes #7</code>"},
        {"body": "<pre>\nFixes #7\n</pre>"},
        {"body": "prefixes #7, fixes-#7, fixes #7a, fixes#7"},
        {"body": "fixes #70"},
    ],
)
def test_what_does_not_refer_to_our_issue_makes_no_link(small: Small, tmp_path: Path, pull: dict[str, Any]) -> None:
    for ours in ([], ["me/small"]):
        told: dict[str, str] = {}
        assert read_github(*exported(tmp_path, small, pull), ours=ours, reject=told.__setitem__) == []
        assert "closes" in told["pull 12"]


@pytest.mark.parametrize(
    "pull",
    [
        {"body": "Fixes #7"},
        {"body": "fixed: #7."},
        {"body": "Closes me/small#7"},
        {"body": "resolves https://github.com/Me/Small/issues/7"},
        {"body": "This **fixes #7**, and `fixes #8`"},
        {"body": "- closes GH-7"},
        {"body": "<!-- template -->\n\nFixes #7"},
        {"title": "Resolve #7"},
        {"closingIssuesReferences": [{"number": 7}]},
        {"closingIssuesReferences": [OTHER, {**OTHER, "repository": {"name": "Small", "owner": {"login": "me"}}}]},
        {"body": None, "closingIssuesReferences": [{"number": 7}]},
    ],
)
def test_what_refers_to_our_issue_is_linked(small: Small, tmp_path: Path, pull: dict[str, Any]) -> None:
    [found] = read_github(*exported(tmp_path, small, pull), ours=["me/small"])
    assert found.number == 12 and [number for number, _, _ in found.issues] == [7]


def test_the_way_out_where_the_own_name_is_not_known(small: Small, tmp_path: Path) -> None:
    told: dict[str, str] = {}
    read_github(*exported(tmp_path, small, {"closingIssuesReferences": [OTHER]}), reject=told.__setitem__)
    assert "`github: other/project`" in told["pull 12"]


@pytest.mark.parametrize(
    ("pull", "reason"),
    [
        ({"number": "13"}, "not the number of an issue"),
        ({"number": True}, "not the number of an issue"),
        ({"number": -1}, "not the number of an issue"),
        ({"title": 7}, "its title is not text"),
        ({"body": ["Fixes #7"]}, "its body is not text"),
        ({"mergeCommit": None}, "not merged"),
        ({"mergeCommit": "x"}, "no hash of a commit"),
        ({"mergeCommit": {"oid": "--all"}}, "no hash of a commit"),
        ({"mergeCommit": {"oid": None}}, "no hash of a commit"),
        ({"closingIssuesReferences": 7}, "not a list"),
        ({"closingIssuesReferences": [7]}, "hold 7"),
        ({"closingIssuesReferences": [{"number": None}]}, "not the number of an issue"),
        ({"number": 12}, "given twice"),
        ({"title": "\ud800"}, "surrogate"),
        ({"body": "no issue"}, "closes no issue"),
    ],
)
def test_one_bad_pull_costs_that_pull(small: Small, tmp_path: Path, pull: dict[str, Any], reason: str) -> None:
    told: list[str] = []
    files = exported(tmp_path, small, {"body": "Fixes #7"}, {"body": "Fixes #7", **pull})
    [found] = read_github(*files, reject=lambda name, why: told.append(why))
    assert found.number == 12 and len(told) == 1 and reason in told[0]


@pytest.mark.parametrize(
    "issue",
    [
        7,
        {"number": 7},
        {"number": 7, "title": 7, "body": ""},
        {"number": 7, "title": "", "body": None},
        {"number": "7", "title": "a", "body": ""},
    ],
)
def test_one_bad_issue_costs_that_issue(small: Small, tmp_path: Path, issue: object) -> None:
    told: list[str] = []
    issues = [issue, {"number": 8, "title": "good", "body": None}]
    files = exported(tmp_path, small, {"body": "Fixes #7"}, {"body": "Fixes #8"}, issues=issues)
    [found] = read_github(*files, reject=lambda name, why: told.append(why))
    assert found.number == 13 and len(told) == 2


def test_one_commit_that_is_not_in_the_clone_costs_that_pull(small: Small, tmp_path: Path) -> None:
    pulls = read_github(
        *exported(tmp_path, small, {"body": "Fixes #7"}, {"body": "Fixes #7", "mergeCommit": {"oid": "f" * 40}},
                  {"body": "Fixes #7", "mergeCommit": {"oid": small.base}})
    )  # fmt: skip
    told: dict[str, str] = {}
    [(task, base)] = tasks_of_pulls(pulls, small.origin, told.__setitem__)
    assert task.id == "small-12" and base == {"pkg/a.py": WRONG}
    assert "has no commit fffff" in told["pull 13"] and "has no parent" in told["pull 14"]
    assert not any("--" in reason for reason in told.values()), "not git's usage line"


def test_the_own_name_comes_from_the_remotes(small: Small, tmp_path: Path) -> None:
    assert small.origin.names_on_github() == set()
    subprocess.run(["git", "clone", "-q", "--bare", small.folder, tmp_path / "copy"], check=True)
    copy = small.origin.model_copy(update={"path": str(tmp_path / "copy")})
    for name, url in (("up", "git@github.com:Me/Small.git"), ("own", "https://x:y@github.com/fork/small")):
        subprocess.run(["git", "-C", tmp_path / "copy", "remote", "add", name, url], check=True)
    assert copy.names_on_github() == {"me/small", "fork/small"}
    assert copy.model_copy(update={"github": "A/B"}).names_on_github() == {"a/b"}
    assert slug_of_url("https://example.org/me/small") is None


MARKUP = [
    "fixes",
    " ",
    "#7",
    "`",
    "```",
    "\n",
    "<!--",
    "-->",
    "me/x",
    "https://github.com/a/b/issues/1",
    "    ",
    "<code>",
    "[",
    "*",
]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200) | st.lists(st.sampled_from(MARKUP), max_size=30).map("".join))
def test_any_text_of_a_pull_is_read(text: str) -> None:
    assert all(isinstance(reference, Reference) and reference.number >= 0 for reference in closed_in(text))


# --- predictions ---


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"), ("[]", "not a JSON object"), ('{"instance_id": "b"}', "no model_patch"),
        ('{"instance_id": 7, "model_patch": ""}', "no instance_id"), ('{"model_patch": ""}', "no instance_id"),
        ('{"instance_id": "b", "model_patch": ["x"]}', "model_patch is not text"),
        ('{"instance_id": "b", "model_patch": "", "model_name_or_path": 7}', "model_name_or_path is not text"),
        ('{"instance_id": "b", "model_patch": "\\ud800"}', "surrogate"),
    ],
)  # fmt: skip
def test_one_bad_prediction_costs_that_prediction(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"instance_id": "a", "model_patch": "x\u2028y"}\n' + line + "\n", encoding="utf-8")
    told: list[str] = []
    assert read_predictions(file, lambda name, why: told.append(why)) == {"a": ("", "x\u2028y")}
    assert len(told) == 1 and reason in told[0]


def test_of_two_predictions_neither_is_judged(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps([{"instance_id": n, "model_patch": p} for n, p in ("a1", "b2", "a3", "a4")]))
    told: list[str] = []
    assert list(read_predictions(file, lambda name, why: told.append(name))) == ["b"] and told == ["a", "a"]
    file.write_text(json.dumps({"a": {"model_patch": "1"}, "b": {"instance_id": "c", "model_patch": ""}, "c": 7}))
    told.clear()
    assert list(read_predictions(file, lambda name, why: told.append(name))) == ["a"] and sorted(told) == ["b", "c"]


# --- archives ---


def test_archives_that_cannot_be_read_are_one_clear_error(tmp_path: Path) -> None:
    import gzip
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("top/a.py", "top/\udcff.py"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    whole = gzip.compress(buffer.getvalue())
    file = tmp_path / "a.tar.gz"
    file.write_bytes(whole)
    assert read_archive(file) == {"a.py": b"x"}, "a name that no patch can speak of is left out"
    for data in (
        b"",
        b"words",
        whole[:40],
        gzip.compress(b"words" * 200),
        b"PK\x05\x06" + b"\0" * 18,
    ):
        file.write_bytes(data)
        try:
            assert read_archive(file) == {}
        except UsageError as error:
            assert "cannot be read as an archive" in str(error)
