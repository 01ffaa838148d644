"""Everything MLflow: runs, datasets, adapters, registered models, aliases.

MLflow is where an ML engineer reads what was trained on what and how it fared, and where a version is promoted or
rolled back by hand. Nothing on the path of a request depends on it. Every write here can be repeated: runs are found
again by the store's run id, versions by the adapter's content hash, so a flow that was killed half-way leaves no
second of anything.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from apprentice import secrets
from apprentice.errors import MissingExtra, TrainingError
from apprentice.settings.config import Settings

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag, ViewType
    from mlflow.exceptions import MlflowException
except ImportError:  # a folder of this checkout is called mlflow too, so a missing library is no ModuleNotFoundError
    raise MissingExtra("tracking training runs", "flows") from None

__all__ = ["CANDIDATE", "CHAMPION", "TrackedRun", "Tracking", "model_name"]

CANDIDATE, CHAMPION = "candidate", "champion"
_RUN_TAG, _VERSION_TAG, _AGREED_TAG = "apprentice.run", "apprentice.version", "apprentice.champion"
_log = secrets.logger(__name__)


def model_name(task: str) -> str:
    """The registered model of a task."""
    return f"apprentice.{task}"


class Tracking:
    """The tracking server and model registry that the configuration names.

    What people delete there must not stop training: it is restored, or made anew under another name, and ``told`` hears
    of it: the task, and what was found and done.
    """

    def __init__(self, settings: Settings, told: Callable[[str, dict[str, Any]], None] = lambda *_: None) -> None:
        # A server that is down is waited for by whoever asked (`flows.coach`), not for minutes inside every call.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
        self._told = told
        self._artifacts = None if settings.tracking.uri else settings.tracking_artifacts

    def run(self, task: str, run_id: str, *, name: str) -> TrackedRun:
        """The MLflow run of a training run, created when it is first asked for, and running."""
        experiment = self._experiment(task)
        found = self._client.search_runs(
            [experiment], filter_string=f"tags.`{_RUN_TAG}` = '{run_id}'", run_view_type=ViewType.ALL, max_results=1
        )
        if found:
            info = found[0].info
            self._restored(task, info)
            if info.status != "RUNNING":
                self._client.update_run(info.run_id, status="RUNNING")
            return TrackedRun(self._client, info.run_id)
        tags = {_RUN_TAG: run_id, "apprentice.task": task, "mlflow.runName": name}
        return TrackedRun(self._client, self._client.create_run(experiment, tags=tags).info.run_id)

    def register(self, task: str, version: str, run: TrackedRun, *, tags: Mapping[str, str], description: str) -> str:
        """Register an adapter as a new version of the task's model, with the alias `candidate`; its MLflow number.

        An adapter that is registered already keeps its number.
        """
        number = self.number_of(task, version)
        if number is None:
            with contextlib.suppress(MlflowException):  # it exists
                self._client.create_registered_model(
                    model_name(task), description=f"The local model of the task {task}, trained by Apprentice."
                )
            made = self._client.create_model_version(
                model_name(task),
                source=f"runs:/{run.id}/adapter",
                run_id=run.id,
                tags={_VERSION_TAG: version, **tags},
                description=description,
            )
            number = str(made.version)
        self.set_alias(task, CANDIDATE, number)
        return number

    def number_of(self, task: str, version: str) -> str | None:
        """MLflow's number of a version, None where it is not registered."""
        found = self._version(task, version)
        return str(found.version) if found else None

    def describe(self, task: str, version: str, *, description: str, tags: Mapping[str, str]) -> None:
        """Replace a version's description, and set tags on it; nothing where the registry has it no longer."""
        number = self.number_of(task, version)
        if number is None:
            return
        self._client.update_model_version(model_name(task), number, description=description)
        for key, value in tags.items():
            self._client.set_model_version_tag(model_name(task), number, key, value)

    def show_status(self, task: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags on a version where they differ, and let its description begin with what it is now."""
        found = self._version(task, version)
        if found is None or all(found.tags.get(key) == value for key, value in tags.items()):
            return
        for key, value in tags.items():
            self._client.set_model_version_tag(model_name(task), found.version, key, value)
        said = f"**{tags['apprentice.status'].replace('_', ' ')}**: "
        said += tags.get("apprentice.promoted_by") or tags["apprentice.reason"]
        text = found.description or ""
        if text.startswith("**") and "\n\n" in text:
            text = text.split("\n\n", 1)[1]
        self._client.update_model_version(model_name(task), found.version, description=f"{said}\n\n{text}")

    def set_alias(self, task: str, alias: str, number: str) -> None:
        """Point an alias at a version."""
        self._client.set_registered_model_alias(model_name(task), alias, number)

    def drop_alias(self, task: str, alias: str) -> None:
        """Take an alias away; nothing happens where it is not set."""
        with contextlib.suppress(MlflowException):
            self._client.delete_registered_model_alias(model_name(task), alias)

    def aliased(self, task: str, alias: str) -> str | None:
        """The name (content hash) of the version that an alias points at; None where it points nowhere.

        One that somebody registered by hand has no name of ours, and is called by its number: "number 3 in MLflow".
        """
        try:
            found = self._client.get_model_version_by_alias(model_name(task), alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return found.tags.get(_VERSION_TAG) or f"number {found.version} in MLflow"

    def agree(self, task: str, version: str) -> None:
        """Remember that the alias `champion` and the store name the same version."""
        self._client.set_registered_model_tag(model_name(task), _AGREED_TAG, version)

    def agreed(self, task: str) -> str | None:
        """The version that store and registry last agreed on as champion; None where nothing is registered."""
        try:
            found = self._client.get_registered_model(model_name(task)).tags.get(_AGREED_TAG)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return str(found) if found else None

    def moved(self, task: str) -> str | None:
        """The version to which a person has moved the alias `champion` since store and registry agreed, or None."""
        alias = self.aliased(task, CHAMPION)
        return alias if alias is not None and alias != self.agreed(task) else None

    def run_of_version(self, task: str, version: str) -> TrackedRun | None:
        """The run that trained a version; None where the registry has one of them no longer."""
        found = self._version(task, version)
        if found is None or not found.run_id:
            return None
        try:
            info = self._client.get_run(found.run_id).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        self._restored(task, info)
        return TrackedRun(self._client, found.run_id)

    def _version(self, task: str, version: str) -> Any:
        found = self._client.search_model_versions(
            f"name = '{model_name(task)}' and tags.`{_VERSION_TAG}` = '{version}'"
        )
        return found[0] if found else None

    def _restored(self, task: str, info: Any) -> None:
        """Take a run that was deleted out of the bin."""
        if info.lifecycle_stage == "deleted":
            self._experiment(task)  # in the bin too, it would take no run
            if self._client.get_run(info.run_id).info.lifecycle_stage == "deleted":
                self._client.restore_run(info.run_id)
                self._told(task, {"deleted": f"run {info.run_id}", "done": "restored"})

    def _experiment(self, task: str) -> str:
        """The task's experiment, created when it is first asked for.

        One that was deleted keeps its name until it is purged: it is restored, else the next name is taken.
        """
        for number in itertools.count(1):
            name = model_name(task) if number == 1 else f"{model_name(task)}.{number}"
            found = self._client.get_experiment_by_name(name)
            if found is None:
                location = f"{self._artifacts}/{task}" if self._artifacts else None
                with contextlib.suppress(MlflowException):  # somebody was quicker
                    self._client.create_experiment(name, artifact_location=location)
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise TrainingError(f"MLflow lets nobody create the experiment {name!r}; see the server's log")
            if found.lifecycle_stage == "active":
                return str(found.experiment_id)
            try:
                self._client.restore_experiment(found.experiment_id)
            except MlflowException as error:
                self._told(task, {"deleted": f"experiment {name}", "done": f"left alone, another is used: {error}"})
                continue
            self._told(task, {"deleted": f"experiment {name}", "done": "restored"})
            return str(found.experiment_id)
        raise AssertionError("itertools.count ended")


class TrackedRun:
    """One MLflow run."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self.id = run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters. MLflow keeps the first value of each, which a resumed run repeats."""
        known = self._client.get_run(self.id).data.params
        new = [Param(key, str(value)[:6000]) for key, value in values.items() if key not in known]
        if new:
            self._client.log_batch(self.id, params=new)

    def metrics(self, values: Mapping[str, float | None], *, at_s: float, step: int = 0) -> None:
        """Record figures at a moment (Unix seconds) and step; a figure that is None is left out."""
        rows = [Metric(key, float(v), int(at_s * 1000), step) for key, v in values.items() if v is not None]
        if rows:
            self._client.log_batch(self.id, metrics=rows)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._client.log_batch(self.id, tags=[RunTag(key, value) for key, value in values.items()])

    def dataset(self, *, name: str, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
        """Record what was trained on (``context`` "training") or judged by ("evaluation")."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=name,
            digest=digest[:36],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps(profile),
        )
        self._client.log_inputs(self.id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def folder(self, folder: Path, to: str) -> None:
        """Keep a folder's files with the run."""
        self._client.log_artifacts(self.id, str(folder), to)

    def text(self, content: str, name: str) -> None:
        """Keep a text with the run."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_text(content, encoding="utf-8")
            parent = str(Path(name).parent)
            self._client.log_artifact(self.id, str(path), None if parent == "." else parent)

    @contextlib.contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Record processor, memory, disk, network and GPU every ten seconds, from where an earlier attempt stopped.

        Training does not depend on it: where the server is down MLflow warns and leaves a gap.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # it announces every start and stop
        uri = self._client.tracking_uri
        # MLflow left it untyped.
        monitor = SystemMetricsMonitor(self.id, resume_logging=True, tracking_uri=uri)  # type: ignore[no-untyped-call]
        monitor.start()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            monitor.finish()  # type: ignore[no-untyped-call]

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.id, status)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep MLflow's and Alembic's migration chatter off the terminal while a new database is set up."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
