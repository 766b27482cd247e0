import hashlib
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from patterns import draw_letters
from PIL import Image
from sklearn.datasets import load_digits

from reptile.data import folders
from reptile.data.readers.open import open_source
from reptile.errors import InputError


def png(mode: str = "L", size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    content = BytesIO()
    Image.new(mode, size).save(content, kind)
    return content.getvalue()


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def write_folder(root: Path, entries: dict[str, bytes]) -> Path:
    for name, content in entries.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def classes_of(path: Path) -> list[tuple[str, str, int]]:
    with open_source(str(path)) as source:
        return [(c.name, c.group, len(c.files)) for c in source.classes]


def read_only_image(path: Path) -> Image.Image:
    with open_source(str(path)) as source:
        return source.read(source.classes[0].files[0])


LAYOUTS: dict[str, tuple[list[str], list[tuple[str, str, int]]]] = {
    "classes": (["b/1.png", "a/2.jpg", "a/1.PNG"], [("a", "", 2), ("b", "", 1)]),
    "groups": (["x/a/1.png", "y/a/1.png"], [("x/a", "x", 1), ("y/a", "y", 1)]),
    "wrapped groups": (
        ["data/v1/x/a/1.png", "data/v1/y/b/1.png"],
        [("x/a", "x", 1), ("y/b", "y", 1)],
    ),
    "two parts": (
        ["one/x/a/1.png", "one/y/a/1.png", "two/z/a/1.png"],
        [("one/x/a", "one/x", 1), ("one/y/a", "one/y", 1), ("two/z/a", "two/z", 1)],
    ),
    "a single class": (["data/a/1.png"], [("a", "", 1)]),
    "junk": (
        ["w/a/1.png", "w/a/.DS_Store", "w/b/Thumbs.db", "w/b/1.png", "__MACOSX/w/._a", ".git/x"],
        [("a", "", 1), ("b", "", 1)],
    ),
    "a README above the classes": (
        ["w/README", "w/a/1.png", "w/b/1.png"],
        [("a", "", 1), ("b", "", 1)],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_and_its_zip_have_the_same_classes(tmp_path: Path, layout: str) -> None:
    names, expected = LAYOUTS[layout]
    entries = {name: png() for name in names}
    assert classes_of(write_folder(tmp_path / "folder", entries)) == expected
    assert classes_of(write_zip(tmp_path / "some.zip", entries)) == expected


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    with open_source(
        str(write_zip(tmp_path / "a.zip", {f"a/{name}.png": png() for name in "cab"}))
    ) as source:
        assert source.name == "a"
        assert source.classes[0].files == ("a/a.png", "a/b.png", "a/c.png")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", "L"), ("L", "L"), ("LA", "L"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGB")],
)
def test_every_common_kind_of_image_is_grey_or_rgb(
    tmp_path: Path, mode: str, expected: str
) -> None:
    image = read_only_image(write_folder(tmp_path, {"a/1.png": png(mode)}))
    assert (image.mode, image.size) == (expected, (4, 4))


def test_transparent_pixels_are_white_paper(tmp_path: Path) -> None:
    content = BytesIO()
    image = Image.new("LA", (2, 1), (0, 0))
    image.putpixel((1, 0), (0, 255))
    image.save(content, "PNG")
    read = read_only_image(write_folder(tmp_path, {"a/1.png": content.getvalue()}))
    assert np.asarray(read).tolist() == [[255, 0]]


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    content = BytesIO()
    Image.fromarray(np.eye(3, dtype=bool)).save(content, "PNG")
    read = read_only_image(write_folder(tmp_path, {"a/1.png": content.getvalue()}))
    assert np.array_equal(np.asarray(read), np.eye(3) * 255)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    content = BytesIO()
    Image.new("RGB", (8, 4)).save(content, "JPEG", exif=exif)
    assert read_only_image(write_folder(tmp_path, {"a/1.jpg": content.getvalue()})).size == (4, 8)


def test_digits_are_scikit_learns_turned_dark_on_white() -> None:
    digits = load_digits()
    with open_source("digits") as source:
        assert [(c.name, c.group) for c in source.classes] == [(str(n), "") for n in range(10)]
        for c in source.classes:
            of_class = digits.images[digits.target == int(c.name)]
            assert len(c.files) == len(of_class)
            read = np.asarray(source.read(c.files[3]), dtype=float)
            assert np.abs(255 - read - of_class[3] / 16 * 255).max() <= 0.5


