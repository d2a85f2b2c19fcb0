"""Cleans captions before a tokenizer reads them, as OpenAI's CLIP and OpenCLIP do."""

from __future__ import annotations

import html
import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, how: str = "lower") -> str:
    """Cleans text as OpenAI's CLIP does: repairs mojibake, unescapes HTML twice, collapses whitespace, lower-cases.

    `how`: 'whitespace' keeps the case; 'canonicalize' also removes punctuation, after turning '_' into a space; '' changes
    nothing. The names are OpenCLIP's.
    """
    if not how:
        return text
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else neither repairing nor unescaping changes it
        import ftfy  # slow to import, and most queries do not need it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


CLEANINGS = ("", "whitespace", "lower", "canonicalize")  # what `how` of `clean` may be
