"""Failures of a request: a status, and a reason that a person can act upon."""

from __future__ import annotations

from collections.abc import Mapping

from absl import logging
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from icar_jax.errors import IcarError
from icar_jax.search.access import StoreError


class ServerError(IcarError, ValueError):
    """A server that must not or cannot be started as asked."""


class RequestError(Exception):
    """A request that is answered with `status` and {"detail": reason}; `kind` counts it in the metrics."""

    def __init__(self, status: int, kind: str, reason: str, headers: Mapping[str, str] | None = None):
        super().__init__(reason)
        self.status, self.kind, self.reason, self.headers = status, kind, reason, dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse({"detail": self.reason}, self.status, self.headers)


def store_unreadable(error: StoreError) -> RequestError:
    """503; where the store lies, and what is wrong with it, is for the log alone."""
    logging.error("%s", error)
    return RequestError(503, "store", "the store cannot be read; the server's log says why", {"Retry-After": "5"})


def add_handlers(app: FastAPI, count_refusal) -> None:
    """Every failure of `app` becomes {"detail": "one line"}; `count_refusal(kind)` is told of each that was refused."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        count_refusal(error.kind)
        return error.response()

    @app.exception_handler(StoreError)
    async def store(request: Request, error: StoreError) -> JSONResponse:
        count_refusal("store")
        return store_unreadable(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        count_refusal("invalid")
        return JSONResponse({"detail": "; ".join(_line(each) for each in error.errors())}, 422)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"detail": str(error.detail)}, error.status_code, error.headers)


def _line(error: Mapping) -> str:
    # The first part of the place is 'query', 'path' or 'body'.
    place = ".".join(str(part) for part in error["loc"][1:]) or str(error["loc"][0])
    return f"{place}: {error['msg']}"
