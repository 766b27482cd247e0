"""Tables: coded columns and their splits, against plain Python; and 30 tables that are wrong."""

import csv
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pytest

from reptile.data.coding import NumberCoding
from reptile.data.dataset import PreparedData, load_prepared
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.settings import PrepareSettings

TASKS, ROWS = 12, 6
HEADER = ["person", "when", "dose", "kind", "result"]
TABLE = {"task": "person", "inputs": ["when", "dose", "kind"], "targets": ["result"]}


def rows_of(tasks: int = TASKS, rows: int = ROWS) -> list[list[str]]:
    rng = np.random.default_rng(0)
    return [
        [
            f"p{task:02}",
            f"2024-01-{1 + rows - row:02}",  # from the last to the first
            f"{rng.normal(50, 10):.3f}",
            "abc"[(task + row) % 3],
            f"{rng.normal(-3, 0.1):.4f}",
        ]
        for row in range(rows)
        for task in range(tasks)
    ]


def write(
    path: Path, rows: list[list[str]], header: list[str] = HEADER, separator: str = ","
) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


def settings_of(path: Path, table: object = TABLE, **changes: object) -> PrepareSettings:
    values: dict[str, object] = {
        "source": str(path),
        "cross_domain": (),
        "images_per_class": ROWS,
        "validation": 2,
        "test": 3,
        "table": table,
        **changes,
    }
    return PrepareSettings.model_validate(values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "doses.csv", rows_of())


@pytest.fixture
def data(path: Path, tmp_path: Path) -> PreparedData:
    return prepare(settings_of(path, order="when"), tmp_path / "out")


def training_rows(data: PreparedData) -> list[list[str]]:
    names = {c.name for c in data.classes if c.split == "train"}
    return [row for row in rows_of() if row[0] in names]


def test_whole_tasks_are_held_out_and_their_rows_are_in_order(data: PreparedData) -> None:
    assert [c.name for c in data.classes] == [f"p{task:02}" for task in range(TASKS)]
    splits = [c.split for c in data.classes]
    assert [splits.count(each) for each in ("train", "validation", "test")] == [7, 2, 3]
    assert data.index.ordered and data.split("test").ordered
    assert data.images.dtype == np.float32 and data.images.shape == (TASKS * ROWS, 6)
    assert (np.diff(data.images[:, 0].reshape(TASKS, ROWS)) > 0).all()


def test_the_numbers_are_those_of_plain_python(data: PreparedData) -> None:
    """Numbers and dates standardised by the training rows; a place for each category."""

    def scaled(column: int, read: Callable[[str], float]) -> dict[str, float]:
        values = np.array([read(row[column]) for row in training_rows(data)])
        return {
            row[column]: (read(row[column]) - values.mean()) / values.std() for row in rows_of()
        }

    when = scaled(1, lambda text: datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())
    dose, result = scaled(2, float), scaled(4, float)
    rows = sorted(rows_of(), key=lambda row: (row[0], row[1]))
    expected = [
        [when[row[1]], dose[row[2]], *(float(row[3] == each) for each in "abc"), 0] for row in rows
    ]
    coding = data.index.coding
    assert coding is not None
    order = [*range(2), *(2 + "abc".index(each) for each in coding.inputs[2].categories), 5]  # type: ignore[union-attr]
    assert np.allclose(data.images, np.array(expected)[:, order], atol=1e-5)
    assert data.targets is not None
    assert np.allclose(data.targets[:, 0], [result[row[4]] for row in rows], atol=1e-5)


