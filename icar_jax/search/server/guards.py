"""Request checks (host names, origins, token, body sizes), response headers, and the login form."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icar_jax.search.server.errors import RequestError
from icar_jax.search.server.settings import ServerSettings

COOKIE = "icar_session"
LOGIN = "/login"
OPEN_PATHS = frozenset({"/healthz", "/readyz", LOGIN, "/static/app.css", "/static/icon.svg"})  # served without the token
PAGES = frozenset({"/", LOGIN})
FORM_BYTES = 100_000  # limit of a body without an upload, and of the multipart overhead of an upload
_DRAIN_S = 2.0  # read on before closing, so that a client that is still sending gets the error response
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FAILURE_S = 0.5  # delay after a wrong token

_SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware around the whole server.

    Calls `refused(kind)` for each rejected request and `answered(route, method, status)` for every response.
    """

    api: Any  # the FastAPI application inside

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        refused: Callable[[str], None],
        answered: Callable[[str, str, str], None],
    ):
        self._app, self._settings, self._refused, self._answered = app, settings, refused, answered
        self._hosts = settings.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                # By route, not by path, so that requests for unknown paths do not create metrics.
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._answered(route, method, str(message["status"]))
            await send(message)

        try:
            answer = self._check(scope)
            limit = self._limit(scope)
            body = _Body(receive, limit)
            body.check_declared(Headers(scope=scope))
        except RequestError as error:
            self._refused(error.kind)
            await _drain(receive)
            answer = error.response()
        if answer is not None:
            await answer(scope, receive, with_headers)
            return
        await self._limited(scope, body, with_headers)

    def _check(self, scope: Scope) -> Response | None:
        """None for an allowed request, or a redirect to the login. Raises RequestError."""
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            raise RequestError(421, "host", f"this server answers to {', '.join(sorted(self._hosts))}, not to {host[:100]!r}")
        # Browsers send the origin of a request; other sites may link to the pages, but nothing else.
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
            if not (followed and scope["method"] == "GET" and path in PAGES):
                raise RequestError(403, "cross-site", "requests from other sites are not allowed")
        if self._settings.token is None or path in OPEN_PATHS or authorised(headers, self._settings.token):
            return None
        if path == "/" and scope["method"] in ("GET", "HEAD"):
            query = scope["query_string"].decode("latin-1")
            return RedirectResponse(LOGIN + (f"?{quote(query, safe='=&%+')}" if query else ""), 303)
        raise RequestError(
            401, "token", "this server requires a token: send `Authorization: Bearer TOKEN`, or open the page and sign in",
            {"WWW-Authenticate": "Bearer"},
        )  # fmt: skip

    def _limit(self, scope: Scope) -> int:
        return FORM_BYTES + (self._settings.max_upload_bytes if scope["path"] == "/api/search/image" else 0)

    async def _limited(self, scope: Scope, body: _Body, send: Send) -> None:
        """Sends the app's response, or 413 if the body exceeded the limit, which the app itself sees as a damaged body."""
        replaced = False

        async def unless_cut(message: Message) -> None:
            nonlocal replaced
            if body.cut and message["type"] == "http.response.start" and not replaced:
                replaced = True
                self._refused("upload-bytes")
                await _drain(body.receive_all)
                await _too_large(body.limit).response()(scope, body.receive_all, send)
            elif not replaced:
                await send(message)

        await self._app(scope, body.receive, unless_cut)


class _Body:
    """A request body that is cut off after `limit` bytes."""

    def __init__(self, receive: Receive, limit: int):
        self.receive_all, self.limit = receive, limit
        self.cut, self._seen = False, 0

    def check_declared(self, headers: Headers) -> None:
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self.limit:
            raise _too_large(self.limit)

    async def receive(self) -> Message:
        if self.cut:
            return {"type": "http.request", "body": b"", "more_body": False}
        message = await self.receive_all()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self.limit:
                self.cut = True
                return {"type": "http.request", "body": b"", "more_body": False}
        return message


def _too_large(limit: int) -> RequestError:
    return RequestError(413, "upload-bytes", f"the body exceeds the limit of {limit:,} bytes; send a smaller file")


async def _drain(receive: Receive) -> None:
    """Reads and discards the rest of a request for up to _DRAIN_S seconds."""
    try:
        async with asyncio.timeout(_DRAIN_S):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


def _name(host: str) -> str:
    """The host name of a Host header, without the port."""
    host = host.strip().lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and (not host.startswith("[") or name.endswith("]")) else host


def session(token: str) -> str:
    """The session cookie's value: an HMAC-SHA256 of the token, which does not reveal it."""
    return hmac.new(token.encode(), b"icar serve session", hashlib.sha256).hexdigest()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def authorised(headers: Headers, token: str) -> bool:
    """Whether a request has the token as a bearer token or as the session cookie; compared in constant time."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and _same(given.strip(), token):
        return True
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    return cookie is not None and _same(cookie.value, session(token))


class Login:
    """The login form, which sets a cookie in exchange for the token; `page` is its HTML with MARK for a message."""

    MARK = "<!--message-->"

    def __init__(self, page: str, token: str | None):
        self._page, self._token = page, token
        self._failures = asyncio.Lock()

    def form(self, message: str = "", status: int = 200) -> HTMLResponse:
        """The login page; `message` is inserted as HTML and must not come from a request."""
        said = f'<p class="wrong" role="alert">{message}</p>' if message else ""
        return HTMLResponse(self._page.replace(self.MARK, said), status)

    async def submit(self, body: bytes, query: str, secure: bool) -> Response:
        """Checks the token, sets the cookie and redirects to the page with the original query string."""
        if self._token is None:
            return RedirectResponse("/", 303)
        try:
            given = parse_qs(body.decode("utf-8", "replace"), max_num_fields=4).get("token", [""])[0].strip()
        except ValueError:  # more fields than the form has
            given = ""
        if not _same(given, self._token):
            async with self._failures:  # failed attempts of all clients are serialised
                await asyncio.sleep(_FAILURE_S)
            return self.form("Wrong token. Enter the one given to <code>icar serve</code> by --token or --token-file.", 401)
        answer = RedirectResponse("/" + (f"?{quote(query, safe='=&%+')}" if query else ""), 303)
        answer.set_cookie(COOKIE, session(self._token), httponly=True, samesite="strict", secure=secure, path="/")
        return answer
