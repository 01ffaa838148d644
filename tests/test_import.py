"""`import apprentice` stays light: a production app imports it."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "peft", "prefect", "mlflow", "fastapi", "uvicorn", "numpy", "matplotlib")


def test_importing_apprentice_imports_nothing_heavy() -> None:
    """Every public name is there, and none of the heavy modules."""
    code = (
        "import sys, apprentice\n"
        "for name in apprentice.__all__: getattr(apprentice, name)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