def test_the_stored_coding_gives_the_same_numbers(data: PreparedData, tmp_path: Path) -> None:
    coding = load_prepared(tmp_path / "out").index.coding
    assert coding is not None and [each.column for each in coding.inputs] == TABLE["inputs"]
    rows = sorted(rows_of(), key=lambda row: (row[0], row[1]))
    moments = np.array([row[1] for row in rows], "datetime64[s]").astype(np.float64)
    columns = {
        "when": moments,
        "dose": np.array([float(row[2]) for row in rows]),
        "kind": np.array([row[3] for row in rows], object),
        "result": np.array([float(row[4]) for row in rows]),
    }
    assert data.targets is not None
    assert np.array_equal(coding.encode_inputs(columns), data.images)
    assert np.array_equal(coding.encode_targets(columns), data.targets)


def test_held_out_rows_do_not_move_the_coding(data: PreparedData, tmp_path: Path) -> None:
    held_out = {c.name for c in data.classes if c.split != "train"}
    rows = [[*row[:4], "1e6"] if row[0] in held_out else row for row in rows_of()]
    rows = [[*row[:3], "new", row[4]] if row[0] in held_out else row for row in rows]
    other = prepare(
        settings_of(write(tmp_path / "doses.csv", rows), order="when"), tmp_path / "two"
    )
    assert other.index.coding == data.index.coding
    for c in other.classes:
        coded = other.images[c.start : c.start + c.count]
        assert coded[:, -1].all() == (c.split != "train")  # `other`


def test_a_table_gives_the_same_bytes_again_and_in_any_order_of_rows(
    data: PreparedData, tmp_path: Path
) -> None:
    again = prepare(settings_of(tmp_path / "doses.csv", order="when"), tmp_path / "again")
    assert again.index == data.index
    mixed = rows_of()
    np.random.default_rng(1).shuffle(mixed)
    write(tmp_path / "doses.csv", mixed)
    shuffled = prepare(settings_of(tmp_path / "doses.csv", order="when"), tmp_path / "mixed")
    assert np.array_equal(shuffled.images, data.images)


@pytest.mark.parametrize("form", ["semicolon", "tab", "decimal comma", "bom", "crlf", "parquet"])
def test_the_form_of_the_file_does_not_matter(
    data: PreparedData, tmp_path: Path, form: str
) -> None:
    table: dict[str, object] = {**TABLE}
    path = tmp_path / "copies" / "doses.csv"
    path.parent.mkdir()
    if form == "parquet":
        path = path.with_suffix(".parquet")
        duckdb.sql(f"COPY (FROM read_csv('{tmp_path / 'doses.csv'}')) TO '{path}'")
    elif form == "tab":
        path = write(path.with_suffix(".tsv"), rows_of(), separator="\t")
    elif form == "semicolon":
        write(path, rows_of(), separator=";")
    elif form == "decimal comma":
        commas = [[cell.replace(".", ",") for cell in row] for row in rows_of()]
        write(path, commas, separator=";")
        table["decimal"] = ","
    else:
        text = (tmp_path / "doses.csv").read_text()
        ends = text.replace("\r\n", "\n").replace("\n", "\r\n" if form == "crlf" else "\n")
        path.write_bytes(("\ufeff" * (form == "bom") + ends).encode())
    other = prepare(settings_of(path, table, order="when"), tmp_path / "other")
    assert other.content_sha256 == data.content_sha256
    assert other.index.coding == data.index.coding


@pytest.mark.parametrize("form", ["text", "parquet"])
def test_a_moment_is_the_same_in_every_offset_and_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    offsets = ["", "Z", "+00:00", "+02:00", "-05:30"]
    rows = [
        [row[0], f"{row[1]}T{number % 24:02}:30:00{offsets[number % 5]}", *row[2:]]
        for number, row in enumerate(rows_of())
    ]
    path = write(tmp_path / "doses.csv", rows)
    if form == "parquet":
        path = path.with_suffix(".parquet")
        duckdb.sql(
            "SET TimeZone = 'UTC'; "
            f'COPY (SELECT person, "when"::TIMESTAMPTZ AS "when", dose, kind, result FROM '
            f"read_csv('{tmp_path / 'doses.csv'}', all_varchar = true)) TO '{path}'; "
        )
    data = prepare(settings_of(path), tmp_path / "out")
    monkeypatch.undo()
    time.tzset()
    assert data.index.coding is not None
    coding = data.index.coding.inputs[0]
    assert isinstance(coding, NumberCoding) and coding.kind == "date"
    moments = [datetime.fromisoformat(row[1]) for row in sorted(rows, key=lambda row: row[0])]
    seconds = [(each if each.tzinfo else each.replace(tzinfo=UTC)).timestamp() for each in moments]
    restored = data.images[:, 0].astype(np.float64) * coding.deviation + coding.mean
    assert np.allclose(restored, seconds, rtol=0, atol=0.2)


