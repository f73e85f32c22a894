"""A client of an MLflow store, and its errors as sentences.

MLflow is imported inside `connect`: it takes seconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from zinfer.redact import redact
from zinfer.tracking.deadline import STORE_TIMEOUT_S
from zinfer.tracking.store import TrackingUnavailable, first_connection_lock
from zinfer.tracking.uri import is_server, no_stray_folder, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient


@contextlib.contextmanager
def quotes_explained(uri: str) -> Iterator[None]:
    """Say why a new database cannot be prepared from this working directory, where that is why.

    MLflow writes the directory's name into a statement of SQL, and quotes end it. A sqlite store
    has the row already that MLflow would write (zinfer.tracking.store).

    Raises:
        TrackingUnavailable: it failed, and the directory's name has a quote.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        quoted = {"'", '"'} & set(os.getcwd())
        if not quoted or is_server(uri) or sqlite_path(uri) is not None:
            raise
        raise TrackingUnavailable(
            f"MLflow cannot prepare {redact(uri)} from {os.getcwd()}: the directory's name has a "
            f"quote ({type(error).__name__})",
            remedy="Start in a directory without quotes in its name",
            settings=("tracking=sqlite",),
        ) from None


def connect(uri: str, timeout_s: float = STORE_TIMEOUT_S) -> MlflowClient:
    """Return a client of the store, which exists.

    MLflow is kept from printing to stdout, phoning home and retrying for minutes.

    Args:
        timeout_s: longest wait for one answer of a server; `within` bounds all of them together.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, int(timeout_s))))
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient

    with first_connection_lock(uri), no_stray_folder(uri), quotes_explained(uri):
        return MlflowClient(tracking_uri=uri)


def experiment(client: MlflowClient, name: str, location: str | None) -> str:
    """Return the experiment's id, created if need be; another process may create it meanwhile."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage != "active":
        raise TrackingUnavailable(
            f"the experiment {name} was deleted",
            remedy=f"Run mlflow experiments restore --experiment-id {found.experiment_id}",
            settings=("tracking.experiment=another-name",),
        )
    return str(found.experiment_id)


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn whatever MLflow, its database driver or HTTP client raise into one sentence.

    It has no credentials in it.
    """
    try:
        yield
    except TrackingUnavailable:
        raise
    except ImportError as error:
        raise TrackingUnavailable(
            f"{redact(uri)} needs a package that is not installed: {error}",
            remedy="Run pip install mlflow",
        ) from error
    except Exception as error:  # each kind of store raises its own
        said = str(error).strip().splitlines() or ["no message"]
        raise TrackingUnavailable(redact(f"{uri}: {type(error).__name__}: {said[0]}")) from None
