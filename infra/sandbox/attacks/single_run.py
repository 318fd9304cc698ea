"""Solutions that are wrong and change what is said of them: one run of tests, all of pytest within reach.

Each is put in front of the wrong functions, or behind them where it defines `same`, which a test that passes calls.
"""

from __future__ import annotations

#: Walks from a frame of the code under test to pytest's own.
FRAMES = """
import sys
def frames():
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
def find(kind):
    for frame in frames():
        for value in frame.f_locals.values():
            if type(value).__name__ == kind:
                return value
"""

ENDS_EARLY = {
    "_exit at import": "import os; os._exit(0)",
    "_exit in a test": "import os\ndef same(x): os._exit(0)",
    "_exit in a thread": "import os, threading; threading.Timer(0, os._exit, (0,)).start(); threading.Event().wait(1)",
    "_exit after a fine summary": "import os; os.write(1, b'6 passed in 0.01s\\n'); os._exit(0)",
    "exec of something that is happy": "import os; os.execv('/bin/sh', ['sh', '-c', 'echo 6 passed; exit 0'])",
    "killing all": "import os; os.kill(-1, 9); os._exit(0)",
    "killing the parent": "import os; os.kill(os.getppid(), 9); os._exit(0)",
    "killing itself": "import os; os.kill(os.getpid(), 15)",
}

POLITE_ENDS = {
    "sys.exit at import": "import sys; sys.exit(0)",
    "SystemExit with success": "raise SystemExit(0)",
    "pytest.exit": "import pytest; pytest.exit('all well', returncode=0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "skip of the module": "import pytest; pytest.skip('all well', allow_module_level=True)",
    "os.abort": "import os; os.abort()",
}

PATCHES = {
    "reports made by pytest": """
import _pytest.reports as r
make = r.TestReport.from_item_and_call.__func__
def good(cls, item, call):
    call.excinfo = None
    return make(cls, item, call)
r.TestReport.from_item_and_call = classmethod(good)
""",
    "initial values of reports": """
import _pytest.reports as r
old = r.TestReport.__init__
def new(self, *a, **k):
    k["outcome"] = "passed"; k["longrepr"] = None
    old(self, *a, **k)
r.TestReport.__init__ = new
""",
    "code of a function": """
import _pytest.runner as r
def pytest_runtest_call(item): pass
r.pytest_runtest_call.__code__ = pytest_runtest_call.__code__
""",
    "running of items": "import _pytest.python as p; p.Function.runtest = lambda self: None",
    "running of unittest": "import _pytest.unittest as u; u.TestCaseFunction.runtest = lambda self: None",
    "calling of functions": """
import _pytest.python as p
def pytest_pyfunc_call(pyfuncitem): return True
p.pytest_pyfunc_call.__code__ = pytest_pyfunc_call.__code__
""",
    "unittest assertions": "import unittest; unittest.TestCase.assertEqual = lambda self, *a: None",
    "a new method on a class of pytest": """
import _pytest.reports as r
get = object.__getattribute__
r.TestReport.__getattribute__ = lambda s, n: "passed" if n == "outcome" else False if n == "failed" else get(s, n)
""",
    "builtins": "import builtins; builtins.all = lambda values: True",
    "defaults": "import _pytest.runner as r; r.call_and_report.__defaults__ = (False,)",
    "writing of json": """
import json
real = json.dumps
json.dumps = lambda x, **k: real(x, **k).replace('\"failed\"', '\"passed\"')
""",
    "the pieces of json": """
import json.encoder as e
real = e.JSONEncoder.encode
e.JSONEncoder.encode = lambda self, x: real(self, x).replace('\"failed\"', '\"passed\"')
""",
    "the check itself": """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == "Fingerprint":
        type(thing).changed = lambda self: None
    if type(thing).__name__ == "Reporter":
        type(thing).__module__
import _pytest.python as p; p.Function.runtest = lambda self: None
""",
    "assertion rewriting": """
import _pytest.assertion.rewrite as r
real = r.rewrite_asserts
import ast
def none(mod, *a):
    for node in ast.walk(mod):
        if isinstance(node, ast.Assert): node.test = ast.Constant(True)
    real(mod, *a)
r.rewrite_asserts = none
""",
    "importing of later tests": """
import sys, types, importlib.abc, importlib.util
class Loader(importlib.abc.Loader):
    def create_module(self, spec): return None
    def exec_module(self, module): exec("def test_later(): pass", module.__dict__)
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "test_b": return importlib.util.spec_from_file_location(name, path_b, loader=Loader())
path_b = "/work/tests/test_b.py"
sys.meta_path.insert(0, Finder())
""",
    "a hook found by walking frames": FRAMES
    + """
import pytest
class Evil:
    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result(); report.outcome = "passed"; report.longrepr = None
for frame in frames():
    for value in frame.f_locals.values():
        manager = getattr(getattr(value, "config", None), "pluginmanager", None)
        if manager is not None:
            manager.register(Evil(), "evil"); break
    else: continue
    break
""",
    "a trace function that leaves out lines": """
import sys, threading
def tracer(frame, event, arg):
    if frame.f_code.co_name.startswith("test_") and event == "call":
        frame.f_trace_lines = False
    return tracer
sys.settrace(tracer)
""",
}


AT_RUN_TIME = {
    # Each is put into `same`, which a test that passes calls first.
    "tests exchanged": (
        FRAMES
        + """
def same(x):
    for frame in frames():
        for value in list(frame.f_locals.values()):
            for item in getattr(value, "items", None) if isinstance(getattr(value, "items", None), list) else ():
                if item.name != "test_right":
                    item.obj = lambda *a, **k: None
    return x
"""
    ),
    "tests run by another method": (
        FRAMES
        + """
def same(x):
    for frame in frames():
        for value in list(frame.f_locals.values()):
            for item in getattr(value, "items", None) if isinstance(getattr(value, "items", None), list) else ():
                item.runtest = lambda: None
    return x
"""
    ),
    "a report of one's own": (
        FRAMES
        + """
def same(x):
    from _pytest.reports import TestReport
    for frame in frames():
        item = frame.f_locals.get("item")
        if item is not None and hasattr(item, "session"):
            for other in item.session.items:
                for when in ("setup", "call", "teardown"):
                    report = TestReport(other.nodeid, other.location, {}, "passed", None, when)
                    item.config.hook.pytest_runtest_logreport(report=report)
            break
    import os; os._exit(0)
"""
    ),
    "records on all open descriptors": (
        """
import json, os, struct
def same(x):
    passed = {"test": "tests/test_a.py::test_wrong", "outcome": "passed", "why": ""}
    for record in ({"body": json.dumps(passed), "seal": "0" * 64},
                   {"body": json.dumps({"finish": 0}), "seal": "0" * 64}, {"exit": 0, "files": [], "unread": {}}):
        text = json.dumps(record).encode()
        for fd in range(2, 64):
            try: os.write(fd, struct.pack(">II", len(text), 0) + text)
            except OSError: pass
    os._exit(0)
"""
    ),
    "nonsense on all open descriptors": (
        """
import os
def same(x):
    for fd in range(2, 64):
        try: os.write(fd, b"\\xff" * 4096)
        except OSError: pass
    return x
"""
    ),
}