def test_what_is_missing_is_filled_or_left_out_if_the_settings_say_so(tmp_path: Path) -> None:
    rows = rows_of(rows=ROWS + 1)
    rows[0][2], rows[1][3], rows[2][4], rows[3][0] = "NA", "", "nan", ""
    path = write(tmp_path / "doses.csv", rows)
    data = prepare(settings_of(path, {**TABLE, "missing": "fill"}), tmp_path / "out")
    assert len(data.images) == len(rows) - 2
    starts = [c.start for c in data.classes]
    assert data.images[starts[0], 1] == 0  # the mean
    assert data.images[starts[1], -1] == 1  # `other`


def test_tasks_with_too_few_rows_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "doses.csv", [*rows_of(), ["late", "2024-01-01", "1", "a", "1"]])
    data = prepare(settings_of(path), tmp_path / "out")
    assert len(data.classes) == TASKS
    assert "1 of 13 with fewer rows than images_per_class = 6 (late)" in caplog.text


def test_a_category_of_one_task_alone_is_other(tmp_path: Path) -> None:
    rows = [[*row[:3], f"only {row[0]}" if row[3] == "c" else row[3], row[4]] for row in rows_of()]
    data = prepare(settings_of(write(tmp_path / "doses.csv", rows)), tmp_path / "out")
    assert data.index.coding is not None
    assert set(data.index.coding.inputs[2].categories) == {"a", "b"}  # type: ignore[union-attr]


@pytest.mark.parametrize("type_", ["BIGINT", "UBIGINT", "VARCHAR"])
def test_large_numbers_that_name_tasks_are_not_rounded(tmp_path: Path, type_: str) -> None:
    """Two people whose numbers are one as floating-point numbers would be joined in silence."""
    rows = [[str(2**53 + int(row[0][1:])), *row[1:]] for row in rows_of()]
    write(tmp_path / "doses.csv", rows)
    expected = prepare(settings_of(tmp_path / "doses.csv"), tmp_path / "out")
    assert len({c.name for c in expected.classes}) == TASKS
    path = tmp_path / "copies" / "doses.parquet"
    path.parent.mkdir()
    duckdb.sql(
        f"COPY (SELECT * REPLACE (person::{type_} AS person) "
        f"FROM read_csv('{tmp_path / 'doses.csv'}', all_varchar = true)) TO '{path}'"
    )
    data = prepare(settings_of(path), tmp_path / "out")
    assert data.content_sha256 == expected.content_sha256
    assert data.splits_sha256 == expected.splits_sha256


def test_large_numbers_that_are_categories_or_classes_are_not_rounded(tmp_path: Path) -> None:
    path = tmp_path / "doses.parquet"
    duckdb.sql(
        "COPY (SELECT i // 6 AS person, i AS dose, 9007199254740992 + i % 3 AS kind, i * i AS "
        f"result FROM range(72) AS all_rows(i)) TO '{path}'"
    )
    names = [str(9007199254740992 + each) for each in range(3)]
    table = {"task": "person", "inputs": ["dose", "kind"], "targets": ["result"]}
    data = prepare(settings_of(path, {**table, "categories": ["kind"]}), tmp_path / "out")
    assert data.index.coding is not None
    kinds = data.index.coding.inputs[1]
    assert kinds.kind == "category" and sorted(kinds.categories) == names
    table = {"inputs": ["dose"], "targets": ["kind"], "kind": "classes"}
    data = prepare(settings_of(path, table, validation=1, test=1), tmp_path / "out")
    assert [c.name for c in data.classes] == names


