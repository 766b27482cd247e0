"""Unfinished training in an object store, for clusters whose nodes share no volume.

The training itself writes to a folder. Here that folder's checkpoints are brought from the store
before it, and copied there while it goes on.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

from components.secrets import remote_options
from reptile.errors import InputError, PlatformError
from reptile.learn.run_folder import DIGESTS_FILE, is_whole, kept

log = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between looks for a new checkpoint


def is_address(work: str) -> bool:
    """Return whether `work` is a store's address, not a folder."""
    return "://" in work


@contextmanager
def working_folder(work: str, run: str, secret: Path) -> Iterator[Path]:
    """Yield the folder for a run's unfinished training, kept in a store if `work` is an address.

    If the block ends well, the run is removed from the store, as it is from the folder.

    Args:
        work: a folder, or an address such as `s3://bucket/unfinished`.
        run: name of the run's folder in it.
        secret: folder with the store's credentials.

    Raises:
        InputError: no package for such an address.
        PlatformError: the store cannot be reached or does not let us in.
    """
    if not is_address(work):
        yield Path(work)
        return
    store = Store(f"{work.rstrip('/')}/{run}", secret)
    with TemporaryDirectory(prefix="reptile-work-") as temporary:
        folder = Path(temporary) / run
        store.fetch(folder)
        ended = Event()
        copying = Thread(target=_copy, args=(store, folder, ended), daemon=True)
        copying.start()
        try:
            yield Path(temporary)
        finally:
            ended.set()
            copying.join()
        store.remove()


class Store:
    """One run's checkpoints in an object store: those that are whole, by their digests."""

    def __init__(self, address: str, secret: Path) -> None:
        import fsspec

        scheme = urlsplit(address).scheme
        options = remote_options(address, secret)
        try:
            self._files: Any = fsspec.filesystem(scheme, **_FILESYSTEMS.get(scheme, dict)(options))
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{address}: {error}; unfinished training is kept where DVC's plug-ins in the "
                "image reach, which is s3:// unless you add one"
            ) from None
        self.address = address
        self._root = self._files._strip_protocol(address)

    def fetch(self, folder: Path) -> None:
        """Bring the latest whole checkpoint to `folder`; none leaves it alone.

        Raises:
            PlatformError: the store cannot be reached or does not let us in.
        """
        try:
            for name in reversed(self._names()):
                target = folder / name
                target.mkdir(parents=True)
                for path in self._files.ls(f"{self._root}/{name}", detail=False):
                    self._files.get_file(path, str(target / Path(path).name))
                if is_whole(target):
                    log.info("fetched %s/%s", self.address, name)
                    return
                log.warning("%s/%s: damaged, its digests differ; not used", self.address, name)
                shutil.rmtree(target)
        except Exception as error:  # every store's library has its own
            raise PlatformError(
                f"{self.address}: cannot be read ({_reason(error)}); check the address, and the "
                "secret that `work_secret` names"
            ) from error

    def put(self, checkpoint: Path) -> None:
        """Copy a checkpoint, its digests last, then remove the older ones."""
        contents = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        for name in sorted(contents, key=lambda name: name == DIGESTS_FILE):
            self._files.pipe_file(f"{self._root}/{checkpoint.name}/{name}", contents[name])
        for name in self._names():
            if name != checkpoint.name:
                self._files.rm(f"{self._root}/{name}", recursive=True)

    def remove(self) -> None:
        """Remove the run; what cannot be removed is said in the log."""
        try:
            if self._names():
                self._files.rm(self._root, recursive=True)
        except Exception as error:
            log.warning("%s: cannot be removed (%s)", self.address, _reason(error))

    def _names(self) -> list[str]:
        self._files.invalidate_cache()
        try:
            found = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return sorted(Path(path).name for path in found if Path(path).name.startswith("iteration-"))


def _copy(store: Store, folder: Path, ended: Event) -> None:
    """Put each new checkpoint of `folder` into the store until the training has ended."""
    copied = failed = ""
    last = False
    while not last:
        last = ended.wait(INTERVAL)
        for checkpoint in kept(folder)[-1:]:
            if checkpoint.name == copied:
                continue
            try:
                store.put(checkpoint)
                copied = checkpoint.name
            except FileNotFoundError:
                pass  # a newer one has taken its place; it is next
            except Exception as error:  # training goes on, and the next look tries again
                if failed != checkpoint.name:
                    log.warning("%s: cannot be written (%s)", store.address, _reason(error))
                failed = checkpoint.name


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _s3(options: dict[str, str]) -> dict[str, Any]:
    names = {"access_key_id": "key", "secret_access_key": "secret", "session_token": "token"}
    clients = {"endpointurl": "endpoint_url", "region": "region_name"}
    client = {clients[key]: value for key, value in options.items() if key in clients}
    own = {names[key]: value for key, value in options.items() if key in names}
    return own | {"client_kwargs": client, "skip_instance_cache": True}


def _gs(options: dict[str, str]) -> dict[str, Any]:
    return {"token": options["credentialpath"]} if options else {}


_FILESYSTEMS = {"s3": _s3, "gs": _gs}
