"""Weights of a base model in a training model: every rank reads its own part of every tensor and nothing else."""

from __future__ import annotations

import torch

from m1.errors import UsageError
from m1.formats.folder import Base
from m1.formats.mapping import FolderReader, trained
from m1.model.hybrid import HybridModel, global_name


@torch.no_grad()
def load(base: Base, model: HybridModel) -> list[str]:
    """Replace this rank's parameters by those of the base model; returns notes for the report.

    Raises:
        UsageError: the folder's tensors are not those of the model, or a weight is not a finite number.
    """
    rounded = 0
    with FolderReader(base, model.settings) as read:
        for name, parameter in model.named_parameters():
            group = model.pg_collection.expt_tp if ".experts." in name else model.pg_collection.tp
            whole = global_name(model, name)
            part = trained(read, whole, model.settings, base.layout, group.rank(), group.size())
            if part.shape != parameter.shape:
                raise ValueError(f"{whole}: this rank holds {tuple(parameter.shape)}, cut was {tuple(part.shape)}")
            parameter.copy_(part)
            if not bool(parameter.isfinite().all()):
                raise UsageError(
                    f"pretrain.init_from={base.folder}: {whole} has values that are not finite",
                    "Fetch the folder again.",
                )
            rounded += part.element_size() > parameter.element_size()
    notes = [f"Started from {base.folder} ({base.layout} layout, digest {base.digest[:16]}).", *base.notes]
    if rounded:
        notes.append("Its weights are stored in a wider type than parallel.precision and were rounded to it.")
    return notes
