"""What a task asks: the issue, the code that fits the window, and the form of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from m1.tasks.swe.localise import Count, cut, localise
from m1.tasks.swe.tasks import SweTask

REPAIR = """A library has a fault. Mend it.

{issue}
The code that may matter:

{code}
Answer with search/replace blocks, each below the path of its file. The search part must be in the file exactly once.

path/to/file.py
<<<<<<< SEARCH
old lines
=======
new lines
>>>>>>> REPLACE
"""
LOCALISE = """A library has a fault. Where is it?

{issue}
The code that may matter:

{code}
Answer with one line for each function or method that must be edited, as `path/to/file.py: Class.method`.
"""
WRITE_TEST = """A library has a fault. Write a pytest file that fails because of it and passes once it is mended.

{issue}
The code that may matter:

{code}
Answer with one fenced block of Python.
"""
_FORMS = {"repair": REPAIR, "localise": LOCALISE, "write-test": WRITE_TEST}


def question(
    task: SweTask,
    faulty: Mapping[str, bytes],
    is_code: Callable[[str], bool],
    *,
    window: int,
    count: Count,
    ask: Callable[[str], str] | None = None,
) -> str:
    """The question of a task, at most `window` tokens unless the issue alone is longer.

    `ask` lets a model do the two stages of localisation; without it they go by the words of the issue.
    """
    form = _FORMS[task.kind]
    frame = form.format(issue=task.issue, code="")
    room = window - count(frame)
    ranked = localise(task.issue, faulty, is_code, window=max(room, 0), count=count, ask=ask)
    return form.format(issue=task.issue, code=cut(faulty, ranked, room, count))
