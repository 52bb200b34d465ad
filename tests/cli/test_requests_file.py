"""Requests files: the requests that are read from each format, and the errors of bad lines."""

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
from flux2max_async.cli._file_formats import FIELDS, PARSERS, guess_format
from flux2max_async.cli._requests_file import RequestsFile, parse_defaults, read_requests_file


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def read(data: str | bytes, file_format: str, folder: Path = Path(), **options: Any) -> RequestsFile:
    return read_requests_file(data if isinstance(data, bytes) else data.encode(), file_format, folder=folder, **options)


def errors_of(requests_file: RequestsFile) -> list[tuple[int, str, str]]:
    return [(line.number, line.field, line.reason) for line in requests_file.bad_lines]


def test_text_has_a_prompt_on_each_line() -> None:
    """Blank lines, lines that begin with #, line endings and a byte order mark are ignored."""
    requests_file = read("\ufeff# animals\r\n\r\na cat\r\n   # more\r\n  a dog \r\na lion # the big one", "txt")

    assert [(line.number, line.request.prompt) for line in requests_file.lines] == [
        (3, "a cat"),
        (5, "a dog"),
        (6, "a lion # the big one"),
    ]
    assert not requests_file.bad_lines


def test_unicode_line_separators_are_part_of_the_prompt() -> None:
    """Only line feeds and carriage returns end a line, and not the other line separators of Unicode."""
    requests_file = read("a cat\u2028asleep\x0b", "txt")

    assert [line.request.prompt for line in requests_file.lines] == ["a cat\u2028asleep"]


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


@pytest.mark.parametrize("file_format", ["jsonl", "csv"])
def test_all_fields(tmp_path: Path, file_format: str) -> None:
    """A requests file can set every field; the paths of images are relative to its folder."""
    (tmp_path / "small.png").write_bytes(png())
    cells = {
        **FULL,
        "input_images": "https://pictures.example/1.png; small.png",
        "extra": '"{""upsampling"": true}"',
    }
    table = f"{','.join(cells)}\n{','.join(map(str, cells.values()))}\n"
    requests_file = read(json.dumps(FULL) if file_format == "jsonl" else table, file_format, tmp_path)
    expected = {**FULL, "input_images": ["https://pictures.example/1.png", tmp_path / "small.png"]}

    assert not requests_file.bad_lines
    assert [line.request for line in requests_file.lines] == [GenerationRequest(**expected)]
    assert set(FULL) == set(FIELDS)


