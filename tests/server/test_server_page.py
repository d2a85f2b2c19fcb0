"""The page in a real browser: keyboard, phone width, dark mode, damaged files, and no server."""

import io
import struct
import zlib

import httpx
import pytest
from PIL import Image

import icar_jax
from icar_jax.search.server.settings import ServerSettings
from tests.support import chromium, serverkit

pytestmark = [pytest.mark.check, pytest.mark.skipif(chromium.PATH is None, reason="no Chromium is installed")]

SHOWN = "document.querySelectorAll('.card img').length > 0 && !document.querySelector('[aria-busy]')"
FOCUS = "document.activeElement.dataset.index ?? document.activeElement.id"
# Contrast of all visible text against its background, WCAG 2: 4.5 for text, 3 for large text.
CONTRAST = """(() => {
  const parse = (c) => { const p = c.match(/[\\d.]+/g).map(Number); return {rgb: p.slice(0, 3), a: p[3] ?? 1}; };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => { for (; node; node = node.parentElement) {
    const c = parse(getComputedStyle(node).backgroundColor); if (c.a > 0.75) return c.rgb; } return [255, 255, 255]; };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node);
    const hidden = !node.checkVisibility() || node.closest('.unseen, .skip, script, fieldset:disabled');
    if (!walker.currentNode.textContent.trim() || hidden) continue;
    const [a, b] = [light(parse(style.color).rgb), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) poor.push([walker.currentNode.textContent, ratio]);
  }
  return poor;
})()"""


@pytest.fixture(scope="module")
def made(clip_folder, complexity_folder, tmp_path_factory):
    """(files, server address)."""
    folder = tmp_path_factory.mktemp("page")
    model = icar_jax.load(serverkit.make_bundle(clip_folder, complexity_folder, folder / "bundle"), batch_size=8)
    files = serverkit.draw(folder / "pictures", 30)
    evil = "<img src=x onerror=alert(1)> & a long caption that needs more than a line of its card\nand a second caption"
    serverkit.fill(folder / "store", model, files, {str(file): evil for file in files[:9]})
    backend = serverkit.backend(folder / "store", model)
    with serverkit.running(backend, ServerSettings(port=0, max_pixels=10_000_000, preview_cache_bytes=0)) as address:
        yield files, address


@pytest.fixture(scope="module")
def browser():
    with chromium.Browser() as browser:
        yield browser


def shown(page):
    return page.eval("[...document.querySelectorAll('.card')].map((e) => e.innerText)")


@pytest.mark.parametrize("width, height", [(390, 844), (1280, 900)])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_scrolling_sideways_no_poor_contrast(made, browser, width, height, dark):
    page = browser.page(made[1], width, height, dark)
    page.wait("!document.getElementById('start').hidden")
    papers = [page.eval("getComputedStyle(document.body).backgroundColor")]
    for query in ("", "?q=a+red+circle&k=12&min=0.1"):
        page.go(made[1] + "/" + query)
        page.wait(SHOWN if query else "!document.getElementById('depths').hidden")
        assert page.eval("document.documentElement.scrollWidth") <= width
        assert page.eval(CONTRAST) == []
    page.eval("document.querySelector('.card').click()")
    page.wait("document.getElementById('viewer-picture').naturalWidth > 0")
    assert page.eval("document.documentElement.scrollWidth") <= width and page.eval(CONTRAST) == []
    assert ("rgb(16, 21, 29)" in papers) is dark
    assert page.problems() == []
    assert all(address.startswith((made[1], "data:", "blob:", "about:")) for address in page.requested())


