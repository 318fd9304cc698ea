"""Markup, boilerplate and licence headers go; words, code and formulas stay."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.corpus.extract import Unreadable, extract, normalise

RST = """\
:orphan:

.. _a-target:

===========
The heading
===========

.. currentmodule:: numbers

See :ref:`the guide <guide>`, :class:`~numbers.Real`, :func:`!abs` and `a link <https://example.org/x>`_.[#note]_
Euler's identity is :math:`e^{i\\pi} + 1 = 0`, and ``x = 1`` sets x.

.. note:: Mind this.

   It has a body.

.. code-block:: python
   :linenos:

   def f(x):
       return x ** 2

.. image:: picture.png
   :alt: a picture

.. toctree::
   :maxdepth: 2

   first
   second

.. This is a comment
   over two lines.

An example follows::

    >>> 1 + 1
    2
"""

RST_TEXT = """\
The heading

See the guide, Real, abs and a link.
Euler's identity is $e^{i\\pi} + 1 = 0$, and `x = 1` sets x.

Mind this.

   It has a body.


   def f(x):
       return x ** 2

An example follows:

    >>> 1 + 1
    2
"""


def test_rst() -> None:
    assert extract(RST.encode(), "rst") == RST_TEXT


def test_markdown() -> None:
    text = """\
---
title: front matter
---
# A heading #

[![badge](https://example.org/badge.svg)](https://example.org) <b>Bold</b> and **strong**, [a link](https://example.org).
<!-- a comment
over lines -->
```python
# a comment in code, [kept](as it is) and <this> too
```
"""
    expected = """\
A heading

 Bold and strong, a link.

```python
# a comment in code, [kept](as it is) and <this> too
```
"""
    assert extract(text.encode(), "markdown") == expected


def test_python_loses_its_licence_header_only() -> None:
    head = "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n# Copyright 2020 Somebody\n# Licensed under MIT\n\n"
    code = "import os  # the licence of this line stays\n\n# So does this copyright\nprint(os.name)\n"
    assert extract((head + code).encode(), "python") == code
    assert extract(b"# What this file does.\nx = 1\n", "python") == "# What this file does.\nx = 1\n"


def test_docstrings_in_order_of_the_file_without_code() -> None:
    long = "It is explained here at such length that a reader can learn something from it alone, see :func:`second`."
    source = f'''
class First:
    """{long}"""

    def method(self):
        """Short."""
        return 1

def second():
    """{long.replace("It", "This")}"""
'''
    text = extract(source.encode(), "docstrings")
    plain = long.replace(":func:`second`", "second")
    assert text == f"First\n\n{plain}\n\n\nsecond\n\n{plain.replace('It', 'This', 1)}\n"


def test_conversations() -> None:
    text = "categories: [x]\nconversations:\n- - Who?\n  - Me.\n- - 2 + 2\n  - 4\n"
    assert extract(text.encode(), "conversations") == "Who?\nMe.\n\n2 + 2\n4\n"


def test_book_without_the_library_s_pages() -> None:
    start, end = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK X ***\n" for word in ("START", "END"))
    text = f"Project Gutenberg presents\n{start}\nCall me.\n\n{end}Donate!\n"
    assert extract(text.encode(), "text") == "Call me.\n"


def test_boilerplate_patterns() -> None:
    text = b"One {sql}two.\nSkip to content\nThree.\n"
    assert extract(text, "text", [r"\{sql\}", r"^Skip to content\n"]) == "One two.\nThree.\n"


@pytest.mark.parametrize(
    "content, format, reason",
    [
        (b"\xff\xfe", "text", "not_utf8"),
        (b"def (:", "docstrings", "not_python"),
        (b"just: a mapping", "conversations", "not_conversations"),
        (b"a: [", "conversations", "not_conversations"),
        (b"conversations: 7", "conversations", "not_conversations"),
        (b"conversations: [[2024-13-45]]", "conversations", "not_conversations"),
        (b"conversations: " + b"[" * 10_000, "conversations", "not_conversations"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nconversations: [*b, *b]", "conversations", "not_conversations"),
        (b'conversations: [["\\ud800"]]', "conversations", "lone_surrogate"),
        (
            b'"""\\ud800' + b" Other words about a module, enough of them to be kept here." * 3 + b'"""',
            "docstrings",
            "lone_surrogate",
        ),
        (b"x = " + b"(" * 10_000, "docstrings", "not_python"),
        (b"x" + b".x" * 100_000, "docstrings", "not_python"),
    ],
)
def test_unreadable_files_say_why(content: bytes, format: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        extract(content, format)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_normalised_text_has_no_control_characters_and_stays_as_it_is(text: str) -> None:
    result = normalise(text)
    assert unicodedata.is_normalized("NFC", result)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in result)
    assert not any(line.endswith((" ", "\t")) for line in result.split("\n"))
    assert normalise(result) == result


@settings(deadline=None, max_examples=50)
@given(st.text(), st.sampled_from(["text", "rst", "markdown", "python"]))
def test_every_text_can_be_read(text: str, format: str) -> None:
    result = extract(text.encode(), format)  # type: ignore[arg-type]
    assert result == "" or (result.endswith("\n") and result.strip())
