"""Downloads of public datasets: from their publishers, over https, checked, and resumed if cut off.

The files are kept as they came; `readers` read them.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from torchvision.datasets import EMNIST, MNIST, Omniglot

from reptile.errors import InputError
from reptile.files import writing

BLOCK = 2**18
TIMEOUT = 30  # seconds without a byte

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes that are there and, if the server says, the whole size."""


class RemoteFile(NamedTuple):
    """A file that someone publishes."""

    url: str
    checksum: str
    """As in `md5:…` or `sha256:…`."""
    megabytes: int
    """Its size, rounded up: more is refused."""

    @property
    def name(self) -> str:
        """What the file is called, there and here."""
        return urlsplit(self.url).path.rpartition("/")[2]


class RemoteDataset(NamedTuple):
    """A public dataset: its files, and the folder that they go to."""

    folder: str
    files: tuple[RemoteFile, ...]
    settings: tuple[str, ...]
    """Of `prepare`, for its published split and size, as `--set` takes them."""


_CIFAR = RemoteFile(  # torchvision knows the Python version alone, which is a pickle
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    169,
)
_CLASSES = "prepare.held_out=classes"
_COLOUR = ("prepare.image_size=32", "prepare.rotations=false")
# Addresses and checksums are torchvision's, which keeps them up to date; docs/decisions.md says why
# its own downloader is not used. The sha256 of CIFAR-100 is that of TensorFlow Datasets.
DATASETS = {
    "omniglot": RemoteDataset(
        "datasets/omniglot",
        tuple(
            RemoteFile(f"{Omniglot.download_url_prefix}/{part}.zip", f"md5:{md5}", 10)
            for part, md5 in Omniglot.zips_md5.items()
        ),
        ("prepare.held_out=omniglot-vinyals",),
    ),
    "mnist": RemoteDataset(
        "datasets/mnist",
        tuple(
            RemoteFile(MNIST.mirrors[0] + name, f"md5:{md5}", 10) for name, md5 in MNIST.resources
        ),
        (_CLASSES, "prepare.test=5", "prepare.validation=0"),
    ),
    "emnist": RemoteDataset(
        "datasets/emnist", (RemoteFile(EMNIST.url, f"md5:{EMNIST.md5}", 562),), (_CLASSES,)
    ),
    "cifar-fs": RemoteDataset(
        "datasets/cifar-100", (_CIFAR,), ("prepare.held_out=cifar-fs", *_COLOUR)
    ),
    "fc100": RemoteDataset("datasets/cifar-100", (_CIFAR,), ("prepare.held_out=fc100", *_COLOUR)),
}


def dataset_named(name: str) -> RemoteDataset:
    """Return a dataset that can be downloaded.

    Raises:
        InputError: there is none of that name.
    """
    if name == "mini-imagenet":
        raise InputError(
            "mini-imagenet: its images are ImageNet's, which everyone has to get from there; "
            "docs/data.md says how to lay them out"
        )
    if name not in DATASETS:
        raise InputError(f"{name}: no such dataset; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def download(
    dataset: RemoteDataset,
    folder: Path,
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Download what `folder` lacks of the dataset; a file appears in it when it is whole and right.

    A download that was cut off leaves `….part`, from which the next one goes on.

    Raises:
        InputError: a file cannot be had, or its content is not what was published.
    """
    for file in dataset.files:
        target = folder / file.name
        if target.exists():
            if not _is_right(file, target):
                raise InputError(
                    f"{target}: not the published file ({file.checksum}); move it away"
                )
            continue
        part = target.with_name(f"{file.name}.part")
        _fetch(file, part, progress)
        if not _is_right(file, part):
            part.unlink()
            raise InputError(
                f"{file.url}: what came is not the published file ({file.checksum}) and was "
                "thrown away; try again, and if it stays so, someone has changed it"
            )
        part.replace(target)


def _is_right(file: RemoteFile, path: Path) -> bool:
    algorithm, _, published = file.checksum.partition(":")
    with path.open("rb") as content:
        # md5 where the publisher gives no other: against damage, the rest rests on https.
        digest = hashlib.file_digest(content, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return digest.hexdigest() == published


def _fetch(file: RemoteFile, part: Path, progress: Progress) -> None:
    """Append to `part` what it lacks."""
    start = part.stat().st_size if part.exists() else 0
    most = file.megabytes * 10**6
    with _answer(file, part, start) as answer:
        if answer is None:
            return  # there is nothing after `start`: the whole file is here, or it is another one
        start, total = _range(answer, start)
        part.parent.mkdir(parents=True, exist_ok=True)
        with writing(part), part.open("r+b" if part.exists() else "wb") as output:
            output.truncate(start)
            output.seek(start)
            done = start
            while block := _read(file, answer, done, total):
                done += len(block)
                if done > most:
                    raise InputError(f"{file.url}: more than {file.megabytes} MB; not that file")
                output.write(block)
                progress(file.name, done, total)
        if total is not None and done < total:
            raise InputError(_cut_off(file, done, total, "the connection ended"))


@contextmanager
def _answer(file: RemoteFile, part: Path, start: int) -> Iterator[HTTPResponse | None]:
    """Ask for the file from byte `start` on; yield None if there are no such bytes."""
    if urlsplit(file.url).scheme != "https":
        raise InputError(f"{file.url}: only https addresses are used")
    headers = {"User-Agent": "reptile-fewshot", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        answer = build_opener(_HttpsOnly).open(Request(file.url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            if start and error.code == 416:
                yield None
                return
            raise InputError(
                f"{file.url}: the server answers {error.code} {error.reason}"
            ) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise InputError(
            f"{urlsplit(file.url).hostname} cannot be reached ({' '.join(str(reason).split())}); "
            f"with no network here, get {file.url} elsewhere and put it into {part.parent}"
        ) from None
    with answer:
        yield answer


class _HttpsOnly(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme != "https":
            raise InputError(f"{req.full_url}: the server redirects away from https; refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _range(answer: HTTPResponse, start: int) -> tuple[int, int | None]:
    """Return from which byte on the server sends, and how many the whole file has."""
    sent = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    first = int(sent[1]) if answer.status == 206 and sent else 0
    if first not in (0, start):
        raise InputError(f"{answer.url}: the server sends from byte {first:,}, not {start:,}")
    return first, None if answer.length is None else first + answer.length


def _read(file: RemoteFile, answer: HTTPResponse, done: int, total: int | None) -> bytes:
    try:
        return answer.read(BLOCK)
    except (OSError, HTTPException) as error:
        raise InputError(_cut_off(file, done, total, str(error) or "cut off")) from None


def _cut_off(file: RemoteFile, done: int, total: int | None, reason: str) -> str:
    of = "" if total is None else f" of {total:,}"
    return (
        f"{file.url}: {' '.join(reason.split())} after {done:,}{of} bytes; run the same again to "
        "go on from there"
    )
