import numpy as np
import pytest

from icar_jax import pytree


def tree(n=12):
    return {"blocks": {str(i): {"w": np.full(2, float(i))} for i in range(n)}, "scale": np.zeros(())}


def test_flatten_orders_blocks_as_numbers_and_round_trips():
    flat = pytree.flatten(tree())
    assert list(flat)[:3] == ["blocks/0/w", "blocks/1/w", "blocks/2/w"]
    assert list(flat)[9:12] == ["blocks/9/w", "blocks/10/w", "blocks/11/w"]
    back = pytree.unflatten(dict(reversed(flat.items())))
    assert list(back["blocks"]) == [str(i) for i in range(12)]
    assert pytree.flatten(back).keys() == flat.keys()


def test_count():
    assert pytree.count(tree(3)) == 7


def test_differences_lists_every_kind_at_once():
    found = tree(12)
    del found["blocks"]["3"]
    found["extra"] = np.zeros(1)
    found["scale"] = np.zeros(5)
    lines = pytree.differences(tree(), found)
    assert lines == [
        "missing: blocks/3/w (2,)",
        "unexpected: extra (1,)",
        "shape of scale: expected (), found (5,)",
    ]
    with pytest.raises(ValueError, match="somewhere.*3 differences"):
        pytree.require_same(tree(), found, "somewhere")
    pytree.require_same(tree(), tree(), "somewhere")
