"""A pytest run that reports each outcome over a line of its own, signed, and looks for tampering before it does.

Runs in the job's process, together with the code under test: what it can and cannot promise is in docs/sandbox.md.
Executed, and `load` called, before any untrusted code is there; `run` is called in the job's own process.
"""

import difflib  # noqa: F401
import hmac
import json
import os
import struct
import sys
import types

import pytest
from _pytest.assertion.rewrite import AssertionRewritingHook
from _pytest.config import builtin_plugins

WORK = "/work"
#: As in infra/sandbox/container.py, which this file cannot import; not read from the environment, which a job may set.
COMPILED = "/opt/m1-compiled"
#: Packages whose functions and classes must be the same at the end as before the code under test came.
TRUSTED = ("pytest", "_pytest", "pluggy", "iniconfig", "unittest", "builtins", "json", "hmac", "__main__")
#: Modules that decide about an outcome: looked at after every test.
CORE = (
    *("builtins", "json.encoder", "unittest.case", "pluggy._hooks", "pluggy._manager", "pluggy._callers"),
    *(f"_pytest.{name}" for name in ("runner", "reports", "python", "unittest", "outcomes", "raises", "skipping")),
    *(f"_pytest.{name}" for name in ("python_api", "main", "nodes", "_code.code", "assertion", "assertion.util")),
)
known: dict = {}


def load():
    """Import what pytest imports when it needs it, and remember what all of it looks like."""
    for name in sorted(builtin_plugins):
        if name != "pytester":
            __import__(f"_pytest.{name}")
    names = [name for name in sys.modules if name.split(".")[0] in TRUSTED]
    own = {"m1_tests": globals()}
    known["all"] = Fingerprint({name: vars(sys.modules[name]) for name in names} | own)
    known["core"] = Fingerprint({name: vars(sys.modules[name]) for name in CORE if name in sys.modules} | own)


class Fingerprint:
    """Identity of every function, class and method of some modules."""

    def __init__(self, spaces):
        self.places, self.functions, self.codes, self.classes, seen = [], [], {}, [], set()
        for name, space in spaces.items():
            self._add(space, name, seen, name.split(".")[0])

    def _add(self, space, where, seen, root):
        for name, value in list(space.items()):
            if callable(value) or isinstance(value, (property, staticmethod, classmethod)):
                self.places.append((space, name, value, where))
                self._look_into(value, where, seen, root)

    def _look_into(self, value, where, seen, root):
        if isinstance(value, property):
            parts = [value.fget, value.fset]
        else:
            parts = [getattr(value, "__func__", value)]
        for part in parts:
            if id(part) in seen:
                continue
            seen.add(id(part))
            if isinstance(part, types.FunctionType):
                self.functions.append((part, part.__code__, part.__defaults__, part.__kwdefaults__, where))
                self._add_codes(part.__code__, part.__globals__)
            elif isinstance(part, type) and str(part.__module__).split(".")[0] == root and part.__flags__ & 1 << 9:
                self.classes.append((part, {name for name, v in vars(part).items() if callable(v)}, where))
                self._add(vars(part), f"{where}.{part.__name__}", seen, root)

    def _add_codes(self, code, space):
        self.codes[id(code)] = (code, id(space))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_codes(constant, space)

    def settle(self):
        """Take over what pytest itself has changed while it was configured (`legacypath` adds methods)."""
        for place, (space, name, value, where) in enumerate(self.places):
            now = space.get(name)
            if now is not value:
                self.places[place] = (space, name, now, where)
                self._look_into(now, where, set(), "")
        self.classes = [(cls, {*names, *vars(cls)}, where) for cls, names, where in self.classes]

    def changed(self):
        """Name of the first thing that is not as it was, or None."""
        for space, name, value, where in self.places:
            if space.get(name) is not value:
                return f"{where}.{name}"
        for function, code, defaults, keywords, where in self.functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return f"{where}.{function.__name__}"
            if function.__kwdefaults__ is not keywords:
                return f"{where}.{function.__name__}"
        for cls, names, where in self.classes:
            for name, value in vars(cls).items():
                if name not in names and isinstance(value, types.FunctionType):
                    return f"{where}.{cls.__name__}.{name}"
        return None


def make_line(secret, control):
    """Function that sends one signed record. The key stays in a C object that nobody else holds."""
    base, count = hmac.new(secret, digestmod="sha256"), [0]
    dumps, write, pack = json.dumps, os.write, struct.Struct(">II").pack

    def send(record):
        body = dumps(record)
        seal = base.copy()
        seal.update(f"{count[0]}:{body}".encode())
        count[0] += 1
        text = dumps({"body": body, "seal": seal.hexdigest()}).encode()
        data = memoryview(pack(len(text), 0) + text)
        while data:
            data = data[write(control, data) :]

    return send


