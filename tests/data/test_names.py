"""One name for one class, whether it comes out of a folder, a zip, a list of splits or labels."""

import json
import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from reptile.data.arrays import from_arrays
from reptile.data.prepare import prepare
from reptile.data.readers.open import open_source
from reptile.errors import InputError
from reptile.settings import PrepareSettings

NAMES = ["café", "Öl", "garçon", "über", "猫", "Ελλάδα", "می‌خواهم", "👩‍🌾", "a b", "한국"]
WESTERN = [name for name in NAMES if name.isascii() or max(name) < "\u0100"]

Entry = tuple[bytes, bytes]  # a name as it is written, and extra fields


def png(seed: int) -> bytes:
    content = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def images(names: list[str]) -> dict[str, bytes]:
    return {f"{name}/{i}.png": png(4 * n + i) for n, name in enumerate(names) for i in range(4)}


def write_zip(
    path: Path,
    files: dict[str, bytes],
    entry: Callable[[str], Entry],
    system: int = 3,
    flag: int = 0,
) -> Path:
    """Write a stored zip field by field, so that names can be in any encoding."""
    body, central = b"", b""
    for text, content in files.items():
        name, extra = entry(text)
        head = struct.pack(
            "<HHHHHIIIHH",
            *(20, flag, 0, 0, 0x5A21, zlib.crc32(content)),
            *(len(content), len(content), len(name), len(extra)),
        )
        attributes = (stat.S_IFREG | 0o644) << 16
        central += b"PK\1\2" + struct.pack("<BB", 21, system) + head
        central += struct.pack("<HHHII", 0, 0, 0, attributes, len(body)) + name + extra
        body += b"PK\3\4" + head + name + extra + content
    end = struct.pack("<HHHHIIH", 0, 0, len(files), len(files), len(central), len(body), 0)
    path.write_bytes(body + central + b"PK\5\6" + end)
    return path


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def unicode_path(written: bytes, name: str, version: int = 1) -> bytes:
    data = struct.pack("<BI", version, zlib.crc32(written)) + name.encode()
    return b"UT\5\0\1abcd" + struct.pack("<HH", 0x7075, len(data)) + data


def with_field(encoding: str) -> Callable[[str], Entry]:
    def entry(name: str) -> Entry:
        written = name.encode(encoding, "replace")
        return written, unicode_path(written, name)

    return entry


def decomposed(name: str) -> Entry:
    return unicodedata.normalize("NFD", name).encode(), b""


def plain(name: str) -> Entry:
    return name.encode(), b""


ZIPS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "Info-ZIP on Linux": lambda path, files: write_zip(path, files, plain),
    "with the UTF-8 flag": lambda path, files: write_zip(path, files, plain, 0, 0x800),
    "Finder": lambda path, files: write_zip(path, files, decomposed, 3),
    "ditto": lambda path, files: write_zip(path, files, decomposed, 19),
    "7-Zip and WinRAR": lambda path, files: write_zip(path, files, with_field("cp850"), 0),
    "Info-ZIP with Latin-1": lambda path, files: write_zip(path, files, with_field("latin-1")),
}


def held_out(source: Path, out: Path, names: list[str]) -> tuple[list[tuple[str, str]], str]:
    settings = PrepareSettings(
        source=str(source),
        cross_domain=(),
        image_size=4,
        held_out="classes",
        validation=2,
        test=3,
        rotations=False,
        images_per_class=4,
    )
    data = prepare(settings, out)
    assert {c.name for c in data.classes} == set(names)
    return [(c.name, c.split) for c in data.classes], data.content_sha256


@pytest.mark.parametrize("kind", ZIPS)
def test_a_zip_has_the_classes_splits_and_images_of_its_folder(tmp_path: Path, kind: str) -> None:
    files = images(NAMES)
    folder = held_out(write_folder(tmp_path / "birds", files), tmp_path / "out", NAMES)
    assert held_out(ZIPS[kind](tmp_path / "birds.zip", files), tmp_path / "out", NAMES) == folder