BAD_FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "empty folder": ({}, "no PNG or JPEG images; expected class/image.png"),
    "no class folders": ({"1.png": png()}, r"1\.png lies in no class folder"),
    "empty class": ({"a/1.png": png(), "b/": b""}, "no images in 'b'"),
    "empty group": ({"x/a/1.png": png(), "y/a/": b""}, "no images in 'y"),
    "text in a class": ({"a/1.png": png(), "a/notes.txt": b"x"}, r"a/notes\.txt is no PNG or JPEG"),
    "gif in a class": ({"a/1.png": png(), "a/2.gif": b"x"}, r"a/2\.gif is no PNG or JPEG"),
    "class without images": ({"a/1.png": png(), "b/2.bmp": b"x"}, r"b/2\.bmp is no PNG or JPEG"),
    "uneven": ({"a/1.png": png(), "b/c/1.png": png()}, "in a and in b/c; .* equally deep"),
    "control characters": ({"a/\x1b[2J.png": png()}, r"'a/\\x1b\[2J\.png' has characters"),
    "colliding names": ({"é/1.png": png(), "e\u0301/1.png": png()}, "two class folders .* é"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_clear_error(tmp_path: Path, case: str) -> None:
    entries, message = BAD_FOLDERS[case]
    root = tmp_path / "images"
    root.mkdir()
    with pytest.raises(InputError, match=message) as caught:
        classes_of(write_folder(root, entries))
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def sixteen_bit() -> bytes:
    content = BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(content, "PNG")
    return content.getvalue()


def huge_png() -> bytes:
    """A PNG whose header promises 50,000 × 50,000 pixels."""
    content = png()
    return content[:16] + struct.pack(">II", 50_000, 50_000) + content[24:]


BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "cannot be read"),
    "not an image": (lambda: b"hello", "cannot be read"),
    "truncated": (lambda: png(size=(64, 64))[:-30], "cannot be read"),
    "another format": (lambda: png(kind="TIFF"), "cannot be read"),
    "16 bits": (sixteen_bit, "save it as 8-bit"),
    "CMYK as a TIFF": (lambda: png("CMYK", kind="TIFF"), "cannot be read"),
    "promised pixels": (huge_png, "cannot be read|at most"),
    "many pixels": (lambda: png("1", (8000, 7000)), "8000 x 7000 pixels; at most 50,000,000"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_a_bad_image_is_one_error_that_names_the_file(
    tmp_path: Path, case: str, write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    content, message = BAD_IMAGES[case]
    with pytest.raises(InputError, match=message) as caught:
        read_only_image(write(tmp_path / "images", {"a/7.png": content()}))
    assert "a/7.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MAX_BYTES", 2**20)
    bomb = write_zip(tmp_path / "bomb.zip", {"a/1.png": bytes(50 * 2**20)})
    assert bomb.stat().st_size < 2**18
    with pytest.raises(InputError, match="more than 1 MiB"):
        read_only_image(bomb)


def test_a_zip_that_understates_a_size_is_refused(tmp_path: Path) -> None:
    content = png(size=(64, 64))
    path = write_zip(tmp_path / "lie.zip", {"a/1.png": content})
    honest, lie = struct.pack("<I", len(content)), struct.pack("<I", 1)
    path.write_bytes(path.read_bytes().replace(honest, lie))
    with pytest.raises(InputError, match=r"a/1\.png: cannot be read"):
        read_only_image(path)


@pytest.mark.parametrize(
    "name", ["../a/1.png", "/a/1.png", "a/../../1.png", "a\\1.png", "a//1.png", "./a/1.png"]
)
def test_path_tricks_in_a_zip_are_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "tricks.zip", {"a/0.png": png(), name: png()})
    with pytest.raises(InputError, match="unsafe path"):
        classes_of(path)


def test_a_name_with_a_hidden_end_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "nul.zip", {"a/1.pngX.exe": png()})
    path.write_bytes(path.read_bytes().replace(b"a/1.pngX.exe", b"a/1.png\0.exe"))
    with pytest.raises(InputError, match="unsafe path"):
        classes_of(path)


def test_links_of_dvc_into_its_cache_are_followed_and_others_out_of_the_folder_not(
    tmp_path: Path,
) -> None:
    """With `cache.type = symlink` a folder that DVC tracks is a folder of links."""
    draw_letters(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "linked")
    cache = tmp_path / "shared/files/md5"
    for path in (tmp_path / "linked").rglob("*.png"):
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        target = cache / digest[:2] / digest[2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        path.symlink_to(target)
    with (
        open_source(str(tmp_path / "plain")) as plain,
        open_source(str(tmp_path / "linked")) as linked,
    ):
        assert linked.classes == plain.classes
    link = next((tmp_path / "linked").rglob("*.png"))
    link.unlink()
    link.symlink_to("/etc/hostname")
    with (
        pytest.raises(InputError, match="a link may only lead"),
        open_source(str(tmp_path / "linked")),
    ):
        pass


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a/1.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="symbolic link"):
        classes_of(tmp_path / "link.zip")


def test_encrypted_entries_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "secret.zip", {"a/1.png": png()})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="encrypted"):
        classes_of(path)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a/1.png", png())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/1.png", png(size=(5, 5)))
    with pytest.raises(InputError, match="there twice"):
        classes_of(tmp_path / "twice.zip")


def test_no_source_is_an_error_that_says_what_a_source_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such source; give a folder or a zip"):
        classes_of(tmp_path / "nowhere")
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(InputError, match="neither a folder nor a readable zip"):
        classes_of(tmp_path / "text.zip")
    whole = write_zip(tmp_path / "whole.zip", {"a/1.png": png()}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-40])
    with pytest.raises(InputError, match="neither a folder nor a readable zip"):
        classes_of(tmp_path / "cut.zip")


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    root = write_folder(tmp_path / "images", {"a/1.png": png()})
    (root / "a/2.png").symlink_to(root / "a/1.png")
    assert classes_of(root) == [("a", "", 2)]
    for name, target in [
        ("a/3.png", tmp_path / "secret.png"),
        ("a/4.png", root / "a/4.png"),
        ("b", tmp_path),
        ("c", root / "a"),
    ]:
        (root / name).symlink_to(target)
        with pytest.raises(InputError, match="link may only lead to a file"):
            classes_of(root)
        (root / name).unlink()
