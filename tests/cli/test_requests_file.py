"""Requests files: the requests that are read from each format, and the errors of bad lines."""

import base64
import io
import json
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux2max_async import GenerationRequest, InvalidRequestError
from flux2max_async.cli._file_formats import FIELDS, FORMATS, guess_format, parse_json
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
        ('[\n{"prompt": "a cat"}\n]', "json"),
        ('["a cat", "a dog"]', "json"),
        ("[fail] a cat", None),
        ("sep=;\na cat", None),
    ],
)
def test_format_of_standard_input(text: str, file_format: str | None) -> None:
    """A brace means JSON Lines, several field names in the first line mean CSV; None is for ambiguous text."""
    assert guess_format(text.encode()) == file_format


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize(
    ("file_format", "text"),
    [("txt", "a café\r\n猫\r\n"), ("csv", "prompt\na café\n猫\n"), ("json", '["a café", "猫"]')],
)
def test_byte_order_marks(encoding: str, file_format: str, text: str) -> None:
    """A byte order mark names the encoding, in any format of text."""
    mark = "\ufeff" if encoding.endswith("e") else ""
    requests_file = read(f"{mark}{text}".encode(encoding), file_format)

    assert [line.request.prompt for line in requests_file.lines] == ["a café", "猫"]
    assert (requests_file.bad_lines, requests_file.notes) == ([], [])


def test_utf_16_of_standard_input() -> None:
    """The format of standard input is found in any encoding with a byte order mark."""
    assert guess_format("prompt\tseed\na cat\t1".encode("utf-16")) == "csv"


@pytest.mark.parametrize("end", [b"x", "\ud800".encode("utf-16-le", "surrogatepass")])
def test_damaged_utf_16(end: bytes) -> None:
    """What can't be read in UTF-16 makes its line a bad one."""
    requests_file = read("a cat\na dog".encode("utf-16") + end, "txt")

    assert [line.request.prompt for line in requests_file.lines] == ["a cat"]
    assert errors_of(requests_file) == [(2, "prompt", "prompt is not UTF-8: save the file in that encoding")]


@pytest.mark.parametrize(
    ("prompt", "examples"),
    [
        ("Ein Mädchen mit „großen“ Augen, 5 m² – für 20 €", "Mädchen, „großen“, m², –, für"),  # noqa: RUF001
        ("L’été à Nîmes : « un cœur créé » où ça va…", "L’été, à, Nîmes, «, cœur"),  # noqa: RUF001
        ("¿Qué pasa, señor?", "¿Qué, señor?"),
        ("Avião sobre corações", "Avião, corações"),
        ("Räksmörgås på ön", "Räksmörgås"),
        ("A café on a rose’s petal: “soft” light at 45°", "café, rose’s, “soft”, 45°"),  # noqa: RUF001
    ],
)
@pytest.mark.parametrize("file_format", ["txt", "csv"])
def test_windows_1252(file_format: str, prompt: str, examples: str) -> None:
    """Texts of Western European languages, saved by a program on Windows, are read, with examples for the user."""
    lines = ["prompt;seed", f'"{prompt}";1'] if file_format == "csv" else [prompt]
    requests_file = read("".join(f"{line}\r\n" for line in lines).encode("cp1252"), file_format)

    assert [line.request.prompt for line in requests_file.lines] == [prompt]
    assert requests_file.notes == [f"not UTF-8; read as Windows-1252: {examples}"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "a café\n"),
        ("cp1252", "a café\ra dog\r"),
        ("cp1252", "a café\r\na dog\r"),
        ("cp1251", "кошка\r\n"),
        ("cp1250", "żółty ptak\r\n"),
        ("cp1250", "szép nő sűrű erdőben\r\n"),
        ("cp1254", "güneşli bir ağaç\r\n"),
        ("cp1253", "γάτα στη στέγη\r\n"),
        ("cp1257", "katė ant stogo, žąsis\r\n"),
        ("mac-roman", "Mädchen über Köln\r\n"),
        ("cp437", "Mädchen über Köln\r\n"),
        ("shift-jis", "猫が座る\r\n"),
        ("gbk", "一只猫在屋顶上\r\n"),
        ("big5", "一隻貓\r\n"),
        ("euc-kr", "고양이\r\n"),
        ("latin-1", "caf\xe9 \x81\r\n"),
        ("latin-1", "caf\xe9 \0\r\n"),
    ],
)
def test_other_encodings(encoding: str, text: str) -> None:
    """A text in another encoding, or without the line ends of Windows, is not taken for Windows-1252."""
    requests_file = read(text.encode(encoding), "txt")

    assert any("is not UTF-8" in line.reason for line in requests_file.bad_lines)
    assert requests_file.notes == []


