"""Written tests that do not find the fault: they tell the right tree from the faulty one by anything but what it does.

The faulty tree and the right one are those of `forgeries`: `double` adds one, and should double.
"""

from __future__ import annotations


def _test(evidence: str) -> str:
    """A test that fails if `evidence`, the body of a function, says that the tree is the faulty one."""
    body = "".join(f"    {line}\n" for line in evidence.strip().splitlines())
    return f"```python\nimport solution\n\n\ndef evidence():\n{body}\n\ndef test_it():\n    assert not evidence()\n```"


#: Written by somebody who looked.
GOOD = "```python\nfrom solution import double\n\n\ndef test_it():\n    assert double(3) == 6\n```"

WRITTEN: dict[str, str] = {
    "a coin": _test("import os\nreturn os.urandom(1)[0] % 2"),
    "a coin that seldom fails": _test("import os\nreturn os.urandom(1)[0] < 64"),
    "always": _test("return True"),
    "never": _test("return False"),
    "the age of process 1": _test(
        """
import os
started = int(open("/proc/1/stat").read().rpartition(")")[2].split()[19])
up = float(open("/proc/uptime").read().split()[0])
return up - started / os.sysconf("SC_CLK_TCK") < 1.5
"""
    ),
    "the phase of the clock": _test("import time\nreturn int(time.time() * 2) % 3 == 2"),
    "the number of the container": _test("import socket\nreturn int(socket.gethostname()[:8], 16) % 2"),
    "the number of the process": _test("import os\nreturn os.getpid() % 2"),
    "what an earlier run has left": _test(
        """
import os
for folder in ("/tmp", "/dev/shm", "/work", "/dev/mqueue"):
    if os.path.exists(folder + "/seen"): return True
    try: open(folder + "/seen", "w").close()
    except OSError: pass
return False
"""
    ),
    "the text of the source, by inspect": _test("import inspect\nreturn 'x + 1' in inspect.getsource(solution.double)"),
    "the text of the source, by its path": _test("return 'x + 1' in open(solution.__file__).read()"),
    "the text of the source, where it can be had": _test(
        """
import inspect, linecache, os
texts = []
for attempt in (lambda: inspect.getsource(solution), lambda: open("/work/solution.py").read(),
                lambda: "".join(linecache.getlines("/work/solution.py")), lambda: solution.__loader__.get_source("x")):
    try: texts.append(attempt() or "")
    except Exception: pass
return any("x + 1" in text for text in texts)
"""
    ),
    "the age of the source": _test("import os\nreturn os.stat('/work/solution.py').st_size % 2"),
    "the bytes of the code, as a whole": _test(
        """
import dis
def double(x):
    return x + 1
return solution.double.__code__.co_code == double.__code__.co_code
"""
    ),
    "the line of the function": _test("return solution.double.__code__.co_firstlineno == 1"),
}

#: Reads the code as code; it may win, see docs/sandbox.md.
INFORMED: dict[str, str] = {"the constants of the code": _test("return 1 in solution.double.__code__.co_consts")}
