"""The files that `localreason quant choose` considers: named, stored, or published."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from ..quant.choose import Candidate, describe, find_scheme
from ..quant.gguf import ModelFile
from ..runtime.errors import InputError, ModelError, ModelNotFound
from ..runtime.header import Header
from ..runtime.parts import part_names, stem
from ..runtime.schemes import KINDS, MAIN_SCHEMES, SCHEMES
from . import build, store
from .hub import Hub, RemoteFile
from .remote import read_files
from .say import tell

_SIZE_WORD = re.compile(r"_(?:XXS|XS|S|M|L|XL|NL)$")


@dataclass(frozen=True, slots=True)
class Source:
    """A candidate, and the file whose tensor table stands for it: its own, or that of another scheme of the model."""

    candidate: Candidate
    file: ModelFile


def find_sources(context: typer.Context, files: list[str], repositories: list[str], folder: Path) -> list[Source]:
    """What is named, or else all models of the store. Raises ModelError."""
    if not files and not repositories:
        return _stored(folder)
    named = {name: _local(name, folder) for name in dict.fromkeys(files)}
    taken = Counter(source.candidate.name for source in named.values())
    sources = [_named(one, name) if taken[one.candidate.name] > 1 else one for name, one in named.items()]
    for repository in repositories:
        sources += _published(repository, build.wiring(context).hub(), folder)
    return sources


def _local(name: str, folder: Path) -> Source:
    path = store.find(name, folder)
    if path is None:
        raise ModelNotFound(f"{name} is not on this machine; run `localreason models pull {name}`, or give --hf")
    return _read(path)


def _read(path: Path) -> Source:
    """A file, or the model of which it is a part, called after the file. Raises ModelError."""
    file = ModelFile(path)
    return Source(describe(file.header, path.name, path.name), file)


def _named(source: Source, name: str) -> Source:
    return replace(source, candidate=replace(source.candidate, name=name))


def _stored(folder: Path) -> list[Source]:
    """All models of the store that can be read; the others are named."""
    found = []
    for item in store.list_stored(folder) if folder.is_dir() else []:
        try:
            found.append(_named(_read(item.path), item.path.relative_to(folder).as_posix()))
        except (ModelError, InputError) as error:
            tell(f"passed over: {error}")
    if not found:
        raise ModelNotFound("there are no models on this machine; name files, or a repository with --hf OWNER/REPO")
    return found


def _published(repository: str, hub: Hub, folder: Path) -> list[Source]:
    """The models of a repository whose names say their scheme: their sizes by the hub, all else by one header."""
    models = dict[str, list[RemoteFile]]()
    for item in sorted(hub.files(repository), key=lambda item: item.name):
        name = stem(item.name)
        if item.name.endswith(".gguf") and not store.is_projector(item.name) and find_scheme(name):
            models.setdefault(name, []).append(item)
    whole = {name: files for name, files in models.items() if [f.name for f in files] == part_names(files[0].name)}
    if not whole:
        raise ModelNotFound(
            f"{repository} has no whole GGUF model whose name says its scheme, such as Q8_0; name another"
        )
    sizes = {name: sum(item.n_bytes for item in files) for name, files in whole.items()}
    least = min(sizes, key=lambda name: sizes[name])
    file = _table(repository, whole[least], folder)
    like = describe(file.header, least)
    found = []
    for name, n_bytes in sizes.items():
        scheme, n_bits = find_scheme(name) or ("", 0)
        bits = 8 * n_bytes / like.n_parameters
        one = replace(
            like,
            name=f"{repository}/{name}",
            n_bytes=n_bytes,
            bits_per_weight=bits,
            n_bits=n_bits,
            scheme=scheme,
            source_scheme="",
            has_imatrix=False,
            header=_retyped(file.header, scheme),
        )
        found.append(Source(one, file))
    return found


def _retyped(header: Header, name: str) -> Header:
    """The header with its packed matrices in another scheme, where that is known and their rows fill its blocks."""
    scheme = SCHEMES.get(main_type(name))
    if scheme is None:
        return header
    tensors = [
        replace(entry, kind=scheme.kind)
        if entry.kind in KINDS and not KINDS[entry.kind].is_float and not entry.shape[0] % scheme.n_values
        else entry
        for entry in header.tensors
    ]
    return replace(header, tensors=tensors)


def main_type(scheme: str) -> str:
    """The type of most tensors in a scheme, as far as its name says it: Q2_K for Q2_K_XL."""
    return MAIN_SCHEMES[scheme].name if scheme in MAIN_SCHEMES else _SIZE_WORD.sub("", scheme)


def _table(repository: str, files: list[RemoteFile], folder: Path) -> ModelFile:
    """The tensor table of a published model, from the store if it is there, else by its header alone."""
    path = folder / repository / files[0].name
    return ModelFile(path) if path.is_file() else ModelFile(path, read_files(repository, files))
