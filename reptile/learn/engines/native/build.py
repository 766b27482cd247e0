"""Compiling the kernel: once for each source, compiler, flags and processor, into a private cache.

Independent of what the kernel computes. A library that cannot be built or trusted is a `BuildError`
of one line, which the caller turns into a fall-back or an error.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math: it would hide NaN, and loading such a library changes how the whole process
# treats denormals.
FLAGS = (
    *("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-fPIC", "-shared"),
)
TIMEOUT = 300  # seconds, for a slow machine; it takes about ten


class BuildError(RuntimeError):
    """The kernel cannot be built or loaded here; the message says why in one line."""


def load_kernel() -> ctypes.CDLL:
    """Return the compiled kernel: shipped with its source, from the cache, or built now.

    The environment may name the compiler (CXX), the instruction set to build for (REPTILE_MARCH,
    such as `x86-64-v3` for an image that runs on several machines; otherwise this processor's) and
    the cache (XDG_CACHE_HOME).

    Raises:
        BuildError: no compiler, an error of the compiler, or a cache that cannot be used.
    """
    if os.name != "posix":
        raise BuildError(f"the kernel is not built on {platform.system()}")
    try:
        return ctypes.CDLL(str(_library()))
    except BuildError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise BuildError(_first_line(f"the kernel cannot be built or loaded: {error}")) from None


def _library() -> Path:
    compiler, flags = _compiler(), (*FLAGS, *_target(), "-pthread")
    sources = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    key = _hash(*(file.read_bytes() for file in sources), repr(flags).encode(), _processor())
    # A container image ships the library next to its source. Whoever can write there can change
    # this file too, so the library's owner is not checked, and any user may run it.
    shipped = sorted(SOURCE.parent.glob(f"kernel-{key}-*.so"))
    if shipped:
        return shipped[0]
    folder = _cache_folder()
    if compiler is None:
        built = sorted(folder.glob(f"kernel-{key}-*.so"))
        if built:
            return built[0]
        wanted = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise BuildError(f"no C++ compiler ({wanted}): install g++, or name another in CXX")
    library = folder / f"kernel-{key}-{_hash(_version(compiler))}.so"
    if not library.exists():
        with _lock(folder / "lock"):
            if not library.exists():  # another process may have built it meanwhile
                _compile(compiler, flags, library)
    return library


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    handle, name = tempfile.mkstemp(prefix=".kernel-", suffix=".so", dir=library.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        _run([compiler, *flags, str(SOURCE), "-o", name])
        temporary.chmod(0o755)
        temporary.replace(library)
    finally:
        temporary.unlink(missing_ok=True)


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]}: not done after {TIMEOUT} s") from None
    if done.returncode:
        message = done.stderr.decode(errors="replace")
        reason = next((line for line in message.splitlines() if "error" in line), message)
        raise BuildError(_first_line(f"{command[0]} failed: {reason}"))
    return done.stdout


def _compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def _version(compiler: str) -> bytes:
    return _run([compiler, "--version"])


def _target() -> tuple[str, ...]:
    option = "-mcpu" if platform.machine() in {"aarch64", "arm64"} else "-march"
    return (f"{option}={os.environ.get('REPTILE_MARCH') or 'native'}",)


def _processor() -> bytes:
    """What `native` means here; a cache may be shared by machines with different processors."""
    if os.environ.get("REPTILE_MARCH"):
        return platform.machine().encode()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    facts = {line for line in lines if line.partition(":")[0].strip() in names}
    return "\n".join(sorted(facts)).encode()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "reptile"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    # Code is loaded from here: nobody but this user and root may be able to put it there.
    if status.st_uid not in {0, os.getuid()} or status.st_mode & 0o022:
        raise BuildError(f"{folder}: other users can write to it; make it private (chmod 700)")
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl  # not on every system, where `load_kernel` says so

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no message"
