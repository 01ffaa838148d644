"""A model behind a gateway of your own: any server that speaks OpenAI's protocol, reached by an httpx.Client of yours.

The gateway wants to know which team asks, and has its own price, which the caps need. The client's transport, proxies,
certificates, auth and hooks are used as they are, from several threads; it stays yours to close.
"""

import tempfile
from pathlib import Path

import httpx
import yaml

from apprentice import Apprentice
from apprentice.testing import FakeVendor

TASK = {
    "name": "language",
    "description": "Name the language of a text.",
    "input_schema": {"text": "str"},
    "output_schema": {"language": "english | german | french"},
}
PRICE = {"input": 0.10, "output": 0.40}  # USD per million tokens
GERMAN = {"language": "german"}  # what the stand-in for the gateway's model says


def introduce(request: httpx.Request) -> None:
    """Add what the gateway asks of every request."""
    request.headers["x-team"] = "checkout"
    print(request.method, request.url.path, request.headers["x-team"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, FakeVendor("openai_compatible", lambda _: GERMAN) as gateway:
        config = Path(folder, "apprentice.yaml")
        remote = gateway.settings(model="our-own-model", price=PRICE)
        config.write_text(yaml.safe_dump({"tasks": [TASK], "remote": remote, "budget": {"daily": 5.00}}))
        client = httpx.Client(event_hooks={"request": [introduce]})
        with client, Apprentice.from_config(config, http_client=client, environ=gateway.environ) as apprentice:
            print(apprentice.run("language", {"text": "Wo ist mein Paket?"}).output)
