"""The window files of a machine: put together once from parts that are known by their SHA-256, kept up to a size.

A window file is named after the digest of its recipe (header and digests of the parts), so a second start finds it
whole. A new window takes the parts that lie in other windows here, or in the same model file, and only the rest has to
be sent. A file that was not finished goes on where it stopped.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..quant.gguf import ARCHITECTURES, ModelFile, Part, Window, blocks, locate, padded
from ..runtime.errors import ModelError, ModelUnsupported
from ..runtime.files import replacing
from ..runtime.header import check_header, read_header
from ..runtime.parts import part_names
from .errors import ClusterError, ProtocolError

_MOST_PARTS = 1 << 16
_LONGEST_HEADER = 16 << 20
_LOCK_SECONDS = 600
_ELSEWHERE = "choose another folder by --cache of `localreason node`, or LOCALREASON_CLUSTER_CACHE"
_WINDOW = re.compile(r"[0-9a-f]{64}\.gguf(\.part)?")
"""What a window file is named: of other models in the folder none is counted, and none deleted."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor's bytes within a window: digest, size, and where they lie in the model that was cut."""

    sha256: bytes
    n_bytes: int
    source_offset: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a window file is made of."""

    header: bytes
    pieces: tuple[Piece, ...]
    source_name: str = ""
    source_bytes: int = 0

    def __post_init__(self) -> None:
        """Raises ProtocolError for sizes that no model has."""
        if len(self.header) > _LONGEST_HEADER or len(self.header) % 32 or len(self.pieces) > _MOST_PARTS:
            raise ProtocolError(f"a window of {len(self.header)} bytes of header and {len(self.pieces)} parts came")
        if any(len(piece.sha256) != 32 or not 0 < piece.n_bytes < 1 << 40 for piece in self.pieces):
            raise ProtocolError("a part of a window without a digest or a size came")

    @property
    def name(self) -> str:
        digest = hashlib.sha256(self.header)
        for piece in self.pieces:
            digest.update(piece.sha256 + piece.n_bytes.to_bytes(8, "little"))
        return digest.hexdigest()

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(padded(piece.n_bytes) for piece in self.pieces)

    def offsets(self) -> list[int]:
        """Where each part begins in the window file."""
        offsets, offset = [], len(self.header)
        for piece in self.pieces:
            offsets.append(offset)
            offset += padded(piece.n_bytes)
        return offsets


def make_recipe(file: ModelFile, window: Window, digests: dict[int, bytes]) -> Recipe:
    """The recipe to send. `digests` are those of `Store.digests`, by offset in the model file."""
    pieces = []
    for part in window.parts:
        if part.source_offset is None:
            pieces.append(Piece(hashlib.sha256(part.data).digest(), part.n_bytes, 0))
        else:
            pieces.append(Piece(digests[part.source_offset], part.n_bytes, part.source_offset))
    return Recipe(window.header, tuple(pieces), file.path.name, file.header.n_bytes)


class Store:
    """A folder of window files, at most `limit_bytes` of them, and folders of models to take parts from."""

    def __init__(self, folder: Path, limit_bytes: int, models: Iterable[Path] = ()) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._models = list(models)
        self._used: set[str] = set()

    def path(self, recipe: Recipe) -> Path:
        return self.folder / f"{recipe.name}.gguf"

    def digests(self, file: ModelFile, stopped: threading.Event | None = None) -> dict[int, bytes]:
        """The SHA-256 of each tensor by offset; read once from the file, which takes a while and ends early with
        ClusterError where it is `stopped`, then kept beside the windows."""
        stats = [(path.resolve(), path.stat()) for path, _ in file.files]
        told = " ".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
        key = hashlib.sha256(told.encode()).hexdigest()
        kept = self.folder / f"{key}.digests.json"
        try:
            return {int(offset): bytes.fromhex(digest) for offset, digest in json.loads(kept.read_text()).items()}
        except (OSError, ValueError, AttributeError):
            pass
        found = {}
        for tensor in file.tensors.values():
            if stopped is not None and stopped.is_set():
                raise ClusterError(f"reading {file.path} was stopped")
            found[tensor.offset] = file.digest(Part(tensor.n_bytes, tensor.offset))
        self._make_folder()
        _replace(kept, json.dumps({offset: digest.hex() for offset, digest in found.items()}))
        return found

    def build(self, recipe: Recipe) -> "Building | None":
        """None where the window is here already; else its unfinished file. Raises ClusterError without space."""
        self._used.add(recipe.name)
        if self._is_whole(recipe):
            return None
        self._make_folder()
        self._make_room(recipe)
        building = Building(self, recipe)
        try:
            if self._is_whole(recipe):  # another process has just built it
                building.close()
                return None
            building.resume()
        except BaseException:
            building.close()
            raise
        return building

    def forget_used(self) -> None:
        """What was built so far may be dropped for something else: a new ring begins."""
        self._used.clear()

    def _is_whole(self, recipe: Recipe) -> bool:
        path = self.path(recipe)
        with contextlib.suppress(OSError):
            if path.stat().st_size == recipe.n_bytes:
                with contextlib.suppress(OSError):  # where nothing can be written what is here can be read
                    os.utime(path)
                return True
        return False

    def find(self, recipe: Recipe, piece: Piece) -> tuple[Path, int] | None:
        """Where else on this machine a part's bytes lie: a file and an offset; their digest is to be checked."""
        # A part of its own has no place in the model.
        files = self._model(recipe) if 0 < piece.source_offset < recipe.source_bytes else []
        return locate(files, piece.source_offset) if files else self._index().get(piece.sha256.hex())

    def _model(self, recipe: Recipe) -> list[tuple[Path, int]]:
        """The files here of the model that a window was cut from, with their sizes; none where it is not here."""
        for names in ([recipe.source_name], part_names(recipe.source_name)):
            for model in self._models:
                paths = [(model if model.is_dir() else model.parent) / name for name in names]
                if (model.is_dir() or model in paths) and all(path.is_file() for path in paths):
                    files = [(path, path.stat().st_size) for path in paths]
                    if sum(size for _, size in files) == recipe.source_bytes:
                        return files
        return []

    def _index(self) -> dict[str, tuple[Path, int]]:
        found = {}
        for note in self.folder.glob("*.parts.json"):
            path = note.with_name(note.name.removesuffix(".parts.json") + ".gguf")
            try:
                if path.exists():
                    found |= {digest: (path, int(offset)) for digest, offset in json.loads(note.read_text()).items()}
            except (OSError, ValueError, AttributeError):
                continue
        return found

    def entries(self) -> list[tuple[Path, int, float]]:
        """Window files with bytes and the time of last use, the latest first."""
        found = []
        for path in self.folder.glob("*.gguf*"):
            with contextlib.suppress(FileNotFoundError):  # finished or dropped by another process meanwhile
                if _WINDOW.fullmatch(path.name):
                    stat = path.stat()
                    found.append((path, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda entry: -entry[2])

    def clear(self) -> int:
        """Delete every window file; the bytes that became free."""
        entries = self.entries()
        for path, _, _ in entries:
            self._delete(path)
        return sum(size for _, size, _ in entries)

    def _delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        if path.suffix == ".gguf":
            path.with_name(path.stem + ".parts.json").unlink(missing_ok=True)

    def _make_room(self, recipe: Recipe) -> None:
        """Delete what was used longest ago. Raises ClusterError where that is not enough."""
        n_bytes = recipe.n_bytes
        if n_bytes > self.limit_bytes:
            raise ClusterError(
                f"a window of {n_bytes} bytes is larger than the cache's limit of {self.limit_bytes}; raise the limit"
            )
        entries = self.entries()
        begun = sum(size for path, size, _ in entries if path.name.split(".")[0] == recipe.name)
        held = sum(size for _, size, _ in entries) - begun
        for path, size, _ in reversed(entries):
            if held + n_bytes <= self.limit_bytes:
                break
            if path.name.split(".")[0] not in self._used:
                self._delete(path)
                held -= size
        if held + n_bytes > self.limit_bytes:
            raise ClusterError(
                f"the windows in use take {held} bytes and one more {n_bytes}; the cache's limit is "
                f"{self.limit_bytes}, raise it"
            )
        free = shutil.disk_usage(self.folder).free
        if free < n_bytes - begun:
            raise ClusterError(
                f"a window takes {n_bytes - begun} bytes and {free} are free at {self.folder}; free some space"
            )

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClusterError(f"{self.folder} cannot be made: {error.strerror}; {_ELSEWHERE}") from error


class Building:
    """A window file that is being put together. `missing` says what has to be sent, `write` takes it."""

    def __init__(self, store: Store, recipe: Recipe) -> None:
        self._store = store
        self.recipe = recipe
        self._offsets = recipe.offsets()
        self._path = store.path(recipe).with_suffix(".gguf.part")
        self._lock = FileLock(store.folder / f"{recipe.name}.lock", timeout=_LOCK_SECONDS, thread_local=False)
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._n_written = 0
        self._n_done = 0
        """Parts that are whole, from the first on."""
        try:
            with _writing(self._path):
                self._lock.acquire()
        except Timeout as error:
            raise ClusterError(
                f"another process has been writing {self._path} for {_LOCK_SECONDS} s; end it and try again"
            ) from error

    def resume(self) -> None:
        """Take over the parts that an earlier attempt finished; their digests are checked again."""
        is_new = not self._path.exists()
        with _writing(self._path):
            self._file = self._path.open("w+b" if is_new else "r+b")
            self._file.write(self.recipe.header)
        size = self._path.stat().st_size
        for piece, offset in zip(self.recipe.pieces, self._offsets, strict=True):
            if is_new or offset + piece.n_bytes > size or _digest(self._path, offset, piece.n_bytes) != piece.sha256:
                break
            self._n_done += 1

    def missing(self) -> tuple[int, int] | None:
        """The next part that is nowhere on this machine, and from which byte on; None when all are here."""
        while self._n_done < len(self.recipe.pieces):
            if not self._copy(self._n_done):
                self._digest = hashlib.sha256()
                self._n_written = 0
                return self._n_done, 0
            self._n_done += 1
        return None

    def _copy(self, index: int) -> bool:
        piece = self.recipe.pieces[index]
        found = self._store.find(self.recipe, piece)
        if found is None:
            return False
        digest = hashlib.sha256()
        try:
            with _writing(self._path):
                self._file.seek(self._offsets[index])
                for block in blocks(*found, piece.n_bytes):
                    digest.update(block)
                    self._file.write(block)
        except ModelError:
            return False
        return digest.digest() == piece.sha256

    def write(self, index: int, offset: int, data: bytes) -> bool:
        """Take the bytes that come next of the part that `missing` named; True when it is whole.

        Raises ProtocolError for other bytes, ClusterError where they cannot be written."""
        piece = self.recipe.pieces[self._n_done]
        if index != self._n_done or offset != self._n_written or not 0 < len(data) <= piece.n_bytes - offset:
            raise ProtocolError(
                f"bytes {offset} of part {index} came; {self._n_written} of {self._n_done} were awaited"
            )
        with _writing(self._path):
            self._file.seek(self._offsets[index] + offset)
            self._file.write(data)
        self._digest.update(data)
        self._n_written += len(data)
        if self._n_written < piece.n_bytes:
            return False
        if self._digest.digest() != piece.sha256:
            raise ProtocolError(f"part {index} of the window is not what its SHA-256 says; check the model on the head")
        self._n_done += 1
        return True

    def finish(self) -> Path:
        """Put the whole file in its place. Raises ModelBroken for a header that llama.cpp would fall over, ClusterError
        where it cannot be written."""
        with _writing(self._path):
            self._file.truncate(self.recipe.n_bytes)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        values = read_header(self._path)
        check_header(values, self._path)
        if values.get("general.architecture") not in ARCHITECTURES:
            raise ModelUnsupported(f"windows of a {str(values.get('general.architecture'))[:32]} are not known here")
        path = self._store.path(self.recipe)
        places = {p.sha256.hex(): offset for p, offset in zip(self.recipe.pieces, self._offsets, strict=True)}
        _replace(path.with_name(path.stem + ".parts.json"), json.dumps(places))
        with _writing(path):
            self._path.replace(path)
        self.close()
        return path

    def close(self) -> None:
        """Leave the file as it is, to go on with another time."""
        try:
            if self._file is not None:
                with _writing(self._path):
                    self._file.close()
        finally:
            self._lock.release()


def _digest(path: Path, offset: int, n_bytes: int) -> bytes:
    sha = hashlib.sha256()
    for block in blocks(path, offset, n_bytes):
        sha.update(block)
    return sha.digest()


def _replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with _writing(path), replacing(path) as part:
        part.write_text(text)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system says against writing a file, as ClusterError."""
    try:
        yield
    except Timeout:  # of a lock, which counts among these
        raise
    except OSError as error:
        raise ClusterError(f"{path} cannot be written: {error.strerror}; free some space, or {_ELSEWHERE}") from error
