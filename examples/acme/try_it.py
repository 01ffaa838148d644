"""Once `pip install ./examples/acme` is done, its names are known: this asks `acme`, and says whose each name is."""

import json
import tempfile
from pathlib import Path

import httpx

from apprentice import Apprentice, load_settings
from apprentice.operate.check import findings

CONFIG = Path(__file__).parent / "apprentice.yaml"
KEYS = {"ACME_API_KEY": "acme-0123456789abcdef"}


def acme(request: httpx.Request) -> httpx.Response:
    """A stand-in for Acme's API."""
    assert request.url == "https://us.acme.example/v2/complete"
    assert request.headers["x-acme-key"] == KEYS["ACME_API_KEY"]
    return httpx.Response(
        200, json={"answer": json.dumps({"day": "2026-12-01"}), "tokens_read": 80, "tokens_written": 9}
    )


if __name__ == "__main__":
    for finding in findings(load_settings(CONFIG), KEYS):
        if "apprentice-acme" in finding.detail:
            print(f"{finding.part}: {finding.detail}")
    with tempfile.TemporaryDirectory() as folder, httpx.Client(transport=httpx.MockTransport(acme)) as client:
        here = Path(folder, "apprentice.yaml")
        here.write_text(CONFIG.read_text(encoding="utf-8"), encoding="utf-8")
        with Apprentice.from_config(here, http_client=client, environ=KEYS) as apprentice:
            print(apprentice.run("due_day", {"text": "Payable by the first of December."}).output)
