"""Adapted tasks: in memory and in a folder, bounded in number, bytes and age.

What was acknowledged is on disk and is there after a restart. It neither adapts nor predicts.
"""

import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reptile.errors import InputError
from reptile.files import lock_folder
from reptile.runtime import AdaptedModel, AdaptedRegressor, FewShotModel, FewShotRegressor
from reptile.serve.settings import ServeSettings

log = logging.getLogger(__name__)

Model = FewShotModel | FewShotRegressor
Adapted = AdaptedModel | AdaptedRegressor
SUFFIX = ".safetensors"
DAY = 86400.0


class StorageError(Exception):
    """The folder of tasks cannot be written to, for instance because the disk is full."""


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


def check_labels(labels: Sequence[object]) -> None:
    """Check that labels differ as text, as answers have a probability by label.

    Raises:
        InputError: two labels, such as 1 and "1", do not.
    """
    seen: dict[str, object] = {}
    for label in labels:
        other = seen.setdefault(str(label), label)
        if type(other) is not type(label):
            raise InputError(f"labels {other!r} and {label!r} are the same as text: rename one")


class TaskStore:
    """Adapted tasks by id; the one used longest ago goes first when room is needed."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._tasks: OrderedDict[str, AdaptedTask] = OrderedDict()
        self.size = 0  # bytes of all tasks
        self._lock = ExitStack()  # keeps other servers out of the folder

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
            found.append(AdaptedTask(file.stem, adapted, status.st_mtime, status.st_size, file))
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
                adapted.save(path)
            except InputError as error:
                if isinstance(error.__cause__, OSError):
                    raise StorageError(str(error)) from error
                raise
            size = path.stat().st_size
        task = AdaptedTask(name, adapted, time.time(), size, path)
        if size > most:
            _erase(task)
            raise InputError(
                f"a task of {size} bytes is above max_task_bytes = {most}: "
                "start the server with a larger bound"
            )
        return task

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

    def remove(self, name: str) -> bool:
        """Forget a task; False if there is none of this id."""
        task = self._tasks.pop(name, None)
        if task is None:
            return False
        self.size -= task.size
        _erase(task)
        return True

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