@pytest.mark.parametrize("file_format", ["json", "jsonl"])
def test_json_is_utf_8(file_format: str) -> None:
    """JSON is UTF-8 by its definition, and no other encoding is guessed."""
    text = '["a café"]\r\n' if file_format == "json" else '{"prompt": "a café"}\r\n'

    assert errors_of(read(text.encode("cp1252"), file_format)) == [
        (1, "prompt", "prompt is not UTF-8: save the file in that encoding")
    ]


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
        *(
            ("csv", f"prompt,seed\na cat,{number}\n", 2, "seed", "must be an integer")
            for number in ("1_000", "1.5", "1.0e3", "nan", ".0", "1.0.0")
        ),
        *(
            ("jsonl", f'{{"prompt": "a cat", "seed": {number}}}', 1, "seed", "must be an integer")
            for number in ("1.5", "1e300", "9007199254740994.0", "Infinity", "true", '"1.0"')
        ),
        ("json", "", 1, "line", "not an array"),
        ("json", '{"prompt": "a cat"}', 1, "line", "a file with an object on each line is .jsonl"),
        ("json", "[\n1]", 2, "line", "not an object such as"),
        ("json", "[\n", 2, "line", "not valid JSON: Expecting value: line 2 column 1"),
        ("json", '[{"seed": 1, "seed": 2}]', 1, "line", "an object has the same name twice"),
        ("json", "[" * 100_000, 1, "line", "not valid JSON"),
        ("json", "[] []", 1, "line", "more follows after the array"),
        ("xlsx", b"", 1, "line", "not a readable .xlsx workbook, or protected by a password (BadZipFile)"),
        ("csv", "seed,\n1,0\n", 2, "line", "'0' is in a column without a name"),
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


@pytest.mark.parametrize(
    ("text", "lines", "bad_lines"),
    [
        ('[{"prompt": "a", "width": null},\r\n\r\n "b",\n]\n', [(1, "a"), (3, "b")], []),
        ("[]", [], []),
        ('["a"\n"b", "c"]', [(1, "a")], [2]),
        ('["a",\n"b" x, "c"]', [(1, "a"), (2, "b")], [2]),
        ('["a",\n{"promt": "b"}, "c",\n[], "d"]', [(1, "a"), (2, "c"), (3, "d")], [2, 3]),
    ],
)
def test_json_arrays(text: str, lines: list[tuple[int, str]], bad_lines: list[int]) -> None:
    """An array has objects or prompts, each with the line that it begins on; errors of syntax end it."""
    requests_file = read(text, "json")

    assert [(line.number, line.request.prompt) for line in requests_file.lines] == lines
    assert [line.number for line in requests_file.bad_lines] == bad_lines


@pytest.mark.parametrize("number", ["7", "7.0", "7.", "+7", "7.000"])
@pytest.mark.parametrize("file_format", ["csv", "jsonl", "json"])
def test_whole_numbers(file_format: str, number: str) -> None:
    """7.0 is an integer, as pandas writes those of columns with gaps, and means the same as 7."""
    json_number = number.strip("+") + "0" * number.endswith(".")
    item = f'{{"prompt": "a cat", "seed": {json_number}, "width": 64.0}}'
    text = {"csv": f"prompt,seed,width\na cat,{number},64.0\n", "jsonl": item, "json": f"[{item}]"}[file_format]
    (line,) = read(text, file_format).lines

    assert (line.request.seed, line.request.width) == (7, 64)
    assert type(line.request.seed) is int
    assert line.key == read("prompt,seed,width\na cat,7,64\n", "csv").lines[0].key


def test_row_numbers_of_pandas() -> None:
    """A first column without a name that counts the rows is ignored."""
    requests_file = read(",prompt,seed\n0,a cat,1.0\n1,a dog,\n", "csv")

    assert [(line.request.prompt, line.request.seed) for line in requests_file.lines] == [("a cat", 1), ("a dog", None)]


# ---------------------------------------------------------------------- workbooks