def test_days_that_are_tasks_have_the_names_that_text_gives_them(tmp_path: Path) -> None:
    table = {"task": "when", "inputs": ["dose"], "targets": ["result"]}
    write(tmp_path / "doses.csv", rows_of())
    duckdb.sql(f"COPY (FROM read_csv('{tmp_path / 'doses.csv'}')) TO '{tmp_path / 'd.parquet'}'")
    names = [
        [c.name for c in prepare(settings_of(path, table, validation=1), tmp_path / "out").classes]
        for path in (tmp_path / "doses.csv", tmp_path / "d.parquet")
    ]
    assert names == [[f"2024-01-{day:02}" for day in range(2, 8)]] * 2


def test_codes_are_categories_where_the_settings_say_so(tmp_path: Path) -> None:
    rows = [[*row[:3], str("abc".index(row[3])), row[4]] for row in rows_of()]
    path = write(tmp_path / "doses.csv", rows)
    assert prepare(settings_of(path), tmp_path / "out").image_shape == (3,)
    codes = prepare(settings_of(path, {**TABLE, "categories": ["kind"]}), tmp_path / "out")
    assert codes.image_shape == (6,)


def test_classes_of_a_group_are_held_out_with_it(tmp_path: Path) -> None:
    rows = rows_of(rows=3 * ROWS)
    table = {**TABLE, "inputs": ["dose"], "targets": ["kind"], "kind": "classes"}
    data = prepare(settings_of(write(tmp_path / "doses.csv", rows), table), tmp_path / "out")
    assert data.targets is None and data.values == 0 and data.images.dtype == np.float32
    assert [c.name for c in data.classes[:3]] == ["p00/a", "p00/b", "p00/c"]
    for group in {c.group for c in data.classes}:
        assert len({c.split for c in data.classes if c.group == group}) == 1
    expected = [float(row[2]) for row in rows if row[0] == "p00" and row[3] == "a"]
    raw = data.index.coding.inputs[0]  # type: ignore[union-attr]
    assert np.allclose(data.images[:ROWS, 0] * raw.deviation + raw.mean, expected, atol=1e-4)  # type: ignore[union-attr]
    labels = {**table, "task": ""}
    alone = prepare(
        settings_of(tmp_path / "doses.csv", labels, validation=1, test=1), tmp_path / "out"
    )
    assert [c.name for c in alone.classes] == ["a", "b", "c"]


