"""Bounds of the SQL filters of searches, checked before LanceDB parses them.

LanceDB evaluates constant expressions while it plans, so a call such as repeat('a', 10000000000) would take the memory of the
process before any limit of time applies. Only functions whose results are no longer than their arguments are therefore allowed.
"""

from __future__ import annotations

import re

from icar_jax.files import limits

# Quoted SQL: strings in ' and names in " or `; a quote inside is doubled.
QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`""")
FUNCTIONS = frozenset(
    "lower upper length char_length character_length octet_length starts_with ends_with contains strpos substr substring left "
    "right trim btrim ltrim rtrim split_part abs round floor ceil sqrt ln log exp power coalesce nullif greatest least isnan "
    "regexp_like regexp_match date_trunc date_part to_timestamp to_date now current_date cast try_cast arrow_cast".split()
)
_KEYWORDS = frozenset("and or not in like ilike between is any all when then else decimal numeric varchar char".split())
_CALL = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*\(")
_PLACEHOLDER = re.compile(r"\?|\$\w*|(?<!:):(?!:)\w*|@\w*")


def fault_of(where: str) -> str | None:
    """Why a filter is not given to LanceDB; None if it may be."""
    if len(where) > limits.FILTER_CHARACTERS:
        return f"{len(where):,} characters exceed the limit of {limits.FILTER_CHARACTERS:,}"
    bare = QUOTED.sub("''", where)
    if ";" in bare:
        return "anything after a ';' would be ignored; write a single condition"
    if not where.isprintable() and any(ord(c) < 32 and c not in "\t\r\n" for c in where):
        return "it contains control characters"
    if placeholder := _PLACEHOLDER.search(bare):
        return f"{placeholder[0]} stands for a value that is given elsewhere, and none is; write the value"
    depth = deepest = 0
    for c in bare:
        depth += (c == "(") - (c == ")")
        deepest = max(deepest, depth)
    if deepest > limits.FILTER_DEPTH:
        return f"{deepest} nested parentheses exceed the limit of {limits.FILTER_DEPTH}"
    called = [name for name in _CALL.findall(bare) if name.lower() not in FUNCTIONS | _KEYWORDS]
    if called:
        return f"{called[0]} is not a function of filters; these are: {', '.join(sorted(FUNCTIONS))}"
    return None
