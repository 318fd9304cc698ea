"""Our block in `.env`: the user's bytes stay, and every reader gets our values back."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.dotenv_file import BEGIN, END, write_block
from m1.errors import ServiceError

OURS: dict[str, str | None] = {
    "M1_HOME": "/x/it's a ca ses/.m1",
    "M1_URL": "http://127.0.0.1:4200/api",
    "M1_LATER": None,
}
GONE: dict[str, str | None] = dict.fromkeys(OURS)
BLOCK = f'{BEGIN}\nM1_HOME="/x/it\'s a ca ses/.m1"\nM1_URL="http://127.0.0.1:4200/api"\n{END}\n'.encode()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def in_folder(factory: pytest.TempPathFactory, content: bytes) -> Path:
    file = factory.getbasetemp() / "any.env"
    file.write_bytes(content)
    return file


# --- the user's bytes ---


@pytest.mark.parametrize(
    ("users", "with_block"),
    [
        (b"", BLOCK),
        (b"A=1\n", b"A=1\n" + BLOCK),
        (b"A=1", b"A=1\n" + BLOCK[:-1]),
        (b"A=1\r\nB=2\r\n", b"A=1\r\nB=2\r\n" + BLOCK.replace(b"\n", b"\r\n")),
        (b"A=1\r\nB=2", b"A=1\r\nB=2\r\n" + BLOCK.replace(b"\n", b"\r\n")[:-2]),
        ("\ufeffA=1\n".encode(), "\ufeffA=1\n".encode() + BLOCK),
        ("\ufeff".encode(), "\ufeff".encode() + BLOCK),
        ("A='x\u2028y\x85z\x0b'\n".encode(), "A='x\u2028y\x85z\x0b'\n".encode() + BLOCK),
        (b"A='\xe9'\n", b"A='\xe9'\n" + BLOCK),
        (b"A='two\nlines'\n\n\n# end\n", b"A='two\nlines'\n\n\n# end\n" + BLOCK),
        (b"not a = line '\n", b"not a = line '\n" + BLOCK),
    ],
)
def test_the_users_bytes_stay_and_come_back(users: bytes, with_block: bytes, file: Path) -> None:
    file.write_bytes(users)
    assert write_block(file, OURS)
    assert file.read_bytes() == with_block
    assert not write_block(file, OURS)
    assert write_block(file, GONE)
    assert file.read_bytes() == users
    assert not write_block(file, GONE)


pieces = st.sampled_from([b"A=1", b"B='x", b'C="y"', b"\n", b"\r\n", b"\r", b"'", b'"', b"#", b"\xe9", b"\xef\xbb\xbf"])


@settings(deadline=None)
@given(st.binary() | st.lists(pieces).map(b"".join), st.booleans())
@example(b"A=1\r", False)
@example(b"\xff\xfeA\0", False)
def test_any_bytes_of_the_user(tmp_path_factory: pytest.TempPathFactory, users: bytes, twice: bool) -> None:
    file = in_folder(tmp_path_factory, users)
    try:
        write_block(file, OURS)
    except ServiceError:  # UTF-16, or a quote without an end
        assert file.read_bytes() == users
        return
    assert file.read_bytes().startswith(users) and BEGIN.encode() in file.read_bytes()
    if twice:
        write_block(file, OURS | {"M1_LATER": "now"})
    write_block(file, {} if twice else GONE)
    assert file.read_bytes() == users


def test_a_block_is_replaced_where_it_stands(file: Path) -> None:
    file.write_bytes(b"A=1\n" + BLOCK + b"B=2")
    assert write_block(file, {"M1_URL": "other"})
    assert file.read_bytes() == b"A=1\n" + f'{BEGIN}\nM1_URL="other"\n{END}\n'.encode() + b"B=2"
    assert write_block(file, {})
    assert file.read_bytes() == b"A=1\nB=2"


def test_several_blocks_become_one_at_the_first_place(file: Path) -> None:
    file.write_bytes(b"A=1\n" + BLOCK + b"B=2\n" + BLOCK)
    assert write_block(file, OURS)
    assert file.read_bytes() == b"A=1\n" + BLOCK + b"B=2\n"


def test_markers_that_an_editor_has_touched(file: Path) -> None:
    file.write_bytes(b"A=1\r\n" + BLOCK.replace(b"\n", b" \r\n") + b"B=2\r\n")
    assert write_block(file, GONE)
    assert file.read_bytes() == b"A=1\r\nB=2\r\n"


@pytest.mark.parametrize(
    ("damaged", "left"),
    [
        (b"A=1\n" + BLOCK.replace(END.encode() + b"\n", b"") + b"MINE=2\nM1_HOME=3\n", b"A=1\nMINE=2\nM1_HOME=3\n"),
        (b"A=1\n" + BLOCK.replace(BEGIN.encode() + b"\n", b"") + b"MINE=2\n", b"A=1\nMINE=2\n"),
        (BLOCK[: BLOCK.index(b"4200")], b""),
        (f"{BEGIN}\nMINE=2\n".encode() + BLOCK + b"B=2\n", b"MINE=2\nB=2\n"),
        (f"MINE=2\n{END}\nB=2\n".encode(), b"MINE=2\nB=2\n"),
        (f"{BEGIN}".encode(), b""),
    ],
)
def test_a_damaged_block_takes_none_of_the_users_lines(damaged: bytes, left: bytes, file: Path) -> None:
    file.write_bytes(damaged)
    assert write_block(file, GONE)
    assert file.read_bytes() == left
    file.write_bytes(damaged)
    assert write_block(file, OURS)
    assert file.read_bytes().count(BLOCK) == 1
    assert file.read_bytes().replace(BLOCK, b"") == left


# --- the file itself ---


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664])
def test_the_mode_stays(mode: int, file: Path) -> None:
    file.write_bytes(b"TOKEN=secret\n")
    file.chmod(mode)
    for variables in (OURS, GONE):
        assert write_block(file, variables)
        assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_stays(file: Path) -> None:
    file.write_bytes(b"A=1\n")
    os.chown(file, 12345, 23456)
    file.chmod(0o640)
    assert write_block(file, OURS)
    status = file.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 23456, 0o640)


def test_a_new_file_has_the_mode_of_new_files(file: Path) -> None:
    (file.parent / "other").touch()
    assert write_block(file, OURS)
    assert file.read_bytes() == BLOCK
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_nothing_is_written_where_nothing_changes(file: Path) -> None:
    assert not write_block(file, GONE)
    assert not file.exists()
    file.write_bytes(b"A=1\n")
    write_block(file, OURS)
    before = file.stat()
    assert not write_block(file, OURS)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert os.listdir(file.parent) == [".env"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_symlink_stays_one(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "shared.env"
    if exists:
        target.write_bytes(b"A=1\n")
    (tmp_path / "middle").symlink_to("elsewhere/shared.env")
    link = tmp_path / ".env"
    link.symlink_to("middle")
    assert write_block(link, OURS)
    assert os.readlink(link) == "middle" and os.readlink(tmp_path / "middle") == "elsewhere/shared.env"
    assert target.read_bytes() == (b"A=1\n" if exists else b"") + BLOCK
    assert os.listdir(tmp_path / "elsewhere") == ["shared.env"]


def refused(path: Path) -> str:
    with pytest.raises(ServiceError) as caught:
        write_block(path, OURS)
    message = str(caught.value)
    assert "\n" not in message and "`m1 up` again" in message and str(path) in message
    return message


def test_what_cannot_be_written_is_one_line(tmp_path: Path, file: Path) -> None:
    file.mkdir()
    assert "cannot be written: Is a directory" in refused(file)
    file.rmdir()
    os.mkfifo(file)
    assert "it is a device or a pipe" in refused(file)
    assert stat.S_ISFIFO(file.stat().st_mode)
    file.unlink()
    file.symlink_to("missing/folder/.env")
    assert "No such file or directory" in refused(file)
    file.unlink()
    file.symlink_to(".env")
    assert "cannot be written" in refused(file)
    assert "No such file or directory" in refused(tmp_path / "missing" / ".env")


@pytest.mark.parametrize("what", ["access", "replace", "open", "fsync"])
def test_a_file_system_that_refuses(what: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(b"A=1\n")

    def refuse(*_: object, **__: object) -> bool:
        if what == "access":
            return False
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, what, refuse)
        assert ("Permission denied" if what == "access" else "Read-only file system") in refused(file)
    assert file.read_bytes() == b"A=1\n"
    assert os.listdir(file.parent) == [".env"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_or_folder_without_the_right_to_write(file: Path) -> None:
    file.write_bytes(b"A=1\n")
    file.chmod(0o400)
    assert "Permission denied" in refused(file)
    file.chmod(0o600)
    file.parent.chmod(0o500)
    try:
        assert "Permission denied" in refused(file)
    finally:
        file.parent.chmod(0o700)


def test_contents_that_no_reader_would_understand(file: Path) -> None:
    file.write_bytes("A=1\n".encode("utf-16"))
    assert "is UTF-16" in refused(file)
    assert not write_block(file, GONE)
    file.write_bytes(b'A="open\n')
    assert "M1_HOME cannot be read back; a quote above the line" in refused(file)
    file.write_bytes(b"A=1\n")
    with pytest.raises(ServiceError, match="is not UTF-8"):
        write_block(file, {"M1_HOME": os.fsdecode(b"/x/\xe9")})


# --- the readers ---


class Readers(BaseSettings):
    """Reads `.env` as Prefect does."""

    model_config = SettingsConfigDict(extra="ignore")

    m1_home: str = ""
    m1_url: str = ""


pieces_of_values = st.sampled_from([*"${}:-#\\\"'= \n\r\t\u2028é", "${HOME}", "$(id)", "%s"])
values = st.text() | st.lists(pieces_of_values).map("".join)


@settings(deadline=None)
@given(values, values, st.sampled_from([b"", b"A=1\n", b"B=2\r\n", b"M1_URL=mine\n", "\ufeffA='é'".encode()]))
@example("${M1_URL}", "$${${a:-b}", b"M1_URL=x\n")
@example("\\n${", "'\"\\", b"A=1")
@example("/x/it's a ca ses/$HOME", "#x #y", b"")
def test_readers_get_the_values_back(
    tmp_path_factory: pytest.TempPathFactory, home: str, url: str, users: bytes
) -> None:
    assume("\0" not in home + url)  # no variable has it
    file = in_folder(tmp_path_factory, users)
    write_block(file, {"M1_HOME": home, "M1_URL": url})
    read = dotenv_values(file)
    assert (read["M1_HOME"], read["M1_URL"]) == (home, url)
    loaded = Readers(_env_file=file)  # type: ignore[call-arg]
    assert (loaded.m1_home, loaded.m1_url) == (home, url)


def test_prefect_reads_them(tmp_path: Path) -> None:
    house = tmp_path / "it's a ca ses #1 $x ${HOME} \\n"
    house.mkdir()
    wanted = {"PREFECT_HOME": str(house / ".m1"), "PREFECT_API_URL": "http://127.0.0.1:4200/api"}
    write_block(house / ".env", dict(wanted))
    program = "from prefect.settings import get_current_settings as s; print(s().home, s().api.url, sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run([sys.executable, "-c", program], cwd=house, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(wanted.values()), done.stderr
