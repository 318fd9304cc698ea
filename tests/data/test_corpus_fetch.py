"""Archives: pip's own configuration decides where from, the hash decides what is used, and nothing partial is kept."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_inputs import local_source, make_sdist

from m1.data.corpus_spec import DebianSource, PypiSource
from m1.data.fetch import cache_dir, fetch
from m1.errors import M1Error, UsageError
from stages.corpus.read import read_files


def pypi(sha256: str, **changes: str) -> PypiSource:
    fields = local_source(kind="pypi-sdist", package="tale", version="1.0", sha256=sha256, include=["*.txt"]) | changes
    del fields["path"]
    return PypiSource.model_validate(fields)


@pytest.fixture
def package(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A folder with one sdist in it, which pip is configured to look in; its SHA-256."""
    folder = tmp_path / "links"
    folder.mkdir()
    # Its setup.py would fail: fetching must not run it.
    files = {"LICENCE": "free", "tale.txt": "Once upon a time.", "setup.py": "raise SystemExit('ran')", "PKG-INFO": ""}
    sha256 = make_sdist(folder, "tale", "1.0", files)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder, sha256


def test_fetches_once_then_needs_no_index(package: tuple[Path, str]) -> None:
    folder, sha256 = package
    source = pypi(sha256)
    files = read_files([source])["notes"]
    assert files.texts == {"tale.txt": b"Once upon a time."}
    assert files.licences == {"LICENCE": b"free"}
    shutil.rmtree(folder)
    assert fetch(source).read_bytes() and read_files([source])["notes"].texts == files.texts


def test_wrong_hash_is_refused_and_not_cached(package: tuple[Path, str]) -> None:
    wrong = "0" * 64
    with pytest.raises(UsageError, match=f"tale 1.0 has sha256 {package[1]}, the spec says {wrong}"):
        fetch(pypi(wrong))
    assert list(cache_dir().iterdir()) == []


def test_damaged_cache_is_replaced(package: tuple[Path, str]) -> None:
    source = pypi(package[1])
    fetch(source).write_bytes(b"damaged")
    assert hashlib.sha256(fetch(source).read_bytes()).hexdigest() == source.sha256


def test_unknown_version_names_package_and_way_out(package: tuple[Path, str]) -> None:
    with pytest.raises(M1Error, match=r"the sdist of tale 2\.0: the index does not list it\. Correct pip's config"):
        fetch(pypi(package[1], version="2.0"))


@pytest.fixture
def cut_index(package: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A package index that announces the whole archive and sends as many bytes of it as the list says."""
    content = (package[0] / "tale-1.0.tar.gz").read_bytes()
    allowed = [len(content) // 2]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = self.path.endswith("/")
            body = b'<a href="/tale-1.0.tar.gz">tale-1.0.tar.gz</a>' if page else content
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if page else "application/gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if page else body[: allowed[0]])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple/")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    yield allowed
    server.shutdown()
    thread.join()
    server.server_close()


def test_partial_download_is_never_taken_for_complete(cut_index: list[int], package: tuple[Path, str]) -> None:
    source = pypi(package[1])
    with pytest.raises(M1Error):
        fetch(source)
    assert list(cache_dir().iterdir()) == []
    cut_index[0] = 10**9  # the whole archive from now on
    assert hashlib.sha256(fetch(source).read_bytes()).hexdigest() == source.sha256


def test_unreachable_index(package: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(M1Error, match=r"cannot download the sdist of tale 1\.0"):
        fetch(pypi(package[1]))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_debian_package_from_the_cache(checkout: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tale"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: tale\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@localhost>\nDescription: a tale\n"
    )
    (tree / "usr").mkdir()
    (tree / "usr" / "tale.txt").write_text("Once upon a time.")
    (tree / "usr" / "LICENCE").write_text("free")
    deb = tmp_path / "tale.deb"
    subprocess.run(["dpkg-deb", "--build", tree, deb], check=True, capture_output=True)
    sha256 = hashlib.sha256(deb.read_bytes()).hexdigest()
    fields = local_source(kind="debian", package="tale", version="1", sha256=sha256, include=["usr/*.txt"])
    del fields["path"]
    source = DebianSource.model_validate(fields | {"licence_files": ["usr/LICENCE"]})
    cache_dir().mkdir(parents=True)
    shutil.copy(deb, cache_dir() / sha256)
    assert read_files([source])["notes"].texts == {"usr/tale.txt": b"Once upon a time."}


def test_pattern_that_matches_nothing(package: tuple[Path, str]) -> None:
    source = pypi(package[1]).model_copy(update={"include": ["docs/**.rst"]})
    with pytest.raises(UsageError, match=r"source notes: include \['docs/\*\*\.rst'\] matches no file"):
        read_files([source])
