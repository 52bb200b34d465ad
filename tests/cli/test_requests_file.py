"""Sheets: which requests a file of prompts becomes, and what is said of lines that are none."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux2max_async import ConfigurationError, GenerationRequest, InvalidRequestError
from flux2max_async.cli._parsers import FIELDS, PARSERS, guess_format
from flux2max_async.cli._requests_file import RequestsFile, parse_defaults, read_requests_file


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def read(data: str | bytes, form: str, folder: Path = Path(), **how: Any) -> RequestsFile:
    return read_requests_file(data if isinstance(data, bytes) else data.encode(), form, folder=folder, **how)


def told(sheet: RequestsFile) -> list[tuple[int, str, str]]:
    return [(bad.number, bad.field, bad.reason) for bad in sheet.bad]


def test_a_text_has_a_prompt_on_each_line() -> None:
    """Blank lines and lines that begin with # are skipped; line ends and the mark of an encoding don't count."""
    sheet = read("\ufeff# animals\r\n\r\na cat\r\n   # more\r\n  a dog \r\na lion # the big one", "txt")

    assert [(line.number, line.request.prompt) for line in sheet.lines] == [
        (3, "a cat"),
        (5, "a dog"),
        (6, "a lion # the big one"),
    ]
    assert not sheet.bad


def test_a_line_separator_within_a_prompt_begins_no_line() -> None:
    """Only a line feed ends a line: what else Unicode knows may stand in a prompt."""
    sheet = read("a cat\u2028asleep\x0b", "txt")

    assert [line.request.prompt for line in sheet.lines] == ["a cat\u2028asleep"]


def nested(levels: int) -> str:
    return f'{{"prompt": "a cat", "extra": {{"a": {"[" * levels}1{"]" * levels}}}}}'


FULL: dict[str, Any] = {
    "prompt": "a cat",
    "input_images": ["https://pictures.example/1.png", "small.png"],
    "seed": 7,
    "width": 640,
    "height": 0,
    "safety_tolerance": 5,
    "output_format": "png",
    "webhook_url": "https://app.example/hook",
    "webhook_secret": "a secret",
    "extra": {"upsampling": True},
    "key": "cat",
}


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_all_fields(tmp_path: Path, form: str) -> None:
    """Every field of a request can stand in a sheet; paths are relative to the sheet's folder."""
    (tmp_path / "small.png").write_bytes(png())
    cells = {
        **FULL,
        "input_images": "https://pictures.example/1.png; small.png",
        "extra": '"{""upsampling"": true}"',
    }
    table = f"{','.join(cells)}\n{','.join(map(str, cells.values()))}\n"
    sheet = read(json.dumps(FULL) if form == "jsonl" else table, form, tmp_path)
    wanted = {**FULL, "input_images": ["https://pictures.example/1.png", tmp_path / "small.png"]}

    assert not sheet.bad
    assert [line.request for line in sheet.lines] == [GenerationRequest(**wanted)]
    assert set(FULL) == set(FIELDS)


def test_what_a_line_leaves_out() -> None:
    """Options hold for all lines that don't say otherwise; null and empty cells don't."""
    defaults = parse_defaults((), width=512, prompt="a default", seed=None)
    objects = read('{"prompt": "a cat", "width": null}\n{"width": 1024}\n', "jsonl", defaults=defaults)
    table = read("prompt,width\na cat,\n,1024\n\n", "csv", defaults=defaults)

    for sheet in (objects, table):
        assert [(line.request.prompt, line.request.width) for line in sheet.lines] == [
            ("a cat", 512),
            ("a default", 1024),
        ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a cat\ra dog\r", [1, 2]),
        ("a cat\r\n\r\na dog", [1, 3]),
    ],
)
def test_lines_of_other_systems(text: str, lines: list[int]) -> None:
    """A line ends as any system ends it."""
    assert [line.number for line in read(text, "txt").lines] == lines


