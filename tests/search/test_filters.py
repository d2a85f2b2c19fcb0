"""SQL filters: what is refused before LanceDB sees it, and what it answers."""

import re

import pytest

from icar_jax.files import limits
from icar_jax.search.access import StoreError, store_errors
from icar_jax.search.filters import fault_of


@pytest.mark.parametrize("where, why", [
    ("? = 1", "stands for a value"), ("caption = $1", r"\$1 stands"), ("exit = :depth", ":depth stands"), ("@x = 1", "stands"),
    ("exit = 1; DROP TABLE images", "after a ';'"), ("exit = 1 OR " * 1000, "characters exceed the limit"),
    ("(" * 40 + "exit = 1" + ")" * 40, "40 nested parentheses"),
    ("repeat('a', 10000000000) = caption", "repeat is not a function"),
    ("lpad(caption, 2000000000, 'x') = caption", "lpad is not"), ("exit = 1\0", "control characters"),
])  # fmt: skip
def test_filters_that_could_stop_the_process(where, why):
    assert re.search(why, fault_of(where))


@pytest.mark.parametrize("where", [
    "complexity < 0.4 AND exit = 6",
    "path = 'a;b?c$d:e'", "path LIKE '%(1)%' AND NOT (exit IN (3, 6))",
    'lower("caption") = \'x\'',
    "cast(exit AS double)/2 > 1", "exit::bigint = 1", "regexp_like(caption, 'd.g')",
    "(" * limits.FILTER_DEPTH + "exit=1" + ")" * 32,
])  # fmt: skip
def test_filters_that_people_write(where):
    assert fault_of(where) is None


def test_a_panic_of_the_library_is_an_error_of_the_store():
    panic = type("RustPanic", (Exception,), {})
    with (
        pytest.raises(StoreError, match="store here: reading it failed: rust future panicked"),
        store_errors("here", "reading it"),
    ):
        raise panic("rust future panicked")
    with pytest.raises(KeyError), store_errors("here", "reading it"):
        raise KeyError("a bug")
