"""The tasks that were taught: in memory and in a folder, bounded in number, bytes and age.

What was acknowledged is on disk and is there after a restart. Not for teaching or predicting.
"""

import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reptile.errors import InputError
from reptile.runtime import AdaptedModel, FewShotModel
from reptile.serve.settings import ServeSettings

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
DAY = 86400.0


@dataclass(frozen=True)
class TaughtTask:
    """One task: the adapted model, when it was taught, and what it weighs."""

    id: str
    model: AdaptedModel
    taught: float  # seconds since 1970
    size: int  # bytes


class TaskStore:
    """Taught tasks by id; the one used longest ago goes first when room is needed."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._tasks: OrderedDict[str, TaughtTask] = OrderedDict()
        self.size = 0  # bytes of all tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[TaughtTask]:
        self._forget_old()
        return iter(tuple(self._tasks.values()))

    def load(self, model: FewShotModel) -> None:
        """Read the folder; what cannot be read is reported and left alone.

        Raises:
            InputError: the folder cannot be made or read.
        """
        folder = self._settings.tasks
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob(f".*{SUFFIX}.*.tmp"):  # of a process that was killed
                unfinished.unlink(missing_ok=True)
            files = sorted(folder.glob(f"*{SUFFIX}"))
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}; name another with --tasks") from None
        found = []
        for file in files:
            try:
                if not file.is_file() or str(uuid.UUID(file.stem)) != file.stem:
                    raise InputError("no file that this server has written")
                adapted, status = model.load_adapted(file), file.stat()
            except (InputError, OSError, ValueError) as error:
                log.warning("%s is left out: %s", file, error)
                continue
            found.append(TaughtTask(file.stem, adapted, status.st_mtime, status.st_size))
        for task in sorted(found, key=lambda task: task.taught):
            self.add(task)

    def write(self, adapted: AdaptedModel) -> TaughtTask:
        """Save a new task to disk; to be called from a worker thread, before `add`.

        Raises:
            InputError: it cannot be written, or alone is larger than the bound.
        """
        name, most = str(uuid.uuid4()), self._settings.max_task_bytes
        size = sum(array.nbytes for array in adapted.state.weights.values())
        if path := self._path(name):
            adapted.save(path)
            size = path.stat().st_size
        if size > most:
            self._erase(name)
            raise InputError(
                f"a task of {size} bytes is above max_task_bytes = {most}: "
                "start the server with a larger bound"
            )
        return TaughtTask(name, adapted, time.time(), size)

    def add(self, task: TaughtTask) -> None:
        """Take a task in that was written, and make room for it."""
        self._tasks[task.id] = task
        self.size += task.size
        self._forget_old()
        while (
            len(self._tasks) > self._settings.max_tasks or self.size > self._settings.max_task_bytes
        ):
            self.remove(next(iter(self._tasks)))

    def get(self, name: str) -> TaughtTask | None:
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
        self._erase(name)
        return True

    def expires(self, task: TaughtTask) -> float:
        """Return when a task will be forgotten, in seconds since 1970."""
        return task.taught + self._settings.task_days * DAY

    def _forget_old(self) -> None:
        now = time.time()
        for task in tuple(self._tasks.values()):
            if self.expires(task) < now:
                self.remove(task.id)

    def _path(self, name: str) -> Path | None:
        folder = self._settings.tasks
        return folder / f"{name}{SUFFIX}" if folder else None

    def _erase(self, name: str) -> None:
        if path := self._path(name):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error.strerror)