def test_a_search_by_keyboard_alone(made, browser):
    page = browser.page(made[1])
    page.wait("document.activeElement.id === 'query' && !document.getElementById('complexity').disabled")
    page.type("two blue squares")
    page.press("Enter")
    page.wait(SHOWN)
    assert page.eval("location.search") == "?q=two+blue+squares"
    assert page.eval("document.querySelectorAll('.card').length") == 24
    status = page.eval("document.getElementById('status').innerText")
    assert status.startswith("24 results in ") and "encode" in status and "search" in status
    assert page.eval("document.getElementById('status').getAttribute('aria-live')") == "polite"

    page.press("ArrowDown")
    assert page.eval(FOCUS) == "0"
    columns = page.eval("getComputedStyle(document.getElementById('results')).gridTemplateColumns.split(' ').length")
    assert columns > 2
    for key, at in (("ArrowRight", 1), ("ArrowDown", 1 + columns), ("ArrowLeft", columns), ("End", 23), ("ArrowRight", 23),
                    ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1)):  # fmt: skip
        page.press(key)
        assert page.eval(FOCUS) == str(at), key
    assert page.eval("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"
    page.press("Enter")
    page.wait("document.getElementById('viewer').open && document.getElementById('viewer-picture').naturalWidth > 0")
    assert "2 of 24" in page.eval("document.getElementById('viewer-facts').innerText")
    page.press("ArrowRight")
    page.wait("document.getElementById('viewer-facts').innerText.includes('3 of 24')")
    page.press("Escape")
    page.wait("!document.getElementById('viewer').open")
    page.wait(f"({FOCUS}) === '2'")  # the focus returns in the dialog's close event, which follows 'open'
    page.press("/")
    assert page.eval(FOCUS) == "query"
    assert page.problems() == []


def test_complexity_is_filtered_by_keyboard_and_in_the_address(made, browser):
    page = browser.page(made[1] + "/?q=stripes&k=48")
    page.wait(SHOWN)
    of_all = [float(text.split("complexity")[1].split()[0]) for text in shown(page)]
    assert len(of_all) == 30
    page.eval("document.getElementById('high').focus()")
    for _ in range(50):
        page.press("ArrowLeft")
    page.wait("location.search.includes('max=0.5')")
    page.wait("document.getElementById('range-text').innerText === '0.00 to 0.50'")
    few = sum(value <= 0.5 for value in of_all)
    assert 0 < few < 30
    page.wait(f"document.querySelectorAll('.card').length === {few}")
    assert page.eval("document.getElementById('high').getAttribute('aria-label')") == "Highest complexity"
    page.eval("history.back()")
    page.wait("document.querySelectorAll('.card').length === 30")
    assert page.eval("document.getElementById('high').value") == "1"
    page.go(made[1] + "/?q=stripes&exit=1&min=0.9")
    page.wait("document.getElementById('notice').innerText.includes('No image passes the filters')")


def test_an_image_is_chosen_and_another_like_it(made, browser, tmp_path):
    files, address = made
    page = browser.page(address)
    page.wait("!document.getElementById('start').hidden")
    page.choose("#file", files[4])
    page.wait(SHOWN)
    assert files[4].name in page.eval("document.getElementById('chip').innerText")
    assert "decode" in page.eval("document.getElementById('status').innerText")
    page.eval("document.querySelector('.card').click()")
    page.wait("document.getElementById('viewer').open")
    page.eval("document.getElementById('viewer-like').click()")
    page.wait("location.search.startsWith('?like=')")
    page.wait(SHOWN)
    page.eval("history.back()")  # searches by the chosen image again
    page.wait(f"location.search === '' && document.getElementById('chip').innerText.includes('{files[4].name}')")
    page.wait(SHOWN)
    page.eval("document.getElementById('chip-remove').click()")
    page.wait("!document.getElementById('start').hidden")


def test_a_card_shows_three_digits_and_the_first_caption_alone(made, browser):
    page = browser.page(made[1] + "/?q=gravel&k=48")
    page.wait(SHOWN)
    scores = [text.split("score")[1].split()[0] for text in shown(page)]
    hits = httpx.get(f"{made[1]}/api/search", params={"q": "gravel", "k": 48}, timeout=60).json()["hits"]
    assert scores == ["<0.001" if hit["score"] < 0.0005 else f"{hit['score']:.3f}" for hit in hits]
    assert any("its card" in text for text in shown(page)) and not any("second caption" in text for text in shown(page))
    at = next(i for i, hit in enumerate(hits) if hit["caption"])
    page.eval(f"document.querySelectorAll('.card')[{at}].click()")
    page.wait("document.getElementById('viewer').open")
    assert page.eval("document.getElementById('viewer-caption').innerText").splitlines()[-1] == "and a second caption"


@pytest.mark.parametrize("like", ["..%2F..%2Fmetrics", "A" * 64, "a" * 63, ""])
def test_an_address_that_names_no_image_asks_for_none(made, browser, like):
    page = browser.page(made[1])
    page.wait("!document.getElementById('start').hidden")
    before = len(page.requested())
    page.go(f"{made[1]}/?like={like}")
    page.wait("document.getElementById('notice').innerText.includes('Invalid image')")
    asked = [address.partition("?")[0] for address in page.requested()[before:]]
    assert asked and not any("/api/images" in address or "metrics" in address for address in asked)


def test_an_image_that_cannot_be_read_is_said(made, browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9999))))
    page = browser.page(made[1])
    page.wait("!document.getElementById('start').hidden")
    for name, says in (("broken.png", "not an image file"), ("bomb.png", "exceed the limit of 10,000,000 pixels")):
        page.choose("#file", tmp_path / name)
        page.wait(f"document.getElementById('notice').innerText.includes('{says}')")
        assert page.eval("!!document.querySelector('#notice button')"), "the search can be retried"


