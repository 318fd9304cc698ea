"""MLflow's server with pages that open as those of training runs: `mlflow server --app-name m1`.

MLflow 3.17 opens an experiment as an application of language models, empty here, with an assistant beside it, whatever
the experiment's tags say: what counts is in the browser's storage. This server gives a browser that has made no choice
yet another first value for both, and for the notice on usage data, of which none are collected here. A choice that a
person makes stays.
"""

from __future__ import annotations

import json

from flask import Response, request
from mlflow.server import app as pages
from mlflow.server.fastapi_app import app

__all__ = ["app"]

#: Key in the browser's storage -> first value, both as MLflow writes them.
_FIRST_VALUES = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.settings.telemetry.enabled_v1": "false",
    "mlflow.telemetry.info.alert.dismissed_v1": "true",
}
_SCRIPT = (
    f"<script>for (const [key, value] of Object.entries({json.dumps(_FIRST_VALUES)})) "
    "if (localStorage.getItem(key) === null) localStorage.setItem(key, value);</script>"
)


@pages.before_request
def _whole_page() -> None:
    """The page is always sent: a copy from another server may be in the browser's cache."""
    if request.path == "/":
        for header in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE"):
            request.environ.pop(header, None)


@pages.after_request
def _with_first_values(response: Response) -> Response:
    if request.path == "/" and response.mimetype == "text/html":
        response.direct_passthrough = False
        response.set_data(response.get_data(as_text=True).replace("<head>", f"<head>{_SCRIPT}", 1))
        for header in ("ETag", "Last-Modified"):
            response.headers.pop(header, None)
        response.headers["Cache-Control"] = "no-store"
    return response
