"""Server settings, authorisation, and filters that clients may set."""

import pytest
from starlette.datastructures import Headers

from icar_jax.search.server import pages
from icar_jax.search.server.errors import ServerError
from icar_jax.search.server.guards import COOKIE, _name, authorised, session
from icar_jax.search.server.run import bind
from icar_jax.search.server.schemas import Filters
from icar_jax.search.server.settings import ServerSettings, address, is_loopback, read_token

TOKEN = "a-token-of-some-length"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "pictures.example.org"])
def test_other_machines_need_a_token(host):
    with pytest.raises(ServerError, match="--token-file"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, token=TOKEN).hosts is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert is_loopback(host)
    assert {"localhost", "127.0.0.1", "[::1]"} <= ServerSettings(host=host).hosts


@pytest.mark.parametrize("token", ["short", "with a space in the middle", "ünïcödé-ünïcödé-ünïcödé", "new\nline-new-line-new"])
def test_tokens_that_can_be_guessed_or_not_sent(token, tmp_path):
    with pytest.raises(ServerError, match="secrets.token_urlsafe"):
        ServerSettings(token=token)
    (tmp_path / "token").write_text(token, encoding="utf-8")
    with pytest.raises(ServerError, match="--token-file"):
        read_token(tmp_path / "token")


def test_a_token_file(tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert read_token(tmp_path / "token") == TOKEN
    with pytest.raises(OSError):
        read_token(tmp_path / "none")


@pytest.mark.parametrize("options, match", [
    ({"allowed_hosts": ("a.example",)}, "--allowed-host makes .* add --token-file"),
    ({"allowed_hosts": ("http://a.example",), "token": TOKEN}, "without scheme and port"),
    ({"port": 70000}, "0 and 65535"),
    ({"queue": 0}, "queue must be positive"),
])  # fmt: skip
def test_settings_that_cannot_be(options, match):
    with pytest.raises(ServerError, match=match):
        ServerSettings(**options)


def test_a_port_that_is_taken():
    taken = bind(ServerSettings(port=0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ServerError, match=f"port {port}: .*choose another"):
        bind(ServerSettings(port=port))
    taken.close()
    assert address("::1", 80) == "http://[::1]:80/"


@pytest.mark.parametrize("header, name", [
    ("localhost", "localhost"), ("LOCALHOST:8000", "localhost"), ("[::1]:8000", "[::1]"), ("[::1]", "[::1]"), ("", ""),
    ("evil.example:80", "evil.example"), ("localhost:80.evil.example", "localhost:80.evil.example"), ("::1", ":"),
])  # fmt: skip
def test_the_name_in_a_host_header(header, name):
    assert _name(header) == name


@pytest.mark.parametrize("headers, good", [
    ({"authorization": f"Bearer {TOKEN}"}, True),
    ({"authorization": f"bearer  {TOKEN} "}, True),
    ({"authorization": f"Basic {TOKEN}"}, False),
    ({"authorization": f"Bearer {TOKEN}x"}, False),
    ({"authorization": "Bearer ü"}, False),
    ({"authorization": "Bearer"}, False),
    ({"cookie": f"{COOKIE}={session(TOKEN)}"}, True),
    ({"cookie": f"other=1; {COOKIE}={session(TOKEN)}"}, True),
    ({"cookie": f"{COOKIE}={TOKEN}"}, False),
    ({"cookie": f"{COOKIE}={session(TOKEN + 'x')}"}, False),
    ({"cookie": "\x00=;;==,"}, False),
    ({}, False),
])  # fmt: skip
def test_who_is_let_in(headers, good):
    raw = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
    assert authorised(Headers(raw=raw), TOKEN) is good


def test_filters_are_numbers_and_nothing_else():
    found = Filters(min_complexity=0.25, max_complexity=1e-7, exits=[4, 2, 4]).where()
    assert found == "complexity >= 0.25 AND complexity <= 1e-07 AND exit IN (2, 4)"
    assert Filters().where() is None


def test_the_page_asks_for_nothing_from_elsewhere():
    for name, page in pages.load_pages().items():
        text = page.content.decode("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, name
        assert "innerHTML" not in text and " style=" not in text and "onclick" not in text, name