def test_text_from_outside_stays_text(made, browser):
    page = browser.page(made[1] + "/?q=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E&k=48")
    page.wait(SHOWN)
    assert page.eval("document.querySelectorAll('#results img[src=x], #results img[onerror]').length") == 0
    assert any("onerror=alert(1)" in text for text in shown(page))
    assert page.eval("[...document.querySelectorAll('.card img')].every((e) => e.alt)")


def test_a_file_that_vanished_is_said_in_its_place(made, browser):
    files, address = made
    content = files[7].read_bytes()
    hits = httpx.get(f"{address}/api/search", params={"q": "gone", "k": 48}, timeout=60).json()["hits"]
    rank = next(i for i, hit in enumerate(hits) if hit["path"] == str(files[7]))
    files[7].unlink()
    try:
        page = browser.page(address + "/?q=gone&k=48", height=3000)
        page.wait(f"document.querySelectorAll('.card')[{rank}]?.innerText.includes('no longer exists')")
    finally:
        files[7].write_bytes(content)


def test_a_server_that_is_gone_is_said(clip_folder, complexity_folder, browser, tmp_path):
    model = icar_jax.load(serverkit.make_bundle(clip_folder, complexity_folder, tmp_path / "bundle"), batch_size=8)
    serverkit.fill(tmp_path / "store", model, serverkit.draw(tmp_path / "pictures", 4))
    token = "a-token-of-some-length"
    with serverkit.running(serverkit.backend(tmp_path / "store", model), ServerSettings(port=0, token=token)) as address:
        page = browser.page(address + "/?q=a+star")
        page.wait("!!document.getElementById('token')")  # redirected to the login
        page.type(token)
        page.press("Enter")
        page.wait(SHOWN)
        assert page.eval("location.search") == "?q=a+star", "and back to the search"
        assert page.eval("document.cookie") == ""
    page.eval("document.getElementById('query').value = 'another'; document.querySelector('.go').click()")
    page.wait("document.getElementById('notice').innerText.includes('Is it still running')")


def test_pictures_for_people_are_drawn(made, browser):
    """The screenshot is not blank."""
    page = browser.page(made[1] + "/?q=a+red+circle")
    page.wait(SHOWN)
    picture = Image.open(io.BytesIO(page.picture())).convert("RGB")
    assert picture.size == (1280, 900) and len(picture.getcolors(1 << 24)) > 200
