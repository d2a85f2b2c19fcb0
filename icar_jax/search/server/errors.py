"""Errors of a request: an HTTP status and a message for the user."""

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
    """The server cannot be started with these settings."""


class RequestError(Exception):
    """A request rejected with `status` and {"detail": reason}; `kind` is its label in the metrics."""

    def __init__(self, status: int, kind: str, reason: str, headers: Mapping[str, str] | None = None):
        super().__init__(reason)
        self.status, self.kind, self.reason, self.headers = status, kind, reason, dict(headers or {})

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse({"detail": self.reason}, self.status, self.headers)


def timed_out(seconds: float) -> RequestError:
    """A 504 error for work that took longer than `seconds`."""
    return RequestError(504, "timeout", f"no answer within {seconds:.3g} s; try again when the server is less busy")


def store_unreadable(error: StoreError) -> RequestError:
    """A 503 error; the path of the store and the reason go only to the log."""
    logging.error("%s", error)
    return RequestError(503, "store", "the store cannot be read; see the server's log", {"Retry-After": "5"})


def add_handlers(app: FastAPI, count_refusal) -> None:
    """Turns every error of `app` into {"detail": "one line"}; calls `count_refusal(kind)` for each rejected request."""

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
    # The first part of the location is 'query', 'path' or 'body'.
    place = ".".join(str(part) for part in error["loc"][1:]) or str(error["loc"][0])
    return f"{place}: {error['msg']}"
