"""Answers that are aimed at what reads them: at the rank that judges, before anything runs."""

from __future__ import annotations


def block(path: str, search: str = "", replace: str = "x = 1\n") -> str:
    return f"{path}\n<<<<<<< SEARCH\n{search}=======\n{replace}>>>>>>> REPLACE\n"


def new_file(path: str, content: str = "x = 1\n") -> str:
    lines = content.count("\n")
    return f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1,{lines} @@\n" + "".join(
        f"+{line}\n" for line in content.split("\n")[:lines]
    )


HOSTILE: dict[str, str] = {
    "nothing": "",
    "white space": " \n\t\r\n" * 1000,
    "a file named as the sandbox's own folder": block(".m1"),
    "a file in the sandbox's own folder": block(".m1/test_x.py"),
    "a name of 300 characters": block("a" * 300 + ".py"),
    "a name of 300 bytes": new_file("ä" * 150 + ".py"),
    "a path of 75,000 folders": block("a/" * 75_000 + "b.py"),
    "a path of 200 folders": new_file("a/" * 200 + "b.py"),
    "75,000 new files": "".join(block(f"a/{n}") for n in range(3_400)),
    "thousands of new files as a diff": "".join(new_file(f"d{n}/e/f.py") for n in range(2_000)),
    "three fences and 60,000 newlines": "```\n```\n```" + "\n" * 60_000,
    "three words of fences and 60,000 newlines": "```diff\n```diff\n```diff" + "\n" * 60_000 + "x",
    "200,000 dashes": "-" * 200_000,
    "200,000 dashes and a word": "-" * 199_990 + "a.py:",
    "200,000 backquotes": "`" * 200_000,
    "40,000 opening fences": "```python\n" * 20_000,
    "40,000 bare fences": "```\n" * 40_000,
    "spaces before a bracket": " " * 199_000 + "(",
    "200,000 spaces between path and colon": "a.py" + " " * 190_000 + "x",
    "lone surrogates": block("a.py", "", "x = '\ud800'\n"),
    "a lone surrogate in a path": new_file("a\udcff.py"),
    "NUL bytes": block("a.py", "", "x = '\0'\n"),
    "a NUL in a path": new_file("a\0.py"),
    "a huge integer": block("a.py", "", "x = " + "9" * 150_000 + "\n"),
    "a huge number in a hunk": "--- a/mini.py\n+++ b/mini.py\n@@ -" + "9" * 10_000 + " +1 @@\n-a\n+b\n",
    "a long number in a hunk's count": "--- a/mini.py\n+++ b/mini.py\n@@ -1," + "9" * 3_000 + " +1 @@\n-a\n+b\n",
    "deep brackets": block("a.py", "", "x = " + "(" * 90_000 + ")" * 90_000 + "\n"),
    "deep unclosed brackets": block("a.py", "", "x = " + "([{" * 30_000 + "\n"),
    "deep f-strings": block("a.py", "", "x = " + 'f"{' * 20_000 + "\n"),
    "deep blocks": block("a.py", "", "".join(" " * n + "if 1:\n" for n in range(500)) + "\n"),
    "long chains": block("a.py", "", "x = " + "-" * 150_000 + "1\n"),
    "long attribute chains": block("a.py", "", "x = a" + ".b" * 90_000 + "\n"),
    "many nots": block("a.py", "", "x = " + "not " * 45_000 + "1\n"),
    "lambdas": block("a.py", "", "x = " + "lambda: " * 20_000 + "1\n"),
    "a bracket puzzle": block("a.py", "", "f" + "(x for x in " * 4_000 + "\n"),
    "absolute path": block("/etc/passwd"),
    "path out of the tree": new_file("../../x.py"),
    "a link": "diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc/passwd\n",
    "names that differ in case": block("Mini.py") + block("MINI.PY"),
    "a file where a folder is": block("mini.py/x.py"),
    "a folder in place of the tests": new_file("test_mini.py/x.py"),
    "carriage returns": block("a.py", "", "x = 1\r\n") .replace("\n", "\r\n"),
    "carriage returns alone": "\r" * 100_000,
    "line separators": "\u2028\u2029\x85\x0b\x0c" * 20_000,
    "a byte order mark": "\ufeff" + block("a.py", "", "\ufeffx = 1\n"),
    "a coding of its own": block("a.py", "", "# -*- coding: utf-7 -*-\n+AHgAPQAx-\n"),
    "one hunk many times": "--- a/mini.py\n+++ b/mini.py\n" + "@@ -1 +1 @@\n-a\n+b\n" * 9_000,
    "a header of 200,000 characters": "diff --git a/" + " b/" * 60_000 + "\nnew file mode 100644\n",
    "a rename of 190,000 characters": "diff --git a/x b/y\nrename from " + "a/" * 95_000 + "\nrename to b\n",
    "blocks without an end": "m.py\n<<<<<<< SEARCH\n" * 9_000,
    "dividers": "m.py\n<<<<<<< SEARCH\n" + "=======\n" * 20_000 + ">>>>>>> REPLACE\n",
    "a search of empty lines": block("mini.py", "\n" * 100_000, "x\n"),
    "an oversized text": "x = 1\n" * 100_000,
    "a file of Python's own": block("unittest.py") + block("src/random/__init__.py"),
}  # fmt: skip
