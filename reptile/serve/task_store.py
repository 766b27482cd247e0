"""Adapted tasks: in memory and in a folder, bounded in number, bytes and age.

What was acknowledged is on disk and is there after a restart. It neither adapts nor predicts.
"""

import json
import logging
import os
import time
import unicodedata
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reptile.errors import InputError
from reptile.files import LOCK_FILE, lock_folder
from reptile.runtime import AdaptedModel, AdaptedRegressor, FewShotModel, FewShotRegressor
from reptile.serve.settings import ServeSettings

log = logging.getLogger(__name__)

Model = FewShotModel | FewShotRegressor
Adapted = AdaptedModel | AdaptedRegressor
SUFFIX = ".safetensors"
DAY = 86400.0


class StorageError(Exception):
    """The folder of tasks cannot be changed, for instance because the disk is full."""


@dataclass(frozen=True)
class AdaptedTask:
    """One task: the adapted model, when it was created or changed, its size and its file."""

    id: str
    model: Adapted
    created: float  # seconds since 1970
    size: int  # bytes
    file: Path | None  # None: in memory only

    @property
    def labels(self) -> list[Any]:
        """The names of a classifier's task; none of a regressor's."""
        return list(self.model.state.labels)


def normal(name: str) -> str:
    """Return a name in Unicode's form NFC, as `reptile prepare` does: é has two spellings."""
    return unicodedata.normalize("NFC", name)