class Reporter:
    """pytest plugin: what was collected, one outcome per test, and the end."""

    def __init__(self, send, wanted, extra, bottom):
        self.send, self.wanted, self.extra, self.bottom = send, wanted, extra, bottom
        self.hooks, self.items, self.phases, self.config, self.fault = None, {}, {}, None, None

    # -- collection

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session):
        for fingerprint in known.values():
            fingerprint.settle()
        self.config = session.config
        self.hooks = self._hooks()

    def pytest_collectreport(self, report):
        if report.failed:
            self.send({"broken": report.nodeid, "why": why(report)})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        if self.wanted is not None:
            items[:] = [item for item in items if self._is_wanted(item.nodeid)]

    def _is_wanted(self, node_id):
        if node_id.startswith(self.extra):
            return True
        if node_id in self.wanted:
            return True
        parts = node_id.split("[")[0].split("::")
        folders = parts[0].split("/")
        found = {"::".join(parts[:count]) for count in range(1, len(parts) + 1)}
        found |= {"/".join(folders[:count]) for count in range(1, len(folders))}
        return not self.wanted.isdisjoint(found)

    def pytest_collection_finish(self, session):
        self._look("all")
        for item in session.items:
            function = plain(item)
            self.items[item.nodeid] = (item, type(item), function, getattr(function, "__code__", None))
            self._look_at_origin(item)
        self.send({"collected": [item.nodeid for item in session.items]})

    def _look_at_origin(self, item):
        module = getattr(item, "module", None)
        loader = getattr(getattr(module, "__spec__", None), "loader", None)
        if module is not None and type(loader) is not AssertionRewritingHook:
            self._blame(f"{item.nodeid} was not loaded by pytest")

    # -- run

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item):
        before = self.items.get(item.nodeid)
        function = plain(item)
        now = (item, type(item), function, getattr(function, "__code__", None))
        same = before is not None and all(one is other for one, other in zip(before, now))
        if not same or "runtest" in vars(item):
            self._blame(f"{item.nodeid} was exchanged")
        if sys.gettrace() or sys.getprofile():
            self._blame("a trace function was set")

    def pytest_runtest_logreport(self, report):
        phases = self.phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when == "teardown":
            self._look("core")
            self._look_at_stack()
            outcome, reason = judge(phases)
            self.send({"test": report.nodeid, "outcome": outcome, "why": reason})

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, exitstatus):
        self._look("all")
        self._look_at_stack()
        self.send({"finish": int(exitstatus)})

    # -- what may not change

    def _hooks(self):
        callers = vars(self.config.pluginmanager.hook).items()
        return {name: [impl.function for impl in hook.get_hookimpls()] for name, hook in callers if name[0] != "_"}

    def _look(self, which):
        changed = known[which].changed()
        if changed:
            self._blame(f"{changed} was changed")
        if self._hooks() != self.hooks:
            self._blame("a hook of pytest was added or removed")
        if sys.gettrace() or sys.getprofile():
            self._blame("a trace function was set")

    def _look_at_stack(self):
        """All callers up to `run` are pytest's own code, with its own globals."""
        frame, codes = sys._getframe(1), known["all"].codes
        while frame is not None and frame is not self.bottom:
            trusted = codes.get(id(frame.f_code))
            if trusted is None or trusted[1] != id(frame.f_globals):
                self._blame(f"an outcome came from {frame.f_code.co_filename}")
                return
            frame = frame.f_back
        if frame is None:
            self._blame("an outcome came from another thread")

    def _blame(self, what):
        if self.fault is None:
            self.fault = what
            self.send({"tampered": what})


def plain(item):
    """The function under a bound method."""
    found = getattr(item, "obj", None)
    return getattr(found, "__func__", found)


def why(report):
    crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
    lines = str(crash.message if crash is not None else getattr(report, "longreprtext", "")).strip().splitlines()
    marked = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return (marked[-1] if marked else lines[0] if lines else "")[:300]


def judge(phases):
    """Outcome of a test from the reports of its phases."""
    for report in phases:
        if report.failed:
            return ("failed" if report.when == "call" else "error"), why(report)
    whole = [report for report in phases if type(report).__name__ != "SubtestReport"]
    if any(report.skipped for report in whole):
        return "skipped", ""
    if [report.when for report in whole] == ["setup", "call", "teardown"]:
        return "passed", ""
    return "error", "a phase is missing"


def run(spec, control):
    """Run the tests of `spec` in this process; returns pytest's exit code."""
    sys.path[:0] = [path for path in (WORK, WORK + "/src") if os.path.isdir(path)]
    # Nobody's compiled files stand in for the sources: Python and pytest find the image's own, and no others.
    sys.dont_write_bytecode = True
    sys.pycache_prefix = COMPILED
    sys.argv[:] = ["pytest"]
    send = make_line(bytes.fromhex(spec.pop("secret")), control)
    wanted = None if spec["tests"] is None else set(spec["tests"])
    reporter = Reporter(send, wanted, spec["extra"], sys._getframe())
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-p", "no:cacheprovider", "-p", "no:faulthandler", "--noconftest", "-o", "addopts=", "-c", "/dev/null"]
    options += [
        "--keep-duplicates",
        "--rootdir",
        WORK,
        "--continue-on-collection-errors",
        "--tb=short",
        "-q",
        "--no-header",
    ]
    code = int(pytest.main([*options, *spec["paths"]], plugins=[reporter]))
    sys.stdout.flush()
    return code