def workbook(*rows: list[Any], **further_sheets: list[list[Any]]) -> bytes:
    """Return the bytes of a workbook; a sheet whose name begins with "hidden" is hidden, and comes first."""
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Prompts"
    for row in rows:
        sheet.append(row)
    for name, further_rows in further_sheets.items():
        further = book.create_sheet(name, 0 if name.startswith("hidden") else None)
        further.sheet_state = "hidden" if name.startswith("hidden") else "visible"
        for row in further_rows:
            further.append(row)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def test_workbook() -> None:
    """A workbook is a table whose cells have the text that they show; empty rows are skipped, and counted."""
    data = workbook(
        ["Prompt", "seed", "width", "key", "extra"],
        ["a cat", 1.0, 64, 5, '{"upsampling": true}'],
        [],
        ["a dog", "2.0", None, True],
        ["an owl", 2.5],
        ["a fox", date(2026, 1, 2)],
        [7, None, None, 1.5],
    )
    requests_file = read(data, "xlsx")

    assert guess_format(data) == "xlsx"
    assert [(line.number, line.request) for line in requests_file.lines] == [
        (2, GenerationRequest("a cat", seed=1, width=64, key="5", extra={"upsampling": True})),
        (4, GenerationRequest("a dog", seed=2, key="True")),
        (7, GenerationRequest("7", key="1.5")),
    ]
    assert errors_of(requests_file) == [
        (5, "seed", "seed must be an integer, not '2.5'"),
        (6, "seed", "seed must be an integer, not '2026-01-02 00:00:00'"),
    ]
    assert requests_file.notes == []


def test_sheets_of_a_workbook() -> None:
    """The first sheet that isn't hidden is read, and named if there are others."""
    hidden = workbook(["prompt"], ["a cat"], hidden=[["seed"], [1]])
    two = workbook(["prompt"], ["a cat"], Notes=[["anything"]])

    for data, notes in ((hidden, []), (two, ["only its first sheet is read, 'Prompts'"])):
        requests_file = read(data, "xlsx")
        assert [line.request.prompt for line in requests_file.lines] == ["a cat"]
        assert requests_file.notes == notes


def test_errors_in_a_workbook() -> None:
    """A row with a formula that has failed is a bad one."""
    requests_file = read(workbook(["prompt", "seed"], ["a cat", "#REF!"], ["a dog", 1]), "xlsx")

    assert errors_of(requests_file) == [(2, "line", "a cell has the error #REF!")]
    assert [line.request.prompt for line in requests_file.lines] == ["a dog"]


def test_wrong_dimensions_of_a_workbook() -> None:
    """All cells are read, whatever the file says about the size of its sheet, as those of some programs do."""
    changed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(workbook(["prompt", "seed"], ["a cat", 1]))) as source,
        zipfile.ZipFile(changed, "w") as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b'ref="A1:B2"', b'ref="A1"'))
    (line,) = read(changed.getvalue(), "xlsx").lines

    assert (line.request.prompt, line.request.seed) == ("a cat", 1)


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


@given(st.sampled_from(FORMATS), st.one_of(st.binary(), st.text().map(str.encode)))
def test_arbitrary_bytes(file_format: str, data: bytes) -> None:
    """Any file is read into requests with unique keys and bad lines with reasons."""
    requests_file = read(data, file_format)

    assert all(line.request.key and line.request.prompt.strip() for line in requests_file.lines)
    assert len({line.key for line in requests_file.lines}) == len(requests_file.lines)
    assert all(line.reason for line in requests_file.bad_lines)


OBJECTS = st.dictionaries(st.sampled_from(["prompt", "seed", "key", "\n"]), st.none() | st.integers() | st.text())


@given(st.lists(OBJECTS | st.text()), st.none() | st.integers(0, 3), st.booleans())
def test_arrays_are_read_as_by_any_other_program(items: list[Any], indent: int | None, ascii_only: bool) -> None:
    """All items of an array are found, each on its own line, however the array is written."""
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    parsed = list(parse_json(text))
    expected = [
        {"prompt": item}
        if isinstance(item, str)
        else {name: value for name, value in item.items() if value is not None}
        for item in items
    ]

    assert [fields for _, fields in parsed] == expected
    starts = [json.dumps(item, indent=indent, ensure_ascii=ascii_only).split("\n")[0] for item in items]
    lines = text.split("\n")
    assert all(start in lines[number - 1] for (number, _), start in zip(parsed, starts, strict=True))
