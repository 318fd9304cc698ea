"""What a corpus is made of: the checked content of a file in `data_specs/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from m1 import paths
from m1.config.reading import describe, read_yaml
from m1.errors import UsageError

Domain = Literal["prose", "stem", "code", "books", "qa"]
#: How text is taken out of a file; see `stages.corpus.extract`.
Format = Literal["text", "rst", "markdown", "python", "docstrings", "conversations"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Source(_Part):
    """What every source states, wherever it comes from."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    licence: str = Field(min_length=2, description="SPDX expression of the text, as the package itself declares it")
    domain: Domain
    weight: float = Field(gt=0, description="share of the corpus in bytes, relative to the other sources")
    format: Format
    boilerplate: list[str] = Field([], description="regular expressions, by line, whose matches are removed first")

    @field_validator("boilerplate")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns


class _FileSource(_Source):
    """A source that is a tree of files. Patterns are matched against the path inside the tree; `**` spans folders."""

    include: list[str] = Field(min_length=1)
    exclude: list[str] = []
    licence_files: list[str] = Field(min_length=1, description="patterns of files stored beside the corpus")


class _PinnedSource(_FileSource):
    """An archive named by package, version and the SHA-256 of its content."""

    package: str = Field(min_length=1)
    version: str = Field(min_length=1)
    sha256: Sha256


class PypiSource(_PinnedSource):
    """A Python package, from the index that pip is configured for. Paths are relative to the sdist's top folder."""

    kind: Literal["pypi-sdist", "pypi-wheel"]


class DebianSource(_PinnedSource):
    """A Debian package, downloaded by apt-get; paths are relative to the root of the file system."""

    kind: Literal["debian"]


class LocalSource(_FileSource):
    """A folder on this machine, relative to the checkout unless absolute."""

    kind: Literal["local"]
    path: str

    @property
    def folder(self) -> Path:
        return paths.ROOT / self.path


class HubSource(_Source):
    """A data set read through `datasets`: a name on the hub, or a local folder of data files."""

    kind: Literal["hub"]
    format: Format = "text"
    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, description="commit of the data set; required unless `dataset` is a folder")
    text_column: str = "text"
    max_rows: int = Field(1_000_000, ge=1)

    @property
    def location(self) -> str:
        """The folder, relative to the checkout unless absolute, if there is one; else the name on the hub."""
        folder = paths.ROOT / self.dataset
        return str(folder) if folder.is_dir() else self.dataset

    @model_validator(mode="after")
    def _pinned(self) -> HubSource:
        if self.revision is None and not (paths.ROOT / self.dataset).is_dir():
            raise ValueError(f"dataset {self.dataset} needs a revision: without one the corpus may change unnoticed")
        return self


Source = Annotated[PypiSource | DebianSource | LocalSource | HubSource, Field(discriminator="kind")]


class QualityRules(_Part):
    """Thresholds of datatrove's GopherQualityFilter (Gopher, arXiv 2112.11446 Table A1); None switches a rule off."""

    min_doc_words: int | None = 50
    max_doc_words: int | None = 100_000
    min_avg_word_length: float | None = 3
    max_avg_word_length: float | None = 10
    max_symbol_word_ratio: float | None = 0.1
    max_bullet_lines_ratio: float | None = 0.9
    max_ellipsis_lines_ratio: float | None = 0.3
    max_non_alpha_words_ratio: float | None = Field(0.8, description="least share of words with a letter in them")
    min_stop_words: int | None = 2


class RepetitionRules(_Part):
    """Thresholds of datatrove's GopherRepetitionFilter; n-gram rules map n to the largest share of characters."""

    dup_line_frac: float | None = 0.3
    dup_para_frac: float | None = 0.3
    dup_line_char_frac: float | None = 0.2
    dup_para_char_frac: float | None = 0.2
    top_n_grams: dict[int, float] = {2: 0.2, 3: 0.18, 4: 0.16}
    dup_n_grams: dict[int, float] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class CodeRules(_Part):
    """Code that people wrote is kept; generated, minified and tabular files are not."""

    min_lines: int = 5
    max_line_length: int = 1000
    max_avg_line_length: float = 100
    min_alpha_fraction: float = Field(0.25, description="letters among all characters")
    max_digit_fraction: float = Field(0.2, description="digits among all characters: tables of numbers")


class Filters(_Part):
    """Rules for the documents of one domain; a group that is absent is not applied."""

    quality: QualityRules | None = None
    repetition: RepetitionRules | None = None
    code: CodeRules | None = None


class NearDuplicates(_Part):
    """MinHash with locality-sensitive hashing: `buckets` bands of `hashes_per_bucket` hashes over word n-grams.

    Two documents of Jaccard similarity s are compared with probability 1 - (1 - s^hashes_per_bucket)^buckets.
    """

    n_grams: int = Field(5, ge=1)
    buckets: int = Field(14, ge=1)
    hashes_per_bucket: int = Field(8, ge=1)
    min_similarity: float = Field(0.7, gt=0, le=1, description="estimated Jaccard similarity of a duplicate")


class CorpusSpec(_Part):
    """A corpus: sources with their weights, and how documents are cleaned, filtered and de-duplicated."""

    description: str
    sources: list[Source] = Field(min_length=1)
    filters: dict[Domain, Filters] = {}
    near_duplicates: NearDuplicates = Field(default_factory=lambda: NearDuplicates())
    headroom: float = Field(
        1.15, ge=1, description="clean bytes looked for per source over its share, for duplicates and short sources"
    )
    max_document_characters: int = Field(
        16_000, ge=1000, description="longer documents are cut at paragraphs, after filtering and de-duplication"
    )

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name}")
        return sources


def load(name: str, folder: Path | None = None) -> CorpusSpec:
    """Read and check `data_specs/<name>.yaml`.

    Raises:
        UsageError: the file is missing or not YAML, or a field is unknown, mistyped or impossible.
    """
    folder = folder or paths.DATA_SPECS
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("corpus-*.yaml"))) or "none"
        raise UsageError(f"corpus.spec: no file {path}", f"Specs that exist: {known}.")
    content = read_yaml(path)
    try:
        return CorpusSpec.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {describe(error, CorpusSpec, content)}", "Correct the file.") from error