def test_defaults() -> None:
    """A default applies to each line that doesn't set the field; null and an empty cell don't set it."""
    defaults = parse_defaults((), width=512, prompt="a default", seed=None)
    jsonl = read('{"prompt": "a cat", "width": null}\n{"width": 1024}\n', "jsonl", defaults=defaults)
    csv = read("prompt,width\na cat,\n,1024\n\n", "csv", defaults=defaults)

    for requests_file in (jsonl, csv):
        assert [(line.request.prompt, line.request.width) for line in requests_file.lines] == [
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
def test_line_endings(text: str, lines: list[int]) -> None:
    """The line endings of all operating systems are supported."""
    assert [line.number for line in read(text, "txt").lines] == lines


@pytest.mark.parametrize("head", ["sep=;\n", '"sep=;"\r\n', "\n\n", " \nsep=;\n\n"])
def test_lines_before_the_table(head: str) -> None:
    """Empty lines and a line with the delimiter may precede the column names; the last column may have no name."""
    requests_file = read(f"{head}prompt;seed;\na cat, asleep;1;\na dog;x;\n", "csv")
    skipped = len(head.splitlines())

    assert [(line.number, line.request.prompt) for line in requests_file.lines] == [(skipped + 2, "a cat, asleep")]
    assert [(line.number, line.field) for line in requests_file.bad_lines] == [(skipped + 3, "seed")]


@pytest.mark.parametrize(
    ("text", "file_format"),
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
def test_format_of_standard_input(text: str, file_format: str | None) -> None:
    """A brace means JSON Lines, several field names in the first line mean CSV; None is for ambiguous text."""
    assert guess_format(text.encode()) == file_format


def test_utf_16() -> None:
    """A file with a byte order mark of UTF-16 is rejected as a whole."""
    with pytest.raises(ConfigurationError, match="save it as UTF-8"):
        read("a cat".encode("utf-16"), "txt")


def test_default_webhook_secret() -> None:
    """The default secret applies only to requests that have a webhook."""
    defaults = {"webhook_secret": "secret"}
    lines = (
        '{"prompt": "a"}\n{"prompt": "b", "webhook_url": "https://app.example"}\n{"prompt": "c", "webhook_secret": "x"}'
    )
    requests_file = read(lines, "jsonl", defaults=defaults)

    assert [line.request.webhook_secret for line in requests_file.lines] == [None, "secret", "x"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_of_spreadsheet_programs(delimiter: str) -> None:
    """Cells are delimited by commas, semicolons or tabs and may contain line feeds, which count as lines."""
    requests_file = read(f'Prompt{delimiter} Seed\r\n"a cat,\nasleep"{delimiter}1\r\na dog{delimiter}x\r\n', "csv")

    assert [(line.number, line.request.prompt, line.request.seed) for line in requests_file.lines] == [
        (2, "a cat,\nasleep", 1)
    ]
    assert errors_of(requests_file) == [(4, "seed", "seed must be an integer, not 'x'")]


def test_data_uri_in_a_cell() -> None:
    """The semicolon of a data: URI doesn't separate images."""
    uri = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    requests_file = read(f'prompt,input_images\na cat,"{uri};https://pictures.example/1.png"\n', "csv")

    assert [image.source for image in requests_file.lines[0].request.input_images] == [
        png(),
        "https://pictures.example/1.png",
    ]


@pytest.mark.parametrize(
    ("file_format", "text", "number", "field", "reason"),
    [
        ("jsonl", "a cat", 1, "line", "not valid JSON"),
        ("jsonl", "[" * 100_000, 1, "line", "not valid JSON"),
        ("jsonl", '"a cat"', 1, "line", "not an object"),
        ("jsonl", "[1]", 1, "line", "not an object"),
        ("jsonl", '{"seed": 7}', 1, "prompt", "missing"),
        ("jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', 1, "line", "an object has the same name twice"),
        ("jsonl", '{"prompt": 7}', 1, "prompt", "must be text"),
        ("jsonl", '{"prompt": " "}', 1, "prompt", "blank"),
        ("jsonl", '{"promt": "a cat"}', 1, "promt", "did you mean prompt?"),
        ("jsonl", '{"prompt": "a cat", "zzz": 1}', 1, "zzz", "the fields are prompt, input_images, seed"),
        ("jsonl", '\n{"prompt": "a cat", "width": 10}', 2, "width", "at least 64"),
        ("jsonl", '{"prompt": "a cat", "width": NaN}', 1, "width", "must be an integer"),
        ("jsonl", '{"prompt": "a cat", "seed": "7"}', 1, "seed", "must be an integer"),
        ("jsonl", '{"prompt": "a cat", "key": 7}', 1, "key", "must be text"),
        ("jsonl", '{"prompt": "a cat", "extra": {"seed": 7}}', 1, "extra", "a parameter of its own"),
        ("jsonl", '{"prompt": "a cat", "input_images": "cat.png"}', 1, "input_images", "a list of images"),
        ("jsonl", '{"prompt": "a cat", "input_images": ["cat.png"]}', 1, "input_images", "can't read"),
        ("jsonl", '{"prompt": "a cat", "input_images": [7]}', 1, "input_images", "not int"),
        ("txt", b"a cat\na \xff dog\n", 2, "prompt", "not UTF-8"),
        ("csv", b"prompt,key\na cat,\xff\n", 2, "key", "not UTF-8"),
        ("csv", "prompt,promt\na cat,a dog\n", 1, "promt", "did you mean prompt?"),
        ("csv", "prompt,seed,seed\na cat,1,2\n", 1, "seed", "twice"),
        ("csv", "prompt\na cat,a dog\n", 2, "line", "2 cells, but the first line has 1"),
        ("csv", 'prompt\n"a cat" and more\na dog\n', 2, "line", "not valid CSV"),
        ("csv", "prompt,extra\na cat,{\n", 2, "extra", "must be JSON"),
        ("csv", "prompt,output_format\na cat,gif\n", 2, "output_format", "'jpeg' or 'png'"),
        ("csv", "prompt,seed\na cat,1_000\n", 2, "seed", "must be an integer"),
        ("csv", "prompt,\na cat,a dog\n", 2, "line", "'a dog' is in a column without a name"),
        ("csv", 'prompt\n"a cat\na dog\n', 2, "line", "a quote is opened and never closed"),
        ("txt", "a cat".encode("utf-16-le"), 1, "prompt", "if the file is in UTF-16"),
        ("jsonl", '{"prompt": "a cat", "extra": {"a": ["\\u0000"]}}', 1, "extra", "a NUL"),
        ("jsonl", b'{"prompt": "a cat", "extra": {"\xe9": 1}}', 1, "extra", "not UTF-8"),
        ("jsonl", nested(500), 1, "extra", "nested"),
        ("jsonl", nested(5000), 1, "line", "nested|not valid JSON"),
        ("jsonl", '{"prompt": "a cat", "input_images": ["~nobody-here/cat.png"]}', 1, "input_images", "can't find"),
    ],
)
def test_bad_line(file_format: str, text: str | bytes, number: int, field: str, reason: str) -> None:
    """The error of a bad line has the line's number, the invalid field and the valid values."""
    (bad_line,) = read(text, file_format).bad_lines

    assert (bad_line.number, bad_line.field) == (number, field)
    assert any(part in bad_line.reason for part in reason.split("|"))


def test_valid_lines_among_bad_lines() -> None:
    """All bad lines are reported, and all valid lines are read."""
    requests_file = read(
        '{"prompt": "a cat"}\n{"prompt": ""}\n{"prompt": "a dog", "seed": 1.5}\n{"prompt": "an owl"}\n', "jsonl"
    )

    assert [(number, field) for number, field, _ in errors_of(requests_file)] == [(2, "prompt"), (3, "seed")]
    assert [line.request.prompt for line in requests_file.lines] == ["a cat", "an owl"]


def test_repeat() -> None:
    """Each line becomes several requests with consecutive seeds, from the line's own seed or from 0.

    If the line has a seed, its first request is the same as without repetition.
    """
    lines = '{"prompt": "a cat", "seed": 40, "key": "cat"}\n{"prompt": "a dog", "key": "dog"}\n'
    requests_file = read(lines, "jsonl", repeat=3)
    unrepeated = read(lines, "jsonl")

    assert [line.request.seed for line in requests_file.lines] == [40, 41, 42, 0, 1, 2]
    assert [line.key for line in requests_file.lines] == ["cat", "cat-2", "cat-3", "dog-1", "dog-2", "dog-3"]
    assert requests_file.lines[0] == unrepeated.lines[0]
    assert [line.number for line in requests_file.lines] == [1, 1, 1, 2, 2, 2]
    assert len({line.key for line in requests_file.lines}) == 6


def test_derived_keys() -> None:
    """A derived key depends on the parameters, and not on the line's number; equal requests get different keys."""
    before = read("a cat\na dog\n", "txt")
    after = read("# new\nan owl\na dog\na cat\na cat\n", "txt")
    wide = read("a cat\n", "txt", defaults={"width": 512})
    keys = [line.key for line in after.lines]

    assert {line.key for line in before.lines} < set(keys)
    assert keys[3] == f"{keys[2]}-2"
    assert keys[2].startswith("a-cat-")
    assert wide.lines[0].key not in keys
    assert len(set(keys)) == 4


@pytest.mark.parametrize("prompt", ["猫" * 500, "!?", "x" * 5000, "../../etc/passwd", "\x1b[2J"])
def test_derived_key_is_a_valid_file_name(prompt: str) -> None:
    """The derived key of any prompt is short and contains no path."""
    (line,) = read(json.dumps({"prompt": prompt}), "jsonl").lines

    assert len(line.key.encode()) <= 80
    assert not set(line.key) & set("/\\.\x1b")


def test_duplicate_keys() -> None:
    """The error of a duplicate key names the other line, also if a repetition created the key."""
    requests_file = read('{"prompt": "a", "key": "k"}\n{"prompt": "b", "key": "k"}\n', "jsonl")
    lines = '{"prompt": "a", "key": "k-2", "seed": 1}\n{"prompt": "b", "key": "k", "seed": 1}\n'
    repeated = read(lines, "jsonl", repeat=2)

    assert errors_of(requests_file) == [(2, "key", "line 1 has the key 'k' already: keys must be unique")]
    assert errors_of(repeated) == [(2, "key", "line 1 has the key 'k-2' already: keys must be unique")]


@pytest.mark.parametrize(
    ("extra", "values"),
    [(["a=1"], {"a": 1}), (["a=x=y"], {"a": "x=y"}), (["a=true", 'b={"c": []}'], {"a": True, "b": {"c": []}})],
)
def test_extra_options(extra: list[str], values: dict[str, Any]) -> None:
    """A value is parsed as JSON; if it isn't valid JSON, it is text."""
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
def test_invalid_default(extra: list[str], fields: dict[str, Any], field: str) -> None:
    """An invalid option is one error, not one for each line."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_defaults(extra, **fields)

    assert caught.value.field == field


@given(st.sampled_from(sorted(PARSERS)), st.one_of(st.binary(), st.text().map(str.encode)))
def test_arbitrary_bytes(file_format: str, data: bytes) -> None:
    """Any file is read into requests with unique keys and bad lines with reasons."""
    requests_file = read(data, file_format)

    assert all(line.request.key and line.request.prompt.strip() for line in requests_file.lines)
    assert len({line.key for line in requests_file.lines}) == len(requests_file.lines)
    assert all(line.reason for line in requests_file.bad_lines)
