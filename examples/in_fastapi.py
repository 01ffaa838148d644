"""Apprentice inside an application of your own, beside apprentice.yaml:

    ANTHROPIC_API_KEY=... uvicorn --app-dir examples in_fastapi:app
    curl -s localhost:8000/tickets -H 'content-type: application/json' -d '{"text": "I was charged twice."}'

One client for the whole application: it never blocks the event loop, and what is paid for is recorded when it closes.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request

from apprentice import AsyncApprentice, InputError, Unavailable


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the client on the server's event loop, and close it when the server ends."""
    async with AsyncApprentice.from_config("apprentice.yaml") as app.state.apprentice:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/tickets")
async def file_ticket(ticket: dict[str, str], request: Request) -> dict[str, object]:
    """File a ticket where it belongs; `Unavailable` covers a used-up budget as well."""
    try:
        found = await request.app.state.apprentice.run("classify_ticket", ticket)
    except InputError as error:
        raise HTTPException(422, str(error)) from error
    except Unavailable as error:
        raise HTTPException(503, "nobody can classify this now; try again later") from error
    return {**ticket, **found.output}
