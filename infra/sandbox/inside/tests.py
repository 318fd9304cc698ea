"""A pytest run that reports each outcome over a line of its own, signed, and looks for tampering before it does.

Runs in the job's process, together with the code under test: what it can and cannot promise is in docs/sandbox.md.
Executed, and `load` called, before any untrusted code is there; `run` is called in the job's own process.
"""

import ast
import difflib  # noqa: F401
import hmac
import importlib.machinery
import json
import os
import random
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
TRUSTED = (
    *("pytest", "_pytest", "pluggy", "iniconfig", "unittest", "builtins", "json", "hmac", "__main__"),
    # By which test files are found, read, compiled and compared.
    *("importlib", "_frozen_importlib", "_frozen_importlib_external", "marshal", "ast", "tokenize", "inspect"),
    *("linecache", "io", "_io", "math", "numbers", "operator", "_operator", "difflib", "abc", "_abc", "types"),
)
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

    def __init__(self, send, wanted, seed, bottom):
        self.send, self.wanted, self.seed, self.bottom = send, wanted, seed, bottom
        self.hooks, self.items, self.phases, self.config, self.fault = None, {}, {}, None, None
        self.values = {}

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
        # Files in an order of this run's own; within a file the order is the file's.
        files = {}
        for item in items:
            files.setdefault(item.nodeid.split("::")[0], []).append(item)
        order = sorted(files)
        random.Random(self.seed).shuffle(order)
        items[:] = [item for name in order for item in files[name]]

    def _is_wanted(self, node_id):
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
            self.values[item.nodeid] = values_of(item)
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
        if self.values.get(item.nodeid) != values_of(item):
            self._blame(f"a value or method that {item.nodeid} uses was changed")
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


def values_of(item):
    """What a test is given and made of: its parameters, as far as they are plain values, and the methods of its class.

    A parameter is compared by its content, since an object may be changed in place, and by its identity.
    """
    given = getattr(getattr(item, "callspec", None), "params", {})
    parameters = {name: (id(value), outline(value)) for name, value in given.items()}
    classes = [cls for cls in getattr(getattr(item, "cls", None), "__mro__", ()) if cls.__flags__ & 1 << 9]
    methods = {
        (id(cls), name): id(value)
        for cls in classes
        for name, value in list(vars(cls).items())
        if callable(value) or isinstance(value, (property, staticmethod, classmethod))
    }
    return parameters, methods


def outline(value, depth=4):
    """Content of plain values and of containers of them, to a depth; the type alone for everything else."""
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        return kind.__name__, repr(value) if kind is not int else value
    if depth and kind in (list, tuple):
        return kind.__name__, [outline(part, depth - 1) for part in value[:1000]]
    if depth and kind in (dict,):
        pairs = list(value.items())[:1000]
        return kind.__name__, [(outline(k, depth - 1), outline(v, depth - 1)) for k, v in pairs]
    return kind.__name__, None


class Hidden:
    """Finds modules of which there is only compiled code: no test can read, or tell by its text, which code it has.

    The code differs from run to run in what does nothing: statements without effect, and numbers of lines.
    """

    def __init__(self, sources, seed):
        rng = random.Random(seed)
        self.codes = {path: varied(text.encode("latin-1"), path, rng) for path, text in sources.items()}

    def find_spec(self, name, path=None, target=None):
        place = name.replace(".", "/")
        for root in ("", "src/"):
            for file, is_package in ((f"{root}{place}/__init__.py", True), (f"{root}{place}.py", False)):
                if file in self.codes:
                    spec = importlib.machinery.ModuleSpec(name, self, origin=file, is_package=is_package)
                    if is_package:
                        spec.submodule_search_locations[:] = [f"{WORK}/{root}{place}"]
                    return spec
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        # Once, and then it is gone from here; code that does not compile says so where it is imported.
        code = self.codes[module.__spec__.origin]
        if isinstance(code, SyntaxError):
            raise code
        module.__file__ = f"{WORK}/{module.__spec__.origin}"
        exec(code, module.__dict__)

    def get_source(self, name):
        return None


def varied(source, path, rng):
    """Compiled code that does what `source` does."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return error if isinstance(error, SyntaxError) else SyntaxError(str(error))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            at = 1 if ast.get_docstring(node, clean=False) is not None else 0
            idle = [rng.choice(("[]", "{}", "not []", "[[]]", "[{}]", "not {}")) for _ in range(rng.randint(1, 3))]
            node.body[at:at] = ast.parse("\n".join(idle)).body
    ast.fix_missing_locations(ast.increment_lineno(tree, rng.randint(0, 40)))
    return compile(tree, f"{WORK}/{path}", "exec", dont_inherit=True)


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
    if spec["hidden"]:
        sys.meta_path.insert(0, Hidden(spec.pop("hidden"), spec["seed"]))
    reporter = Reporter(send, wanted, spec.pop("seed"), sys._getframe())
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