def test_a_decomposed_folder_has_the_same_classes_and_images(tmp_path: Path) -> None:
    files = images(NAMES)
    other = {unicodedata.normalize("NFD", name): content for name, content in files.items()}
    assert list(other) != list(files)
    composed = held_out(write_folder(tmp_path / "a/birds", files), tmp_path / "out", NAMES)
    assert held_out(write_folder(tmp_path / "b/birds", other), tmp_path / "out", NAMES) == composed


def test_images_come_in_one_order_however_their_names_are_spelt(tmp_path: Path) -> None:
    names = ["ä.png", "b.png", "z.png", "é.png"]
    files = {f"c/{name}": png(n) for n, name in enumerate(names)}
    wanted = None
    for form in ("NFC", "NFD"):
        spelt = {unicodedata.normalize(form, name): content for name, content in files.items()}
        with open_source(str(write_folder(tmp_path / form, spelt))) as source:
            (c,) = source.classes
            read = [np.asarray(source.read(file)).tolist() for file in c.files]
        assert wanted in (None, read)
        wanted = read


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_list_of_splits_may_spell_names_in_either_way(
    tmp_path: Path, form: Literal["NFC", "NFD"]
) -> None:
    chosen = tmp_path / "mine.json"
    chosen.write_text(json.dumps({"test": [unicodedata.normalize(form, "café")]}))
    source = write_zip(tmp_path / "birds.zip", images(NAMES), decomposed)
    settings = PrepareSettings(
        source=str(source), cross_domain=(), held_out=str(chosen), images_per_class=4
    )
    data = prepare(settings, tmp_path / "out")
    assert {c.name for c in data.classes if c.split == "test"} == {"café"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_list_files_beside_images_may_spell_names_in_either_way(
    tmp_path: Path, form: Literal["NFC", "NFD"]
) -> None:
    other: Literal["NFC", "NFD"] = "NFD" if form == "NFC" else "NFC"
    root = write_folder(
        tmp_path / "images",
        {unicodedata.normalize(form, n): c for n, c in images(["café", "Öl", "b"]).items()},
    )
    for name, label in [("train", "café"), ("val", "b"), ("test", "Öl")]:
        rows = "".join(f"{i}.png,{label}\n" for i in range(4))
        text = unicodedata.normalize(other, f"filename,label\n{rows}")
        (root / f"{name}.csv").write_text(text, encoding="utf-8")
    with open_source(str(root)) as source:
        assert [(c.name, len(c.files)) for c in source.classes] == [
            ("b", 4),
            ("café", 4),
            ("Öl", 4),
        ]
        assert source.published == {"café": "train", "b": "validation", "Öl": "test"}


def test_labels_of_arrays_are_the_same_classes(tmp_path: Path) -> None:
    folder, _ = held_out(write_folder(tmp_path / "birds", images(NAMES)), tmp_path / "out", NAMES)
    labels = [unicodedata.normalize("NFD", name) for name in NAMES for _ in range(4)]
    inputs = np.zeros((len(labels), 2), np.float32)
    data = from_arrays(inputs, labels, splits={"validation": 2, "test": 3})
    assert sorted((c.name, c.split) for c in data.classes) == sorted(folder)


def test_spaces_at_the_ends_are_no_part_of_a_name(tmp_path: Path) -> None:
    """Windows and the reader of tables drop them; the same class must not become two."""
    folder, _ = held_out(write_folder(tmp_path / "a/birds", images(NAMES)), tmp_path / "out", NAMES)
    padded = {f" {name}\u00a0": name for name in NAMES}
    files = images(list(padded))
    for source in (
        write_folder(tmp_path / "b/birds", files),
        write_zip(tmp_path / "birds.zip", files, plain),
    ):
        assert held_out(source, tmp_path / "out", NAMES)[0] == folder
    labels = [name for name in padded for _ in range(4)]
    inputs = np.zeros((len(labels), 2), np.float32)
    splits = {"validation": [" Öl "], "test": ["\u3000猫"]}
    data = from_arrays(inputs, labels, splits=splits)  # type: ignore[arg-type]
    assert {c.name: c.split for c in data.classes if c.split != "train"} == {
        "Öl": "validation",
        "猫": "test",
    }


def test_two_folders_that_differ_in_spaces_or_a_folder_of_spaces_are_refused(
    tmp_path: Path,
) -> None:
    for names, message in (
        (["cat", "cat "], "two class folders are called cat; rename one"),
        (["cat", " "], "the folder 'birds/ ' has no name but spaces"),
        (["cat/a", " /b"], "the folder 'birds/ /b' has no name but spaces"),
    ):
        files = {f"birds/{name}": content for name, content in images(names).items()}
        path = write_zip(tmp_path / "a.zip", files, plain)
        with pytest.raises(InputError, match=message), open_source(str(path)):
            pass


def split_folders(root: Path, one: str, other: str) -> dict[str, object]:
    names = [f"train/{one}", "train/b", f"test/{other}", "test/c"]
    return {"source": write_folder(root / "birds", images(names)), "held_out": "published"}


def split_lists(root: Path, one: str, other: str) -> dict[str, object]:
    folder = write_folder(root / "birds", images([one, other, "b"]))
    for name, label in [("train", one), ("val", "b"), ("test", other)]:
        rows = [f"{i}.png,{label}" for i in range(4)]
        (folder / f"{name}.csv").write_text("\n".join(["filename,label", *rows]))
    return {"source": folder, "held_out": "published"}


def groups_of_folders(root: Path, one: str, other: str) -> dict[str, object]:
    names = [f"{group}/{letter}" for group in (one, other, "g", "h") for letter in "ab"]
    return {"source": write_folder(root / "letters", images(names)), "held_out": "groups"}


def tasks_of_a_table(root: Path, one: str, other: str) -> dict[str, object]:
    rows = [f"{name},{i},{i * i}" for name in (one, other, "b", "c", "d") for i in range(4)]
    (root / "doses.csv").write_text("\n".join(["person,dose,result", *rows]))
    table = {"task": "person", "inputs": ["dose"], "targets": ["result"]}
    return {"source": root / "doses.csv", "table": table}


def tasks_of_arrays(root: Path, one: str, other: str) -> dict[str, object]:
    tasks = np.repeat([one, other, "b", "c", "d"], 4)
    rows = np.arange(20, dtype=np.float32)
    np.savez(root / "a.npz", inputs=rows[:, None], targets=rows, tasks=tasks)
    return {"source": root / "a.npz"}


def groups_of_arrays(root: Path, one: str, other: str) -> dict[str, object]:
    groups = np.repeat([one, other, "b", "c", "d"], 4)
    inputs = np.zeros((20, 2), np.float32)
    np.savez(root / "a.npz", inputs=inputs, labels=np.arange(20) // 2, groups=groups)
    return {"source": root / "a.npz", "images_per_class": 2}


HELD_OUT = (
    split_folders,
    split_lists,
    groups_of_folders,
    tasks_of_a_table,
    tasks_of_arrays,
    groups_of_arrays,
)
PAIRS = [
    ("Anna", "anna"),
    ("7", "07"),
    ("7", "7.0"),
    ("0012", "12.00"),
    ("golden_retriever", "Golden retriever"),
    ("P-01", "p_01"),
    ("straße", "STRASSE"),
    ("\ufb01sh", "fish"),
]


@pytest.mark.parametrize("form", HELD_OUT, ids=lambda form: form.__name__)
@pytest.mark.parametrize(("one", "other"), PAIRS, ids="-".join)
def test_what_may_be_one_in_two_spellings_is_not_trained_and_tested_on(
    tmp_path: Path, form: Callable[[Path, str, str], dict[str, object]], one: str, other: str
) -> None:
    """One person in training and in test is a leak that no figure shows."""

    def settings(one: str, other: str) -> PrepareSettings:
        values = {"cross_domain": (), "images_per_class": 4, "validation": 1, "test": 1}
        made = form(tmp_path, one, other)
        return PrepareSettings.model_validate(values | made | {"source": str(made["source"])})

    with pytest.raises(InputError, match="may be one in two spellings") as caught:
        prepare(settings(one, other), tmp_path / "out")
    assert all(
        repr(unicodedata.normalize("NFC", name)) in str(caught.value) for name in (one, other)
    )
    assert not (tmp_path / "out").exists()


def test_two_names_that_one_split_has_are_two_classes(tmp_path: Path) -> None:
    """Capital and small letters are; so are characters that hexadecimal numbers name."""
    names = ["train/A", "train/a", "test/A", "test/a", "train/0e01", "train/0e02", "test/0e001"]
    with open_source(str(write_folder(tmp_path / "letters", images(names)))) as source:
        assert [c.name for c in source.classes] == ["0e001", "0e01", "0e02", "A", "a"]


def in_code_page(encoding: str, system: int) -> Callable[[Path], Path]:
    return lambda path: write_zip(
        path, images(WESTERN), lambda name: (name.encode(encoding), b""), system
    )


UNKNOWN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "Windows, Western Europe": (in_code_page("cp1252", 0), r"b'caf\\xe9/0\.png'"),
    "DOS, Western Europe": (in_code_page("cp850", 0), r"b'caf\\x82/0\.png'"),
    "Linux in Latin-1": (in_code_page("latin-1", 3), r"b'caf\\xe9/0\.png'"),
    "Windows, Chinese": (
        lambda path: write_zip(path, images(["猫"]), lambda name: (name.encode("gbk"), b""), 0),
        r"b'\\xc3\\xa8/0\.png'",  # which would be è in UTF-8
    ),
    "a field of another name": (
        lambda path: write_zip(
            path, images(["é"]), lambda name: (b"\x82/0.png", unicode_path(b"other", name)), 0
        ),
        r"b'\\x82/0\.png'",
    ),
    "a field of another version": (
        lambda path: write_zip(
            path,
            images(["é"]),
            lambda name: (name.encode("cp850"), unicode_path(name.encode("cp850"), name, 2)),
        ),
        r"b'\\x82/0\.png'",
    ),
    "a flag that lies": (
        lambda path: write_zip(
            path, images(["é"]), lambda name: (name.encode("latin-1"), b""), 3, 0x800
        ),
        r"b'\\xe9/0\.png' is marked as UTF-8 and is not",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_name_in_an_unknown_encoding_is_refused_with_its_bytes(tmp_path: Path, case: str) -> None:
    make, message = UNKNOWN[case]
    with (
        pytest.raises(InputError, match=message) as caught,
        open_source(str(make(tmp_path / "birds.zip"))),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_tricks_in_the_field_of_the_name_are_refused_as_in_the_name(tmp_path: Path) -> None:
    for name in ("../é/1.png", "é/../../1.png", "é\\1.png", "/é.png"):
        path = write_zip(
            tmp_path / "a.zip",
            {name: png(0)},
            lambda name: (b"\xe9.png", unicode_path(b"\xe9.png", name)),
        )
        with pytest.raises(InputError, match="unsafe path"), open_source(str(path)):
            pass


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\n", "a\u202eb", "\u2066x", "a\x7f"])
def test_what_cannot_be_shown_is_refused(tmp_path: Path, name: str) -> None:
    source = write_zip(tmp_path / "a.zip", {f"{name}/1.png": png(0)}, plain)
    with pytest.raises(InputError, match="cannot be shown") as caught, open_source(str(source)):
        pass
    assert str(caught.value).isprintable()


def test_a_folder_whose_name_is_no_utf_8_is_refused_with_its_bytes(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/birds/caf\xe9"
    try:
        os.makedirs(folder)  # noqa: PTH103
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    Path(os.fsdecode(folder), "1.png").write_bytes(png(0))
    with (
        pytest.raises(InputError, match=r"b'caf\\xe9/1\.png' has characters"),
        open_source(str(tmp_path / "birds")),
    ):
        pass


def test_python_s_own_zips_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as archive:
        for name, content in images(NAMES).items():
            archive.writestr(name, content)
    with open_source(str(tmp_path / "birds.zip")) as source:
        assert {c.name for c in source.classes} == set(NAMES)
