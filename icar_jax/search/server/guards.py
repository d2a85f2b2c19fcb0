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
_FAILING = 16  # such attempts that may wait

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
        self._present = 0

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

        self._present += 1
        try:
            await self._answer(scope, receive, with_headers)
        finally:
            self._present -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._present > self._settings.requests:
                raise RequestError(503, "busy", "too many requests; try again in a moment", {"Retry-After": "1"})
            answer = self._check(scope)
            body = _Body(receive, self._limit(scope), self._settings.timeout_s)
            body.check_declared(Headers(scope=scope))
        except RequestError as error:
            self._refused(error.kind)
            await _drain(receive)
            answer = error.response()
        if answer is not None:
            await answer(scope, receive, send)
            return
        await self._limited(scope, body, send)

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
        """Sends the app's response, or why the body was cut off, which the app itself sees as a damaged body."""
        replaced = False

        async def unless_cut(message: Message) -> None:
            nonlocal replaced
            if body.cut is not None and message["type"] == "http.response.start" and not replaced:
                replaced = True
                self._refused(body.cut.kind)
                await _drain(body.receive_all)
                await body.cut.response()(scope, body.receive_all, send)
            elif not replaced:
                await send(message)

        await self._app(scope, body.receive, unless_cut)


class _Body:
    """A request body that is cut off after `limit` bytes or `seconds`; `cut` is the reason then."""

    def __init__(self, receive: Receive, limit: int, seconds: float):
        self.receive_all, self.limit, self._seconds = receive, limit, seconds
        self.cut: RequestError | None = None
        self._seen, self._ended = 0, False
        self._until = asyncio.get_running_loop().time() + seconds

    def check_declared(self, headers: Headers) -> None:
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self.limit:
            raise _too_large(self.limit)

    async def receive(self) -> Message:
        if self._ended:  # the app waits for a disconnection
            while (message := await self.receive_all())["type"] == "http.request":
                pass
            return message
        try:
            async with asyncio.timeout_at(self._until):
                message = await self.receive_all()
        except TimeoutError:
            return self._cut_off(RequestError(408, "upload-slow", f"the body did not arrive within {self._seconds:g} s"))
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
            if self._seen > self.limit:
                return self._cut_off(_too_large(self.limit))
        return message

    def _cut_off(self, reason: RequestError) -> Message:
        self.cut, self._ended = reason, True
        return {"type": "http.request", "body": b"", "more_body": False}


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
        self._failing = 0

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
            if self._failing >= _FAILING:
                return self.form("Too many attempts; try again in a moment.", 503)
            self._failing += 1
            try:
                async with self._failures:  # failed attempts of all clients are serialised
                    await asyncio.sleep(_FAILURE_S)
            finally:
                self._failing -= 1
            return self.form("Wrong token. Enter the one given to <code>icar serve</code> by --token or --token-file.", 401)
        answer = RedirectResponse("/" + (f"?{quote(query, safe='=&%+')}" if query else ""), 303)
        answer.set_cookie(COOKIE, session(self._token), httponly=True, samesite="strict", secure=secure, path="/")
        return answer
