"""The Hugging Face Hub as the store sees it: list a repository's files, fetch one."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..runtime.errors import ModelError, ModelNotFound, OutputError

_DEADLINE_SECONDS = 20.0
_MOST_BYTES = 50_000_000_000
"""The Hub's limit for a file by plain HTTP."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; size and SHA-256 are the Hub's own record of it."""

    name: str
    n_bytes: int
    sha256: str | None


def begun(folder: Path, file: RemoteFile) -> Path:
    """Where what has arrived of a file is kept; of another content under the same name it is of no use."""
    path = folder / file.name
    return path.with_name(f"{path.name}.{file.sha256[:16] if file.sha256 else 'unknown'}.part")


class Hub(Protocol):
    """What pulling needs. Raises ModelNotFound or ModelError with the remedy."""

    def files(self, repository: str) -> list[RemoteFile]:
        """All files of a repository."""
        ...

    def download(self, repository: str, file: RemoteFile, folder: Path) -> Path:
        """Fetch a file into a folder, going on where an earlier attempt stopped; return its path."""
        ...


class HuggingFace:
    """The real Hub, by huggingface_hub; `endpoint` None is the library's own choice."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def files(self, repository: str) -> list[RemoteFile]:
        import huggingface_hub

        with mapped(repository):
            api = huggingface_hub.HfApi(endpoint=self._endpoint, library_name="localreason")
            info = api.model_info(repository, files_metadata=True, timeout=_DEADLINE_SECONDS)
        return [
            RemoteFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else None)
            for item in info.siblings or []
        ]

    def download(self, repository: str, file: RemoteFile, folder: Path) -> Path:
        """By the library's `http_get`: its `hf_hub_download` gives up what has arrived when it is interrupted."""
        import huggingface_hub
        from huggingface_hub.file_download import http_get

        if file.n_bytes > _MOST_BYTES:
            raise ModelError(
                f"{file.name} has {file.n_bytes / 1e9:.0f} GB and the Hub sends files of {_MOST_BYTES / 1e9:.0f} GB at "
                f"most; choose a smaller one or one in parts"
            )
        path, part = folder / file.name, begun(folder, file)
        with mapped(repository):
            url = huggingface_hub.hf_hub_url(repository, file.name, endpoint=self._endpoint)
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("ab") as opened:
                if file.sha256 is None or opened.tell() > file.n_bytes:
                    opened.truncate(0)
                http_get(
                    url,
                    opened,
                    resume_size=opened.seek(0, os.SEEK_END),
                    headers=huggingface_hub.utils.build_hf_headers(library_name="localreason"),
                    expected_size=file.n_bytes or None,
                    displayed_filename=path.name,
                )
            part.replace(path)
        return path


@contextlib.contextmanager
def mapped(repository: str) -> Iterator[None]:
    """The library's errors as ours."""
    from huggingface_hub import errors

    # The HTTP library's own root error; which library that is depends on the version of huggingface_hub.
    network: tuple[Any, ...] = (
        errors.HfHubHTTPError.__bases__[0],
        ConnectionError,
        TimeoutError,
        errors.LocalEntryNotFoundError,
    )
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated; accept its terms on huggingface.co and set HF_TOKEN, or choose another model"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFound(
            f"there is no repository {repository} on Hugging Face; `localreason models list` names some that exist"
        ) from error
    except network as error:
        raise ModelError(
            f"Hugging Face cannot be reached for {repository} ({_first_line(error)}); check the network and try again, "
            f"or fetch the file elsewhere and give its path to --model"
        ) from error
    except OSError as error:
        raise OutputError(f"{repository} cannot be stored: {error.strerror or _first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
