"""JSON of every kind ends in one line that names file and field, or is read as what it says."""

import json
import os

import pytest

from icar_jax.errors import DataError
from icar_jax.files import json_file, limits
from icar_jax.files.json_file import Fields


def put(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("text", [b'{"a": [1, 2.5, null, "\xc3\xa9"]}', b'\xef\xbb\xbf{"a": [1, 2.5, null, "\xc3\xa9"]}'])
def test_json_is_read_with_and_without_byte_order_mark(tmp_path, text):
    assert json_file.read_object(put(tmp_path / "x.json", text)) == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    "text, fault",
    [
        (b"", "not valid JSON in UTF-8"), (b'{"a": ', "not valid JSON in UTF-8"),
        (b"\xff\xfe{\0}\0", "not valid JSON in UTF-8"),
        (b"[" * 200_000, "nested deeper than the limit of 64"), (b'{"a":' * 100 + b"1" + b"}" * 100, "nested deeper"),
        (b"[]", "expected a JSON object, found []"), (b"null", "found None"), (b"3", "found 3"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON in UTF-8"),
    ],
)  # fmt: skip
def test_anything_else_is_one_line_with_the_file(tmp_path, text, fault):
    file = put(tmp_path / "x.json", text)
    with pytest.raises(DataError) as error:
        json_file.read_object(file)
    assert str(file) in str(error.value) and fault in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_deepest_allowed_is_read(tmp_path):
    text = "[" * limits.JSON_DEPTH + "]" * limits.JSON_DEPTH
    assert json_file.read(put(tmp_path / "x.json", text)) is not None
    with pytest.raises(DataError, match="nested deeper"):
        json_file.read(put(tmp_path / "x.json", f"[{text}]"))


def test_files_are_regular_and_bounded(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="pipe.json: expected a regular file, found a pipe"):
        json_file.read(tmp_path / "pipe.json")
    with pytest.raises(DataError, match=r"x\.json: .*exceed the limit of 3 bytes"):
        json_file.read(put(tmp_path / "x.json", "[1, 2]"), most=3)
    with pytest.raises(DataError, match=r"cannot read .*none\.json: No such file"):
        json_file.read(tmp_path / "none.json")


def test_keys_that_occur_twice_can_be_refused():
    with pytest.raises(DataError, match="here: not valid JSON.*a key occurs twice"):
        json_file.parse('{"a": 1, "a": 2}', "here", pairs=json_file.without_duplicates)


def test_fields_of_another_type_are_named():
    fields = Fields(
        "x.json", {"n": 3, "f": 2, "t": "a", "z": 0, "l": [1, 2.5], "o": {"b": True}, "none": None, "bad": [1, "a"]}
    )
    assert (fields.get("n", int), fields.get("f", float), fields.get("t", str), fields.get("none", int, 7)) == (3, 2.0, "a", 7)
    assert (
        fields.numbers("l", float) == (1.0, 2.5) and fields.section("o").get("b", bool) is True and not fields.section("none")
    )
    for read, message in {
        lambda: fields.get("t", int): "x.json: t must be an integer, found 'a'",
        lambda: fields.get("n", bool): "x.json: n must be true or false, found 3",
        lambda: fields.section("o").get("b", int): "x.json: o: b must be an integer, found True",
        lambda: fields.section("l"): "x.json: l must be an object, found [1, 2.5]",
        lambda: fields.positive("z", int): "x.json: z must be positive and at most 67,108,864, found 0",
        lambda: fields.required("none", str): "x.json: none is missing; expected a text",
        lambda: fields.numbers("bad", float): "x.json: bad[1] must be a number, found 'a'",
    }.items():
        with pytest.raises(DataError) as error:
            read()
        assert str(error.value) == message


@pytest.mark.parametrize("value", [10**400, -(10**24), float("inf"), float("nan"), 1 << 63])
@pytest.mark.parametrize("kind", [int, float])
def test_numbers_without_sense_are_named(value, kind):
    fields = Fields("x.json", json.loads(json.dumps({"n": value})) if abs(value) < 1e300 else {"n": value})
    with pytest.raises(DataError, match=r"^x\.json: n must be "):
        fields.get("n", kind)
