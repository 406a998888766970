"""Headers of model files that stay on Hugging Face: only the ranges of bytes that are read are fetched."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from ..quant.source import Fetch, read_remote
from ..runtime.errors import ModelError, ModelNotFound
from ..runtime.parts import Piece
from .hub import Hub, RemoteFile, mapped
from .store import CATALOGUE, REFERENCE, choose_file

_DEADLINE_SECONDS = 20.0
PREFIX = "hf://"


def read_published(reference: str, hub: Hub) -> list[Piece]:
    """The headers of all parts of a published model by a name of the catalogue, OWNER/REPO:QUANT, OWNER/REPO/FILE.gguf
    or the latter behind hf://. Raises ModelNotFound, ModelBroken, ModelError."""
    target = CATALOGUE[reference].reference if reference in CATALOGUE else reference.removeprefix(PREFIX)
    match = REFERENCE.fullmatch(target)
    if not match:
        raise ModelNotFound(
            f"{reference!r} names no published model; give OWNER/REPO:QUANT or hf://OWNER/REPO/FILE.gguf"
        )
    repository = f"{match['owner']}/{match['repo']}"
    return read_files(repository, choose_file(hub.files(repository), repository, match["scheme"], match["file"]))


def read_files(repository: str, files: Iterable[RemoteFile]) -> list[Piece]:
    """The headers of all parts of a model. Raises ModelBroken, ModelError."""
    return [
        read_remote(f"{PREFIX}{repository}/{file.name}", file.n_bytes, ranges(repository, file.name)) for file in files
    ]


def ranges(repository: str, name: str) -> Fetch:
    """How bytes of a published file are fetched. The fetch raises ModelError where the Hub does not send them."""
    import huggingface_hub
    from huggingface_hub import utils

    url = huggingface_hub.hf_hub_url(repository, name)

    def fetch(start: int, n_bytes: int) -> bytes:
        wanted = {"Range": f"bytes={start}-{start + n_bytes - 1}", "Accept-Encoding": "identity"}
        headers = {**utils.build_hf_headers(library_name="localreason"), **wanted}
        with mapped(repository), _open(utils.get_session(), url, headers) as response:
            if response.status_code == 200 and response.headers.get("Content-Length") != str(n_bytes):
                raise ModelError(
                    f"the server of {url} sends whole files only, not {n_bytes} bytes of one; "
                    f"run `localreason models pull {repository}/{name}`"
                )
            body = _body(response)
            utils.hf_raise_for_status(response)
            return body

    return fetch


def _open(session: Any, url: str, headers: dict[str, str]) -> AbstractContextManager[Any]:
    """A response whose body has not been read: httpx of newer huggingface_hubs, requests of older ones."""
    if callable(getattr(session, "stream", None)):
        return session.stream("GET", url, headers=headers, timeout=_DEADLINE_SECONDS)
    return session.get(url, headers=headers, timeout=_DEADLINE_SECONDS, stream=True)


def _body(response: Any) -> bytes:
    return response.read() if hasattr(response, "read") else response.content