def label_text(label: object) -> str:
    """Return a label as the name of a JSON object's member."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def check_labels(labels: Sequence[object]) -> None:
    """Check that labels differ as text, as answers have a probability by label, and in value.

    Raises:
        InputError: two labels, such as 1 and "1", or 1 and true, do not.
    """
    seen: dict[object, object] = {}
    for label in labels:
        for key in (label_text(label), label):
            other = seen.setdefault(key, label)
            if type(other) is not type(label):
                one, two = json.dumps(other), json.dumps(label)
                raise InputError(f"labels {one} and {two} are the same to some clients: rename one")


class TaskStore:
    """Adapted tasks by id; the one used longest ago goes first when room is needed."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._tasks: OrderedDict[str, AdaptedTask] = OrderedDict()
        self.size = 0  # bytes of all tasks
        self._lock = ExitStack()  # keeps other servers out of the folder
        self._lock_status: os.stat_result | None = None  # of its file
        self._unwritten = 0  # bytes of the task that could not be written last

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[AdaptedTask]:
        self._forget_old()
        return iter(tuple(self._tasks.values()))

    def load(self, model: Model) -> None:
        """Read the folder; what cannot be read is reported and left alone.

        Raises:
            InputError: the folder cannot be made or read, or another server uses it.
        """
        folder = self._settings.tasks
        if folder is None:
            return
        try:
            self._lock.enter_context(lock_folder(folder))
            self._lock_status = (folder / LOCK_FILE).stat()
            for unfinished in folder.glob(f".*{SUFFIX}.*.tmp"):  # of a process that was killed
                unfinished.unlink(missing_ok=True)
            files = sorted(folder.glob(f"*{SUFFIX}"))
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}; name another with --tasks") from None
        found = []
        for file in files:
            try:
                if not file.is_file() or str(uuid.UUID(file.stem)) != file.stem:
                    raise InputError("not a file that this server has written")
                adapted, status = model.load_adapted(file), file.stat()
                check_labels(adapted.state.labels)
            except (InputError, OSError, ValueError) as error:
                log.warning("%s is left out: %s", file, error)
                continue
            created = min(status.st_mtime, time.time())  # a clock may have been wrong
            found.append(AdaptedTask(file.stem, adapted, created, status.st_size, file))
        for task in sorted(found, key=lambda task: task.created):
            self.add(task)

    def close(self) -> None:
        """Let other servers use the folder."""
        self._lock.close()

    def write(self, adapted: Adapted, changes: AdaptedTask | None = None) -> AdaptedTask:
        """Save a task to disk; to be called from a worker thread, before `add` or `replace`.

        Args:
            adapted: the model.
            changes: the task that it takes the place of; None for a new task. Its file is left
                alone until `replace`.

        Raises:
            InputError: it alone is larger than the bound.
            StorageError: the folder cannot be written to.
        """
        name, most = changes.id if changes else str(uuid.uuid4()), self._settings.max_task_bytes
        size = sum(array.nbytes for array in adapted.state.tensors.values())
        path = self._path(name)
        if path and changes:
            path = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        if path:
            try:
                self._check_folder()
                adapted.save(path)
                status = path.stat()
            except (InputError, OSError) as error:
                if isinstance(error, InputError) and not isinstance(error.__cause__, OSError):
                    raise
                self._unwritten = size
                raise StorageError(str(error)) from error
            size, self._unwritten = status.st_size, 0
        task = AdaptedTask(name, adapted, time.time(), size, path)
        if size > most:
            _erase(task)
            raise InputError(
                f"a task of {size} bytes is above max_task_bytes = {most}: "
                "start the server with a larger bound"
            )
        return task

    def check_writable(self) -> None:
        """Try again to write as much as could not be written last, if anything; from a thread.

        Raises:
            StorageError: the folder still cannot be written to.
        """
        if not (self._unwritten and (path := self._path(".ready"))):
            return
        path = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # as other unfinished files
        try:
            self._check_folder()
            path.write_bytes(bytes(self._unwritten))
            self._unwritten = 0
        except OSError as error:
            raise StorageError(str(error)) from error
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _check_folder(self) -> None:
        """Raise an OSError if the folder is no longer the one that this server has locked."""
        if (folder := self._settings.tasks) and self._lock_status:
            status = (folder / LOCK_FILE).stat()
            if not os.path.samestat(status, self._lock_status):
                raise FileNotFoundError(f"{folder} was replaced: start the server again")

    def add(self, task: AdaptedTask) -> None:
        """Take a task in that was written, and make room for it."""
        self._tasks[task.id] = task
        self.size += task.size
        self._forget_old()
        while (
            len(self._tasks) > self._settings.max_tasks or self.size > self._settings.max_task_bytes
        ):
            self.remove(next(iter(self._tasks)))

    def replace(self, old: AdaptedTask, new: AdaptedTask) -> bool:
        """Put a task that was written in the place of another, and make room for it.

        Returns:
            False if `old` was removed or replaced meanwhile; then nothing changes.

        Raises:
            StorageError: the folder cannot be written to.
        """
        if self.get(old.id) is not old:
            _erase(new)
            return False
        if new.file and old.file:
            try:
                new.file.replace(old.file)
            except OSError as error:
                _erase(new)
                raise StorageError(f"{old.file} cannot be written: {error.strerror}") from error
        del self._tasks[old.id]
        self.size -= old.size
        self.add(replace(new, file=old.file))
        return True

    def get(self, name: str) -> AdaptedTask | None:
        """Return a task and mark it as used; None if there is none of this id."""
        task = self._tasks.get(name)
        if task and self.expires(task) < time.time():
            self.remove(name)
            return None
        if task:
            self._tasks.move_to_end(name)
        return task

    def delete(self, name: str) -> None:
        """Remove a task, if there is one of this id, so that it does not come back.

        Raises:
            StorageError: its file cannot be removed; the task is kept.
        """
        if (task := self._tasks.get(name)) and task.file:
            try:
                task.file.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"{task.file} cannot be removed: {error.strerror}") from error
        self.remove(name)

    def remove(self, name: str) -> None:
        """Forget a task, if there is one of this id, even if its file cannot be removed."""
        if task := self._tasks.pop(name, None):
            self.size -= task.size
            _erase(task)

    def expires(self, task: AdaptedTask) -> float:
        """Return when a task will be forgotten, in seconds since 1970."""
        return task.created + self._settings.task_days * DAY

    def _forget_old(self) -> None:
        now = time.time()
        for task in tuple(self._tasks.values()):
            if self.expires(task) < now:
                self.remove(task.id)

    def _path(self, name: str) -> Path | None:
        folder = self._settings.tasks
        return folder / f"{name}{SUFFIX}" if folder else None


def _erase(task: AdaptedTask) -> None:
    if task.file:
        try:
            task.file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", task.file, error.strerror)
