"""A first task: from a description and two schemas to answers that are checked, paid once and kept as examples.

A stand-in for the vendor answers here, so it needs no key and costs nothing. With your own key, write its `remote`
section into apprentice.yaml (docs/configuration.md) and leave out the vendor: nothing else changes.
"""

import tempfile
from pathlib import Path

import yaml

from apprentice import Apprentice
from apprentice.testing import FakeVendor

CONFIG = """
tasks:
  - name: triage
    description: Say which team a message is for, and whether it is urgent.
    input_schema: {text: str}
    output_schema: {team: billing | support, urgent: bool}
"""
MESSAGES = ["I was charged twice!", "How do I change my password?", "My invoice has the wrong address."]


def answer(value: dict[str, str]) -> dict[str, object]:
    """What the model behind the vendor's API would say."""
    text = value["text"]
    return {"team": "billing" if "charged" in text or "invoice" in text else "support", "urgent": "!" in text}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, FakeVendor("anthropic", answer) as vendor:
        config = Path(folder, "apprentice.yaml")
        config.write_text(CONFIG + yaml.safe_dump({"remote": vendor.settings()}))
        with Apprentice.from_config(config, environ=vendor.environ) as apprentice:
            for message in MESSAGES:
                print(apprentice.run("triage", {"text": message}).output)
            status = apprentice.status()["triage"]
            print(f"phase {status.phase}: {status.examples} examples, ${status.spent} spent")
