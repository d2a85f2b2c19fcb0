"""The HTTP application: web page, JSON API, health checks and metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated

import anyio
from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.responses import RedirectResponse

from icar_jax.search.server import pages, schemas
from icar_jax.search.server.backend import Backend, ImageQuery, TextQuery
from icar_jax.search.server.errors import RequestError, add_handlers
from icar_jax.search.server.guards import LOGIN, Guard, Login
from icar_jax.search.server.metrics import Metrics
from icar_jax.search.server.pictures import ID, SIDES, FileStream, Pictures, open_picture
from icar_jax.search.server.settings import ServerSettings
from icar_jax.search.server.threads import Threads
from icar_jax.search.server.uploads import OPENAPI, read_upload

_CACHE_S = 86_400  # browsers cache images for a day; the URL contains the hash of the content
_WAITING_PER_THREAD = 32
_UPLOAD_THREADS = 2

ImageId = Annotated[str, Path(pattern=f"^{ID}$", description="SHA-256 of the image's file.")]


def _filters(
    k: schemas.Count = 24,
    min_complexity: schemas.Share | None = None,
    max_complexity: schemas.Share | None = None,
    exit: Annotated[list[schemas.Exit], Query(max_length=64, description="Only these exits; may be repeated.")] = [],
    exact: bool = False,
) -> schemas.Filters:
    return schemas.Filters(k=k, min_complexity=min_complexity, max_complexity=max_complexity, exits=exit, exact=exact)


Filters = Annotated[schemas.Filters, Depends(_filters)]


def _problems(*statuses: int) -> dict:
    return {status: {"model": schemas.Problem} for status in (*statuses, 401, 403, 421)}


def create_app(backend: Backend, settings: ServerSettings, metrics: Metrics | None = None) -> Guard:
    """The ASGI application over a store; its lifespan starts and stops the backend. `guard.api` is the inner FastAPI app."""
    metrics = metrics or backend.metrics
    pictures = Pictures(
        backend.paths_of, settings.max_pixels, settings.preview_cache_bytes, settings.follow_links, backend.roots
    )
    previews = Threads("previews", settings.preview_threads, _WAITING_PER_THREAD * settings.preview_threads)
    uploads = Threads("uploads", _UPLOAD_THREADS, settings.queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(backend.stop)
            previews.stop()
            uploads.stop()

    # FastAPI's documentation pages are off, since they load scripts from another host.
    api = FastAPI(
        title="icar search", version="1", description="Search a store of images by text or by image.",
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
    )  # fmt: skip
    add_handlers(api, lambda kind: metrics.refused.labels(kind).inc())
    _add_pages(api, settings)
    metrics.gauge("icar_previews_cached_share", "Fraction of previews served from the cache", lambda: _share(pictures))

    async def answer(kind: str, query: TextQuery | ImageQuery, start: float, decode_s: float = 0.0) -> schemas.Answer:
        found, queue_s = await backend.worker.run(kind, query, settings.timeout_s - decode_s)
        pictures.remember((hit.sha256, hit.path) for hit in found.hits)
        parts = {"queue": queue_s, "decode": decode_s, **found.latency_s, "total": time.perf_counter() - start}
        metrics.observe_search(kind, parts)
        return backend.answer(found, parts)

    failures = _problems(400, 422, 503, 504)

    @api.get("/api/search", responses=failures, tags=["search"])
    async def search(
        q: Annotated[schemas.Query, Query(description="Text to search for.")],
        filters: Filters,
    ) -> schemas.Answer:
        """Searches by text."""
        return await answer("text", TextQuery(q, filters.k, filters.where(), filters.exact), time.perf_counter())

    @api.post("/api/search", responses=failures, tags=["search"])
    async def search_by_json(body: schemas.TextSearch) -> schemas.Answer:
        """Searches by text; keeps the query out of the URL, which proxies and browsers log."""
        return await answer("text", TextQuery(body.query, body.k, body.where(), body.exact), time.perf_counter())

    @api.post("/api/search/image", responses=_problems(400, 408, 413, 422, 503, 504), openapi_extra=OPENAPI, tags=["search"])
    async def search_by_image(
        request: Request,
        filters: Filters,
    ) -> schemas.Answer:
        """Searches by image; the upload is not stored."""
        start = time.perf_counter()
        data = await read_upload(request, settings.max_upload_bytes, settings.timeout_s)
        decoding = time.perf_counter()
        work = partial(open_picture, data, "image", settings.max_pixels, backend.image_side)
        picture = await uploads.run(work, settings.timeout_s, "images are being decoded")
        decode_s = time.perf_counter() - decoding
        return await answer("image", ImageQuery(picture, filters.k, filters.where(), filters.exact), start, decode_s)

    async def picture(work):
        return await previews.run(work, settings.timeout_s, "images are being read")

    @api.get(
        "/api/images/{id}/thumbnail", tags=["images"], response_class=Response,
        responses=_problems(404, 422, 503) | {200: {"content": {"image/jpeg": {}}}, 304: {"description": "As it was."}},
    )  # fmt: skip
    async def thumbnail(
        request: Request,
        id: ImageId,
        size: Annotated[int, Query(description=f"Longest side in pixels: one of {SIDES}.")] = SIDES[0],
    ) -> Response:
        """A JPEG preview of the image, with orientation applied and without metadata."""
        if size not in SIDES:
            raise RequestError(422, "invalid", f"size: one of {', '.join(map(str, SIDES))} pixels, found {size}")
        headers = _cached(f"{id}-{size}")
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        start = time.perf_counter()
        made = await picture(partial(pictures.preview, id, size))
        metrics.preview.observe(time.perf_counter() - start)
        return Response(made, media_type="image/jpeg", headers=headers)

    @api.get(
        "/api/images/{id}", tags=["images"], response_class=Response,
        responses=_problems(404, 422, 503) | {200: {"content": {"image/*": {}}}, 304: {"description": "As it was."}},
    )  # fmt: skip
    async def image(request: Request, id: ImageId) -> Response:
        """The original file, byte for byte as indexed."""
        headers = _cached(id) | {"Content-Security-Policy": "default-src 'none'; sandbox"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return await picture(lambda: FileStream(pictures.original(id), headers, settings.stall_timeout_s))

    @api.get("/api/store", responses=_problems(503), tags=["store"])
    async def store() -> schemas.StoreInfo:
        """Information about the store, and the limits of this server."""
        limits = schemas.Limits(k=schemas.MAX_K, upload_bytes=settings.max_upload_bytes, pixels=settings.max_pixels)
        return await anyio.to_thread.run_sync(backend.info, limits)

    @api.head("/healthz", include_in_schema=False)
    @api.get("/healthz", tags=["health"])
    async def healthz() -> schemas.Status:
        """Liveness: the process responds."""
        return schemas.Status(status="ok")

    @api.head("/readyz", include_in_schema=False)
    @api.get("/readyz", responses={503: {"model": schemas.Problem}}, tags=["health"])
    async def readyz() -> schemas.Status:
        """Readiness: the model is loaded and the store can be read."""
        await anyio.to_thread.run_sync(backend.require_ready)
        return schemas.Status(status="ready")

    @api.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "internal server error; see the server's log"}, 500)

    guard = Guard(
        api, settings, lambda kind: metrics.refused.labels(kind).inc(), lambda *labels: metrics.requests.labels(*labels).inc()
    )
    guard.api = api
    return guard


def _cached(tag: str) -> dict[str, str]:
    return {"ETag": f'"{tag}"', "Cache-Control": f"private, max-age={_CACHE_S}, immutable"}


def _share(pictures: Pictures) -> float:
    return pictures.hits / max(1, pictures.hits + pictures.misses)


def _add_pages(api: FastAPI, settings: ServerSettings) -> None:
    """Adds routes for the page and its files; they are a fixed list in memory, so no URL can reach other files."""
    for name, page in pages.load_pages().items():
        headers = {"ETag": f'"{page.sha256}"', "Cache-Control": "no-cache"}

        async def static(request: Request, page=page, headers=headers) -> Response:
            if request.headers.get("if-none-match") == headers["ETag"]:
                return Response(status_code=304, headers=headers)
            return Response(page.content, media_type=page.media_type, headers=headers)

        path = "/" if name == "index.html" else f"/static/{name}"
        api.add_api_route(path, static, methods=["GET", "HEAD"], include_in_schema=False)
    login = Login(pages.read_page("login.html").content.decode("utf-8"), settings.token)

    @api.get(LOGIN, include_in_schema=False)
    async def form() -> Response:
        return login.form() if settings.token is not None else RedirectResponse("/", 303)

    @api.post(LOGIN, include_in_schema=False)
    async def sign_in(request: Request) -> Response:
        return await login.submit(await request.body(), request.url.query, request.url.scheme == "https")