@pytest.mark.parametrize("head", ["sep=;\n", '"sep=;"\r\n', "\n\n", " \nsep=;\n\n"])
def test_what_spreadsheets_write_before_the_table(head: str) -> None:
    """Empty lines and a line that names the delimiter come before the columns; a last column may have no name."""
    sheet = read(f"{head}prompt;seed;\na cat, asleep;1;\na dog;x;\n", "csv")
    before = len(head.splitlines())

    assert [(line.number, line.request.prompt) for line in sheet.lines] == [(before + 2, "a cat, asleep")]
    assert [(bad.number, bad.field) for bad in sheet.bad] == [(before + 3, "seed")]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('\ufeff{"prompt": "a cat"}', "jsonl"),
        ("\n  {", "jsonl"),
        ("\ufeffPrompt; seed\na cat; 1", "csv"),
        ('"prompt","seed"\n"a cat",5', "csv"),
        ("sep=;\nprompt;seed\n", "csv"),
        ("sep=\t\nprompt\tseed\n", "csv"),
        ("prompt,seed", "csv"),
        ("prompt\na cat", "txt"),
        ('"a cat" on a mat', "txt"),
        ("a cat, a dog", "txt"),
        ("", "txt"),
        ("seed, prompt and harvest", None),
        ("prompt,seed,style\na cat,5,oil", None),
        ('[\n{"prompt": "a cat"}\n]', None),
        ("sep=;\na cat", None),
    ],
)
def test_what_standard_input_holds(text: str, form: str | None) -> None:
    """A brace begins objects, several fields in the first line a table, and all else is a prompt, or in doubt."""
    assert guess_format(text.encode()) == form


def test_a_file_in_another_encoding() -> None:
    """A file that says that it is UTF-16 is refused as a whole."""
    with pytest.raises(ConfigurationError, match="save it as UTF-8"):
        read("a cat".encode("utf-16"), "txt")


