"""The explorer's address book: a page, what it loads, and an API of jobs.

    GET  /                       the page, with the overview inside
    GET  /static/...             its script and style
    POST /api/jobs               queue a job (`asking.Ask`); 429 if too many wait
    GET  /api/jobs/{id}          how it is
    GET  /api/jobs/{id}/events   the same as server-sent events until it ends, the last with the result
    DELETE /api/jobs/{id}        cancel it
    GET, PUT /api/labels         labels of heads
    POST /api/recipe             the edit desk's scales as a zip for `manyheads edit bake`

Nothing that the page sends names a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from manyheads.errors import ManyheadsError
from manyheads.explorer.asking import Ask, DeskScales, Labels
from manyheads.explorer.guarding import Guard
from manyheads.explorer.jobs import Full, Job, Jobs
from manyheads.explorer.labels import LabelFile
from manyheads.explorer.page import live_page
from manyheads.explorer.workbench import Workbench
from manyheads.version import __version__

STATIC = FilePath(__file__).with_name("static")
LOOK = 0.05  # seconds between looks at a job
JobId = Annotated[str, Path(max_length=40, pattern=r"^[A-Za-z0-9_-]+$")]
_REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is no JSON."},
    403: {"description": "Host, Origin or token are not this page's."},
    404: {"description": "No such job is known any more."},
    413: {"description": "The body is too large."},
    422: {"description": "The request is not understood; `detail` is one sentence."},
    429: {"description": "Too many jobs wait."},
}


class HowItIs(BaseModel):
    """A job as the page sees it. `place`: jobs before it; `done` of `total` of `step`; `result` and `sentence` at its end."""

    id: str
    kind: str
    state: str
    place: int
    step: str
    done: int
    total: int | None
    result: Any = None
    sentence: str = ""


def make_app(bench: Workbench, overview: dict[str, Any], labels: LabelFile, *, token: str, hosts: Sequence[str]) -> Any:
    """The guarded ASGI application. `overview` is what the page shows at once (see `page.py`)."""
    jobs = Jobs()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        jobs.close()

    app = FastAPI(
        title="manyheads explorer",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=_REFUSED,
    )
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _sentence(error)}, 422)

    @app.exception_handler(ManyheadsError)
    async def refused(_: Request, error: ManyheadsError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 429 if isinstance(error, Full) else 422)

    @app.get("/", response_class=HTMLResponse)
    def page() -> HTMLResponse:
        return HTMLResponse(live_page(overview))

    @app.post("/api/jobs", status_code=202)
    def ask(asked: Annotated[Ask, Body()]) -> HowItIs:
        return _how(jobs, jobs.add(asked.kind, lambda bar: bench.answer(asked, bar)))

    @app.get("/api/jobs/{name}")
    def look(name: JobId) -> HowItIs:
        return _how(jobs, _known(jobs, name))

    @app.delete("/api/jobs/{name}")
    def cancel(name: JobId) -> HowItIs:
        job = _known(jobs, name)
        jobs.cancel(job)
        return _how(jobs, job)

    @app.get("/api/jobs/{name}/events", response_class=StreamingResponse)
    async def events(name: JobId) -> StreamingResponse:
        return StreamingResponse(_events(jobs, _known(jobs, name)), media_type="text/event-stream")

    @app.get("/api/labels")
    def read_labels() -> dict[str, Any]:
        return labels.json()

    @app.put("/api/labels")
    def write_labels(given: Labels) -> dict[str, Any]:
        labels.put(given)
        return labels.json()

    @app.post("/api/recipe", response_class=Response)
    def recipe(asked: DeskScales) -> Response:
        bench.model.head_set([one.head for one in asked.scales])
        headers = {"content-disposition": 'attachment; filename="edit.zip"'}
        return Response(bench.recipe(asked), media_type="application/zip", headers=headers)

    return Guard(app, tuple(hosts), token)


def _known(jobs: Jobs, name: str) -> Job:
    job = jobs.get(name)
    if job is None:
        raise HTTPException(404, "no such job is known any more; ask again.")
    return job


def _how(jobs: Jobs, job: Job) -> HowItIs:
    state = job.state
    return HowItIs(
        id=job.id,
        kind=job.kind,
        state=state,
        place=jobs.place(job),
        step=job.step,
        done=job.done,
        total=job.total,
        result=job.result if state == "done" else None,
        sentence=job.sentence,
    )


async def _events(jobs: Jobs, job: Job) -> AsyncIterator[str]:
    said = ""
    while True:
        ended = job.ended  # before it is looked at, so that the last event has the result
        now = _how(jobs, job).model_dump_json()
        if now != said:
            said = now
            yield f"data: {now}\n\n"
        if ended:
            return
        await asyncio.sleep(LOOK)


def _sentence(error: RequestValidationError) -> str:
    """The first thing that is wrong with a request, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    shown = json.dumps(first.get("input"), default=str, ensure_ascii=True)[:60]
    return f"{where or 'the request'}: {first['msg'][:200]} (got {shown})."
