"""Local folders of data files, as the library `datasets` sees them."""

from __future__ import annotations

from pathlib import Path

from m1.rows import LINES


def json_lines(folder: Path, config: str | None, split: str) -> list[Path]:
    """The files of a split if all of them are JSON lines, which can be read row by row; else none.

    Which files make up a split is `datasets`' own rule; it raises what it likes where there is no such folder or split.
    """
    import datasets  # it takes seconds, and few need it

    parts = datasets.load_dataset_builder(str(folder), config).config.data_files or {}
    files = [Path(str(file)) for file in parts.get(split, ())]
    return files if all(file.suffix in LINES for file in files) else []
