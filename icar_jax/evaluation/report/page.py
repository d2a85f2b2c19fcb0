"""Builds a report as one self-contained HTML page: no scripts or other files, light and dark themes, any screen width.

All external text (captions, paths, notes, run names) is escaped by `text`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STYLE = """
:root{color-scheme:light dark;--paper:#f6f7f9;--card:#fff;--ink:#1c2330;--faint:#5c6675;--line:#dfe4ec;--accent:#c2410c;
--blue:#0b62a4;--good:#0f7b5f;--soft:#eef1f6}
@media (prefers-color-scheme:dark){:root{--paper:#10151d;--card:#18202b;--ink:#e8ebf1;--faint:#a3adbd;--line:#2b3444;
--accent:#ff9a62;--blue:#6cb6f0;--good:#4fd1a8;--soft:#202a38}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:36px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:44px 0 6px}
p{margin:0 0 12px;max-width:76ch}.faint,figcaption,footer{color:var(--faint);font-size:.92rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:14px;margin:22px 0 8px;padding:0;
list-style:none}
.cards li{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
.cards .what{color:var(--faint);font-size:.88rem;display:block}
.cards strong{display:block;font-size:1.9rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.cards .how{font-size:.9rem;display:block}
.plain{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--accent);border-radius:12px;
padding:14px 20px 14px 36px;margin:12px 0}.plain li{margin:5px 0}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line);border-radius:12px;
font-variant-numeric:tabular-nums;font-size:.92rem;margin:12px 0}
th,td{overflow-wrap:normal;white-space:nowrap;
padding:9px 12px;text-align:right;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;color:var(--faint);font-weight:600;font-size:.82rem;vertical-align:bottom;line-height:1.3}
th:first-child,td.left{text-align:left}tbody th{font-weight:600}tbody th small{display:block;font-weight:400;color:var(--faint);
font-size:.84em;line-height:1.35;max-width:30ch;white-space:normal}
small.i{color:var(--faint);white-space:nowrap}
.bar{display:flex;height:10px;min-width:120px;border-radius:5px;overflow:hidden;background:var(--soft);margin:6px 0 3px}
.bar i{background:var(--blue)}.bar i:last-child{border-right:0}.bar i{border-right:2px solid var(--card)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:18px;margin-top:12px}
@media (min-width:1080px){.figures{grid-template-columns:repeat(6,1fr)}.figures figure{grid-column:span 2}
.figures figure:nth-child(-n+2){grid-column:span 3}}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
figure img{width:100%;height:auto;display:block}figure h3{font-size:1rem;margin:0 0 8px}figcaption{margin-top:8px}
.falls{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:14px;padding:0;list-style:none;margin:12px 0}
.falls li{display:grid;grid-template-columns:88px 1fr;gap:12px;background:var(--card);border:1px solid var(--line);
border-radius:12px;padding:12px;font-size:.88rem;line-height:1.4}
.falls img{width:88px;height:88px;object-fit:contain;border-radius:6px;background:var(--soft)}
.falls q{display:block}.falls .move{font-weight:650;color:var(--accent);display:block;font-variant-numeric:tabular-nums}
details{margin:12px 0}summary{cursor:pointer;color:var(--blue);font-weight:600}
code{font:0.9em ui-monospace,SFMono-Regular,Menlo,monospace}
footer{padding-top:26px;padding-bottom:48px}
@media (max-width:820px){main,header,footer{padding-left:14px;padding-right:14px}h1{font-size:1.45rem}
table,tbody,tr,td,tbody th{display:block;width:100%}thead{position:absolute;width:1px;height:1px;overflow:hidden;
clip-path:inset(50%)}tr{padding:10px 14px;border-top:1px solid var(--line)}tbody tr:first-child{border-top:0}
tbody th{padding:0 0 4px;border:0;text-align:left;font-size:1.02rem;white-space:normal}tbody th small{max-width:none}
td,td.left{display:flex;justify-content:space-between;gap:16px;padding:3px 0;border:0;text-align:right}
td::before{content:attr(data-label);color:var(--faint);text-align:left;white-space:normal}td>span{text-align:right}.bar{width:140px}
.plain{padding:12px 14px 12px 30px}}
@media print{body{background:#fff}figure,.falls li,.cards li{break-inside:avoid}}
"""


_UNREADABLE = "<span>unreadable</span>"


@dataclass(frozen=True)
class Picture:
    """A figure. light, dark: SVG; alt: alternative text; note: caption."""

    title: str
    alt: str
    note: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class RankDrop:
    """An image whose rank got worse at an early exit.

    thumbnail: JPEG, or None if the image can no longer be read. query: the caption used as query, or the image's first caption
    if the image was the query (`by_image`). before, after: rank at full depth and in the run. exit: executed blocks.
    """

    name: str
    thumbnail: bytes | None
    query: str
    before: int
    after: int
    exit: int
    score: float | None
    by_image: bool = False


@dataclass(frozen=True)
class Table:
    """A table. caption: label for screen readers; head: one heading per column; rows: header cell and other cells, as HTML."""

    caption: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def text(value: Any) -> str:
    """Escapes any value for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def page(title: str, sections: Sequence[str], lead: str, foot: str) -> str:
    """Returns the complete document; `lead`, `foot` and the sections are HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<header><h1>{text(title)}</h1>{lead}</header>\n<main>\n{''.join(sections)}</main>\n<footer>{foot}</footer>\n"
        "</body>\n</html>\n"
    )


def section(title: str, body: str, intro: str = "") -> str:
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    intro = f'<p class="faint">{text(intro)}</p>' if intro else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{text(title)}</h2>{intro}{body}</section>\n'


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Returns a row of cards from (label, value, explanation) triples."""
    made = "".join(
        f'<li><span class="what">{text(w)}</span><strong>{text(v)}</strong><span class="how">{text(h)}</span></li>'
        for w, v, h in items
    )
    return f'<ul class="cards">{made}</ul>'


def sentences(lines: Sequence[str]) -> str:
    return f'<ul class="plain">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>' if lines else ""


def table(given: Table) -> str:
    """Returns a table that becomes one block per row on narrow screens; ARIA roles keep it a table for screen readers."""
    head = "".join(f'<th scope="col" role="columnheader">{each}</th>' for each in given.head)
    labels = [each.replace("<br>", " ") for each in given.head]
    rows = []
    for first, cells in given.rows:
        made = "".join(
            f'<td role="cell" data-label="{label}"><span>{cell}</span></td>' for label, cell in zip(labels[1:], cells)
        )
        rows.append(f'<tr role="row"><th scope="row" role="rowheader">{first}</th>{made}</tr>')
    return (
        f'<table role="table" aria-label="{text(given.caption)}"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def bar(parts: Mapping[int, float]) -> str:
    """Returns shares by exit as a stacked bar with the numbers below."""
    keys = sorted(parts)
    strength = [0.35 + 0.65 * i / max(1, len(keys) - 1) if len(keys) > 1 else 1.0 for i in range(len(keys))]
    made = "".join(
        f'<i style="width:{100 * parts[key]:.2f}%;opacity:{o:.2f}"></i>' for key, o in zip(keys, strength) if parts[key] > 0
    )
    words = " · ".join(f"{key}: {100 * parts[key]:.0f}%" for key in keys if parts[key] > 0)
    return f'<span class="bar" aria-hidden="true">{made}</span>{words}'


def figures(pictures: Sequence[Picture]) -> str:
    made = []
    for each in pictures:
        made.append(
            f"<figure><h3>{text(each.title)}</h3><picture>"
            f'<source media="(prefers-color-scheme: dark)" srcset="{data_url(each.dark, "image/svg+xml")}">'
            f'<img alt="{text(each.alt)}" src="{data_url(each.light, "image/svg+xml")}"></picture>'
            f"<figcaption>{text(each.note)}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(made)}</div>'


def rank_drops(items: Sequence[RankDrop]) -> str:
    made = []
    for each in items:
        alt = text(f"image {each.name}")
        picture = f'<img alt="{alt}" src="{data_url(each.thumbnail, "image/jpeg")}">' if each.thumbnail else _UNREADABLE
        score = f" · score {each.score:.3f}" if each.score is not None else ""
        made.append(
            f'<li>{picture}<div><span class="move">rank {each.before:,} \N{RIGHTWARDS ARROW} {each.after:,}</span>'
            f"{'query: this image; caption: ' if each.by_image else 'query: '}"
            f'<q>{text(each.query)}</q><span class="faint">{each.exit} blocks{score}<br>{text(each.name)}</span></div></li>'
        )
    return f'<ul class="falls">{"".join(made)}</ul>'


def details(summary: str, body: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