def test_a_list_of_tasks_may_be_held_out(path: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "split.json"
    chosen.write_text(json.dumps({"validation": ["p03"], "test": ["p00", "p11"]}))
    data = prepare(settings_of(path, held_out=str(chosen)), tmp_path / "out")
    assert {c.name for c in data.classes if c.split == "test"} == {"p00", "p11"}


def test_a_name_that_looks_like_a_pattern_or_holds_quotes_is_a_name(tmp_path: Path) -> None:
    header = ['person "x"', "when", "dose'; --", "kind", "result"]
    path = write(tmp_path / "it's [all]*.csv", rows_of(), header)
    table = {"task": header[0], "inputs": [header[2]], "targets": ["result"]}
    assert len(prepare(settings_of(path, table), tmp_path / "out").images) == TASKS * ROWS


Wrong = Callable[[Path], object]


def cells(column: str, value: str, where: int = 3) -> Wrong:
    def spoil(path: Path) -> None:
        rows = rows_of()
        rows[where][HEADER.index(column)] = value
        write(path, rows)

    return spoil


def all_cells(column: str, value: Callable[[str], str]) -> Wrong:
    def spoil(path: Path) -> None:
        place = HEADER.index(column)
        write(path, [[*row[:place], value(row[place]), *row[place + 1 :]] for row in rows_of()])

    return spoil


def content(change: Callable[[bytes], bytes]) -> Wrong:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def renamed(*header: str) -> Wrong:
    return lambda path: write(path, rows_of(), list(header))


def nothing(path: Path) -> None:
    pass


def table(**changes: object) -> dict[str, object]:
    return {"table": {**TABLE, **changes}}


WRONG: dict[str, tuple[Wrong, dict[str, object], str]] = {
    "no file": (Path.unlink, {}, "no such file"),
    "empty": (content(lambda _: b""), {}, "the first line is empty"),
    "an empty first line": (content(lambda text: b"\r\n" + text), {}, "the first line is empty"),
    "a header alone": (lambda path: write(path, []), {}, "no rows below the header"),
    "Latin-1": (
        content(lambda text: text.replace(b"p03", "Zoë".encode("latin-1"))),
        {},
        "line 5 is not UTF-8",
    ),
    "Latin-1 in the header": (
        content(lambda text: text.replace(b"dose", "dösis".encode("latin-1"))),
        {},
        "the header is not UTF-8",
    ),
    "UTF-16": (content(lambda text: text.decode().encode("utf-16")), {}, "is not UTF-8"),
    "another separator": (
        content(lambda text: text.replace(b",", b"#")),
        {},
        "no column 'person'; its columns are 'person#when",
    ),
    "lines that end in CR": (
        content(lambda text: text.replace(b"\r\n", b"\r")),
        {},
        "the first line cannot be read as a header",
    ),
    "a header without an end": (
        content(lambda text: b'"' + b"x" * 200_000 + b'",' + text),
        {},
        "the first line cannot be read as a header",
    ),
    "a held-out number too large": (
        lambda path: write(
            path,
            [[*row[:2], "1e308" if row[0] == "p00" else row[2], *row[3:]] for row in rows_of()],
        ),
        {},
        "far outside of the training split's; correct it",
    ),
    "windows": (nothing, {"windows": {"length": 2, "step": 1}}, "prepare.windows: is for arrays"),
    "a column is missing": (
        renamed("person", "when", "dosis", "kind", "result"),
        {},
        "no column 'dose'; its columns are 'person', 'when', 'dosis', 'kind', 'result'",
    ),
    "no header": (content(lambda text: text.split(b"\n", 1)[1]), {}, "no column 'person'"),
    "a column is there twice": (
        renamed("person", "dose", "dose", "kind", "result"),
        table(inputs=["dose"]),
        "column 'dose' is there 2 times",
    ),
    "a short row": (content(lambda text: text[:-12] + b"\r\n"), {}, "line 73 has 3 columns"),
    "a long row": (content(lambda text: text + b"p1,2,3,4,5,6\r\n"), {}, "line 74 has 6 columns"),
    "a quotation mark is open": (
        content(lambda text: text + b'p1,"2024,3,a,1\r\n'),
        {},
        "line 74 has a quotation mark that is never closed",
    ),
    "line ends of two kinds": (
        content(lambda text: text.replace(b"\r\n", b"\n", 5)),
        {},
        "its lines end in several ways",
    ),
    "decimal commas": (
        all_cells("dose", lambda cell: cell.replace(".", ",")),
        {},
        r"column 'dose', row 1: '5\d,\d+' is no number; .* prepare.table.decimal to ','",
    ),
    "thousands": (
        all_cells("result", lambda cell: "1,234.5"),
        {},
        "'1,234.5' is no number; write numbers without thousands",
    ),
    "a word among numbers": (
        cells("dose", "lots"),
        {},
        "column 'dose', row 4: 'lots' is no number; correct it, or name the column in",
    ),
    "a word among targets": (cells("result", "bad"), {}, "'result', row 4: 'bad' is no number"),
    "words as targets": (all_cells("result", lambda _: "bad"), {}, "'bad' is no number"),
    "a date that does not exist": (
        cells("when", "2024-02-30"),
        {},
        "column 'when', row 4: '2024-02-30' is no date",
    ),
    "dates of another form": (
        all_cells("when", lambda cell: ".".join(reversed(cell.split("-")))),
        {},
        r"column 'when', row 1: '\d\d.01.2024' is no date; write dates as 2024-12-31",
    ),
    "an infinite number": (cells("dose", "inf"), {}, "column 'dose', row 4: .* not finite"),
    "an infinite target": (cells("result", "-Infinity"), {}, "'result', row 4: .* not finite"),
    "a missing number": (cells("dose", "NaN"), {}, "column 'dose' has no value in row 4; set"),
    "a missing category": (cells("kind", ""), {}, "column 'kind' has no value in row 4; set"),
    "a missing target": (cells("result", "NA"), {}, "column 'result' has no value in row 4"),
    "a missing task": (cells("person", " "), {}, "column 'person' has no value in row 4"),
    "an empty column": (
        all_cells("dose", lambda _: ""),
        table(missing="fill"),
        "column 'dose' is empty",
    ),
    "a constant number": (all_cells("dose", lambda _: "7"), {}, "'dose' has one value alone"),
    "a constant category": (all_cells("kind", lambda _: "a"), {}, "'kind' has one value alone"),
    "a constant target": (all_cells("result", lambda _: "0"), {}, "'result' has one value alone"),
    "one task": (all_cells("person", lambda _: "p"), {}, "1 task in all; training and test need"),
    "two tasks": (
        lambda path: write(path, rows_of(tasks=2)),
        {},
        "3 for test and 2 for validation .* leave none of 2 classes for training",
    ),
    "tasks too short": (
        nothing,
        {"images_per_class": 7},
        "12 of 12 with fewer rows than images_per_class = 7 .* at least 2 must remain",
    ),
    "names for categories": (
        lambda path: write(path, [[*row[:3], row[0], row[4]] for row in rows_of()]),
        {},
        "column 'kind': no category is in two tasks",
    ),
    "numbers too large": (
        lambda path: write(path, [[*row[:2], f"{row[2]}e300", *row[3:]] for row in rows_of()]),
        {},
        "column 'dose': its values have no finite variance",
    ),
    "a control character in a name": (
        cells("person", "p\x1b[1m"),
        {"images_per_class": 1},
        "cannot be shown",
    ),
    "an order of words": (nothing, {"order": "kind"}, "column 'kind', row 1: 'a' is no number"),
    "no inputs": (nothing, table(inputs=[]), "prepare.table.inputs is empty"),
    "no task": (nothing, table(task=""), "prepare.table.task is empty"),
    "another domain": (nothing, {"cross_domain": ["digits"]}, "set prepare.cross_domain to"),
    "no Parquet": (
        lambda path: path.rename(path.with_suffix(".parquet")),
        {"source": "doses.parquet"},
        "is no Parquet file",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_one_sentence_and_writes_nothing(
    case: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, changes, sentence = WRONG[case]
    monkeypatch.chdir(tmp_path)
    spoil(path)
    before = sorted(tmp_path.iterdir())
    settings = settings_of(path, **changes)
    with pytest.raises(InputError, match=sentence) as error:
        prepare(settings, tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inputs": ["dose", "result"]}, "the target 'result' is among the inputs"),
        ({"inputs": ["dose", "dose"]}, "column 'dose' is named twice"),
        ({"inputs": ["person"]}, "column 'person' is named twice"),
        ({"categories": ["sort"]}, "'sort' is none of the inputs"),
        ({"kind": "classes", "targets": ["a", "b"]}, "takes one column"),
    ],
)
def test_wrong_settings_are_said_without_reading_the_table(
    changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        settings_of(Path("none.csv"), {**TABLE, **changes})
