"""The HTTP application. It translates: JSON to `run`, and the library's errors to status codes.

Every answer that is no output has one shape: `{"error": {"type", "message"}}`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from apprentice import (
    ApprenticeError,
    AsyncApprentice,
    BudgetExceeded,
    ClientClosed,
    InputError,
    OutputError,
    RemoteError,
    StoreError,
    Unavailable,
    UnknownTask,
    secrets,
)
from apprentice.schemas.json_values import InvalidValue, NotJson, read_json

__all__ = ["create_app"]

_log = secrets.logger("apprentice")
_TASKS = "/v1/tasks/"
# What stands for a value of a type in a request that is shown; for any other "...".
_PLACES: dict[str, Any] = {"integer": 0, "number": 0.5, "boolean": True, "array": [], "object": {}}


def create_app(open_client: Callable[[], AsyncApprentice]) -> FastAPI:
    """The application over the client that ``open_client`` makes, on the server's event loop, when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_client() as apprentice:
            app.state.apprentice = apprentice
            yield

    app = FastAPI(title="Apprentice", lifespan=lifespan, docs_url="/docs", redoc_url=None)

    @app.post("/v1/tasks/{name}")
    async def run(name: str, request: Request) -> JSONResponse:
        """Answer one input of a task. The body is the input; the answer is `{"id", "output"}`."""
        try:
            value = read_json(await request.body(), name="the body")
        except NotJson as error:
            return _error(400, "InputError", str(error))
        except InvalidValue as error:
            return _error(422, "InputError", str(error))
        if not isinstance(value, dict):
            return _error(422, "InputError", "the body must be a JSON object, the task's input")
        result = await request.app.state.apprentice.run(name, value)
        return JSONResponse({"id": result.id, "output": result.output})

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz(request: Request) -> dict[str, Any]:
        """Say that this process is up, where each task stands in it, and whether its store is away.

        For each task: its ``phase``, the ``champion`` that should answer locally and the one that is ``serving`` here.
        """
        health = await request.app.state.apprentice.health()
        return {"ok": True, **asdict(health)}

    @app.exception_handler(ApprenticeError)
    async def explain(request: Request, error: ApprenticeError) -> JSONResponse:
        return _error(*_translate(error))

    @app.exception_handler(HTTPException)
    async def explain_http(request: Request, error: HTTPException) -> JSONResponse:
        words = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 405 and request.url.path.startswith(_TASKS):
            words += _how_to_ask(request)
        return _error(error.status_code, "HTTPError", words, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def explain_bug(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed unforeseen", request.method, request.url.path, exc_info=error)
        return _error(500, type(error).__name__, "failed unforeseen; the server's log says how")

    return app


def _how_to_ask(request: Request) -> str:
    """The request to make instead, for a shell; its input has the fields of the task, if there is one of that name."""
    name = request.path_params["name"]
    fields: dict[str, Any] = {"FIELD": "VALUE"}
    for task in request.app.state.apprentice.parts.settings.tasks:
        if task.name == name:
            properties = task.input_schema.json_schema.get("properties", {})
            fields = {field: _place(properties[field]) for field in task.input_schema.fields}
    body = shlex.quote(json.dumps(fields, ensure_ascii=False))
    return f". Send the input as a JSON object: curl -X POST {shlex.quote(str(request.url))} -d {body}"


def _place(node: Any) -> Any:
    return _PLACES.get(str(node.get("type")), "...") if isinstance(node, dict) else "..."


def _translate(error: ApprenticeError) -> tuple[int, str, str, dict[str, str]]:
    headers: dict[str, str] = {}
    match error:
        case UnknownTask():
            status = 404
        case InputError():
            status = 422
        case BudgetExceeded():
            status = 429
        case Unavailable() | ClientClosed():
            status = 503
        case RemoteError() | OutputError():
            status = 502
        case _:
            status = 500
    if isinstance(error, Unavailable) and error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return status, type(error).__name__, _words(error), headers


def _words(error: ApprenticeError) -> str:
    """What a caller is told. Where the store lies is for the server's log."""
    if isinstance(error, StoreError) or (isinstance(error, Unavailable) and isinstance(error.remote, StoreError)):
        _log.warning("a caller was told that the store cannot be used: %s", error)
        return "the store cannot be used just now; the server's log says why"
    return str(error)


def _error(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)
