"""`apprentice serve`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from apprentice import AsyncApprentice
from apprentice.assembly import check_remote
from apprentice.cli import config_option
from apprentice.settings.config import load_settings

__all__ = ["serve"]


@click.command()
@config_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
def serve(config: Path, host: str, port: int) -> None:
    """Answer requests over HTTP: POST /v1/tasks/NAME, GET /healthz."""
    import uvicorn

    from serving.app import create_app

    # Mistakes in the file or a missing key are worth knowing before the server listens, and read better here.
    settings = load_settings(config)
    check_remote(settings, os.environ)
    uvicorn.run(create_app(lambda: AsyncApprentice.from_config(settings)), host=host, port=port, log_level="info")
