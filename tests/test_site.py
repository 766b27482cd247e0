"""The site of the documentation builds without a warning, whole, and from this folder alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reptile


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link, anchor or name is an error."""
    folder = tmp_path_factory.mktemp("site")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_every_document_is_a_page(site: Path, root: Path) -> None:
    documents = [path.relative_to(root / "docs") for path in (root / "docs").rglob("*.md")]
    assert len(documents) > 15
    for document in documents:
        assert (site / document.with_suffix(".html")).is_file(), document


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(text(path) for path in (site / "reference").glob("*.html"))
    described = {name.rsplit(".", 1)[-1] for name in re.findall(r'id="(reptile\.[\w.]+)"', pages)}
    assert set(reptile.__all__) - {"__version__"} <= described


def test_links_out_of_the_documents_are_names_of_files(site: Path) -> None:
    page = text(site / "pipeline.html")
    assert "<code>reptile/provenance.py</code>" in page
    for path in site.rglob("*.html"):
        for target in re.findall(r'href="([^":#?]+)["#?]', text(path)):
            if path.name != "404.html":
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_pages_load_nothing_from_other_sites(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="?([^" >]+)', text(path))
        assert loaded
        assert not [each for each in loaded if each.startswith(("http:", "https:", "//"))], path