def test_a_secret_for_no_webhook() -> None:
    """The secret that is meant for all webhooks goes only where there is one."""
    defaults = {"webhook_secret": "hush"}
    lines = (
        '{"prompt": "a"}\n{"prompt": "b", "webhook_url": "https://app.example"}\n{"prompt": "c", "webhook_secret": "x"}'
    )
    sheet = read(lines, "jsonl", defaults=defaults)

    assert [line.request.webhook_secret for line in sheet.lines] == [None, "hush", "x"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_as_spreadsheets_write_them(delimiter: str) -> None:
    """Commas, semicolons or tabs between the cells; a cell may hold line feeds, and lines are counted as they stand."""
    sheet = read(f'Prompt{delimiter} Seed\r\n"a cat,\nasleep"{delimiter}1\r\na dog{delimiter}x\r\n', "csv")

    assert [(line.number, line.request.prompt, line.request.seed) for line in sheet.lines] == [(2, "a cat,\nasleep", 1)]
    assert told(sheet) == [(4, "seed", "seed must be an integer, not 'x'")]


def test_a_data_uri_in_a_cell() -> None:
    """The semicolon of a data: URI separates no pictures."""
    uri = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    sheet = read(f'prompt,input_images\na cat,"{uri};https://pictures.example/1.png"\n', "csv")

    assert [image.source for image in sheet.lines[0].request.input_images] == [png(), "https://pictures.example/1.png"]


@pytest.mark.parametrize(
    ("form", "text", "number", "field", "reason"),
    [
        ("jsonl", "a cat", 1, "line", "not valid JSON"),
        ("jsonl", "[" * 100_000, 1, "line", "not valid JSON"),
        ("jsonl", '"a cat"', 1, "line", "not an object"),
        ("jsonl", "[1]", 1, "line", "not an object"),
        ("jsonl", '{"seed": 7}', 1, "prompt", "missing"),
        ("jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', 1, "line", "a name stands in it twice"),
        ("jsonl", '{"prompt": 7}', 1, "prompt", "must be text"),
        ("jsonl", '{"prompt": " "}', 1, "prompt", "blank"),
        ("jsonl", '{"promt": "a cat"}', 1, "promt", "did you mean prompt?"),
        ("jsonl", '{"prompt": "a cat", "zzz": 1}', 1, "zzz", "the fields are prompt, input_images, seed"),
        ("jsonl", '\n{"prompt": "a cat", "width": 10}', 2, "width", "at least 64"),
        ("jsonl", '{"prompt": "a cat", "width": NaN}', 1, "width", "must be an integer"),
        ("jsonl", '{"prompt": "a cat", "seed": "7"}', 1, "seed", "must be an integer"),
        ("jsonl", '{"prompt": "a cat", "key": 7}', 1, "key", "must be text"),
        ("jsonl", '{"prompt": "a cat", "extra": {"seed": 7}}', 1, "extra", "a parameter of its own"),
        ("jsonl", '{"prompt": "a cat", "input_images": "cat.png"}', 1, "input_images", "a list of pictures"),
        ("jsonl", '{"prompt": "a cat", "input_images": ["cat.png"]}', 1, "input_images", "can't read"),
        ("jsonl", '{"prompt": "a cat", "input_images": [7]}', 1, "input_images", "not int"),
        ("txt", b"a cat\na \xff dog\n", 2, "prompt", "not UTF-8"),
        ("csv", b"prompt,key\na cat,\xff\n", 2, "key", "not UTF-8"),
        ("csv", "prompt,promt\na cat,a dog\n", 1, "promt", "did you mean prompt?"),
        ("csv", "prompt,seed,seed\na cat,1,2\n", 1, "seed", "twice"),
        ("csv", "prompt\na cat,a dog\n", 2, "line", "2 cells, but the first one names 1"),
        ("csv", 'prompt\n"a cat" and more\na dog\n', 2, "line", "not valid CSV"),
        ("csv", "prompt,extra\na cat,{\n", 2, "extra", "must be JSON"),
        ("csv", "prompt,output_format\na cat,gif\n", 2, "output_format", "'jpeg' or 'png'"),
        ("csv", "prompt,seed\na cat,1_000\n", 2, "seed", "must be an integer"),
        ("csv", "prompt,\na cat,a dog\n", 2, "line", "'a dog' stands in a column without a name"),
        ("csv", 'prompt\n"a cat\na dog\n', 2, "line", "a quote is opened and never closed"),
        ("txt", "a cat".encode("utf-16-le"), 1, "prompt", "the file may be UTF-16"),
        ("jsonl", '{"prompt": "a cat", "extra": {"a": ["\\u0000"]}}', 1, "extra", "a NUL"),
        ("jsonl", b'{"prompt": "a cat", "extra": {"\xe9": 1}}', 1, "extra", "not UTF-8"),
        ("jsonl", nested(500), 1, "extra", "nested"),
        ("jsonl", nested(5000), 1, "line", "nested|not valid JSON"),
        ("jsonl", '{"prompt": "a cat", "input_images": ["~nobody-here/cat.png"]}', 1, "input_images", "can't find"),
    ],
)
def test_a_bad_line_is_named(form: str, text: str | bytes, number: int, field: str, reason: str) -> None:
    """A line that is no request is told by its number, the field at fault and what would be right."""
    (bad,) = read(text, form).bad

    assert (bad.number, bad.field) == (number, field)
    assert any(part in bad.reason for part in reason.split("|"))


def test_all_bad_lines_are_named_and_the_good_ones_read() -> None:
    """One bad line hides no other, and none of the good ones."""
    sheet = read(
        '{"prompt": "a cat"}\n{"prompt": ""}\n{"prompt": "a dog", "seed": 1.5}\n{"prompt": "an owl"}\n', "jsonl"
    )

    assert [(number, field) for number, field, _ in told(sheet)] == [(2, "prompt"), (3, "seed")]
    assert [line.request.prompt for line in sheet.lines] == ["a cat", "an owl"]


def test_repeats_count_their_seeds_up() -> None:
    """Each line becomes as many requests, with seeds from its own, or from 0 where it has none.

    Where a line has a seed, the first is what it would be alone; where it has none, all are others.
    """
    lines = '{"prompt": "a cat", "seed": 40, "key": "cat"}\n{"prompt": "a dog", "key": "dog"}\n'
    sheet = read(lines, "jsonl", repeat=3)
    alone = read(lines, "jsonl")

    assert [line.request.seed for line in sheet.lines] == [40, 41, 42, 0, 1, 2]
    assert [line.key for line in sheet.lines] == ["cat", "cat-2", "cat-3", "dog-1", "dog-2", "dog-3"]
    assert sheet.lines[0] == alone.lines[0]
    assert [line.number for line in sheet.lines] == [1, 1, 1, 2, 2, 2]
    assert len({line.key for line in sheet.lines}) == 6


def test_a_name_is_that_of_what_is_asked_for() -> None:
    """A key doesn't depend on the line's place; what is asked for twice has two; other parameters make another."""
    one = read("a cat\na dog\n", "txt")
    two = read("# new\nan owl\na dog\na cat\na cat\n", "txt")
    wide = read("a cat\n", "txt", defaults={"width": 512})
    keys = [line.key for line in two.lines]

    assert {line.key for line in one.lines} < set(keys)
    assert keys[3] == f"{keys[2]}-2"
    assert keys[2].startswith("a-cat-")
    assert wide.lines[0].key not in keys
    assert len(set(keys)) == 4


@pytest.mark.parametrize("prompt", ["猫" * 500, "!?", "x" * 5000, "../../etc/passwd", "\x1b[2J"])
def test_a_name_fits_a_file(prompt: str) -> None:
    """Whatever the prompt is, its name is short and holds no path."""
    (line,) = read(json.dumps({"prompt": prompt}), "jsonl").lines

    assert len(line.key.encode()) <= 80
    assert not set(line.key) & set("/\\.\x1b")


def test_two_lines_with_one_key() -> None:
    """A key that another line has already is an error that names that line; so is one that repeats make."""
    sheet = read('{"prompt": "a", "key": "k"}\n{"prompt": "b", "key": "k"}\n', "jsonl")
    twice = '{"prompt": "a", "key": "k-2", "seed": 1}\n{"prompt": "b", "key": "k", "seed": 1}\n'
    repeated = read(twice, "jsonl", repeat=2)

    assert told(sheet) == [(2, "key", "key 'k' is that of line 1 already: each needs its own")]
    assert told(repeated) == [(2, "key", "key 'k-2' is that of line 1 already: each needs its own")]


@pytest.mark.parametrize(
    ("extra", "values"),
    [(["a=1"], {"a": 1}), (["a=x=y"], {"a": "x=y"}), (["a=true", 'b={"c": []}'], {"a": True, "b": {"c": []}})],
)
def test_extra_options(extra: list[str], values: dict[str, Any]) -> None:
    """A value is JSON, or text where it isn't."""
    assert parse_defaults(extra) == {"extra": values}


@pytest.mark.parametrize(
    ("extra", "fields", "field"),
    [
        (["a"], {}, "extra"),
        (["=1"], {}, "extra"),
        (["a=" + "[" * 100_000], {}, "extra"),
        (["seed=1"], {}, "extra"),
        ([], {"width": 10}, "width"),
        ([], {"input_images": ["http://"]}, "input_images"),
        ([], {"input_images": ["nowhere.png"]}, "input_images"),
        ([], {"webhook_url": "ftp://x"}, "webhook_url"),
    ],
)
def test_a_default_that_is_wrong(extra: list[str], fields: dict[str, Any], field: str) -> None:
    """A mistake in an option is one error, and not one for each line."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_defaults(extra, **fields)

    assert caught.value.field == field


@given(st.sampled_from(sorted(PARSERS)), st.one_of(st.binary(), st.text().map(str.encode)))
def test_whatever_a_file_holds(form: str, data: bytes) -> None:
    """Any bytes are lines that are requests and lines that are not; each is told once."""
    sheet = read(data, form)

    assert all(line.request.key and line.request.prompt.strip() for line in sheet.lines)
    assert len({line.key for line in sheet.lines}) == len(sheet.lines)
    assert all(bad.reason for bad in sheet.bad)
