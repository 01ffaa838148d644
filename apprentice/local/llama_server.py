"""llama.cpp's server in a process of its own; run as a script, by `llama_cpp`, with nothing of Apprentice imported.

In the application's process the wheel's server holds Python's lock while it reads a model, so that every request in
flight waits (0.8 s on an idle machine, 15 s beside sixteen callers), and a crash of its would be the application's.

Reads its settings from standard input, one line of JSON; answers with one line, its address or an error; and ends when
standard input does, which it also does when the application is killed.
"""

import json
import sys
from typing import Any


def _server(wanted: dict[str, Any]) -> Any:
    import xllamacpp  # type: ignore[import-untyped]

    params = xllamacpp.CommonParams()
    params.model.path = wanted["model"]
    params.n_parallel, params.n_ctx, params.kv_unified = wanted["slots"], wanted["context"], True
    params.warmup = False
    params.verbosity = -1
    # Threads that spin while they wait would take the processor from the version that serves during a swap.
    params.cpuparams.poll = params.cpuparams_batch.poll = 0
    params.api_keys = [wanted["key"]]
    if wanted["threads"] is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted["threads"]
    if wanted["lora"] is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = wanted["lora"], 1.0
        params.lora_adapters = [adapter]
    return xllamacpp.Server(params)


def main() -> None:
    """Serve until standard input ends."""
    wanted = json.loads(sys.stdin.readline())
    try:
        server = _server(wanted)
        told = {"address": server.listening_address}
    except Exception as error:  # noqa: BLE001  # whatever it is, the engine explains it
        told = {"error": str(error) or type(error).__name__}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
