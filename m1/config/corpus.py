"""Raw text."""

from __future__ import annotations

from pydantic import Field

from m1.config.base import Section


class Corpus(Section):
    """Raw text: which sources, how they are cleaned and de-duplicated."""

    spec: str = Field(description="name of a file in data_specs/, without .yaml")
    max_megabytes: float = Field(gt=0, description="clean text kept, in 10^6 bytes, over all sources")
