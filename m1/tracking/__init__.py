"""What happened, and from what: MLflow runs, the model registry, lineage back to every data hash, and the report.

Nothing here imports MLflow or matplotlib before it is used, so that commands which need neither start at once.
"""

from m1.tracking.report import report
from m1.tracking.runs import Tracker
from m1.tracking.stage_run import StageTracker
from m1.tracking.tree import lineage, lineage_dict

__all__ = ["StageTracker", "Tracker", "lineage", "lineage_dict", "report"]
