"""Makes a quantised file of another by llama.cpp: the size is known before, and the file appears whole or not at all.

The conversion runs in a process of its own (`quantizer.py`). It writes beside the target under a name that says whose
it is; what a killed run left there is removed by the next one.
"""

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from ..runtime.errors import EngineError, OutputError
from ..runtime.files import replacing, sweep
from ..runtime.schemes import FTYPES, SCHEMES, find_file_type
from .gguf import ModelFile, Tensor, padded
from .imatrix import Importance, read_importance
from .job import Job, run_job
from .request import LONGEST_VALUE, Request, check_asked, check_importance, check_source, check_types, find_type
from .weights import IMATRIX, RECORD, source_scheme

_LONGEST_KEY = 127
"""Bytes that llama.cpp has room for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will make: `types` by tensor and `n_bytes` of the file are exact."""

    source: ModelFile
    scheme: str
    types: Mapping[str, str]
    n_bytes: int
    job: Job
    warnings: tuple[str, ...] = ()
    """What will be otherwise than asked."""

    @property
    def bits_per_weight(self) -> float:
        n_weights = sum(_n_values(tensor) for tensor in self.source.tensors.values())
        return 8 * sum(_n_bytes(self.source.tensors[name], kind) for name, kind in self.types.items()) / n_weights

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each type."""
        return dict(Counter(self.types.values()).most_common())


Report = Callable[[int, int, str], None]
"""Told of each tensor begun: source bytes done, source bytes in all, its name."""


def plan_conversion(source: Path, request: Request) -> Plan:
    """Check everything that can be known before, and find out types and size by a dry run of llama.cpp.

    Raises ModelError, InputError, or EngineError where llama.cpp refuses.
    """
    file, name = ModelFile(source), find_file_type(request.scheme)
    check_source(file, request)
    importance = None
    if request.imatrix is not None:
        importance = read_importance(request.imatrix)
        check_importance(file, importance, request.imatrix)
    job = Job(
        str(source.absolute()),
        None,
        FTYPES[name],
        tensors=[(pattern, find_type(kind)) for pattern, kind in request.tensors],
        output_type=find_type(request.output_type) if request.output_type else None,
        embedding_type=find_type(request.embedding_type) if request.embedding_type else None,
        is_pure=request.is_pure,
        allows_requantize=request.allows_requantize,
        imatrix=str(request.imatrix.absolute()) if request.imatrix else None,
        values=_record(file, name, request, importance),
    )
    types, header_bytes = _dry_run(file, job)
    check_types(file, types, importance, name)
    warnings = check_asked(file, types, request)
    data = sum(padded(_n_bytes(file.tensors[tensor], kind)) for tensor, kind in types.items())
    return Plan(file, name, types, header_bytes + data, job, tuple(warnings))


def check_target(source: Path, target: Path, is_forced: bool = False) -> None:
    """Refuse a target that would destroy something or cannot be written. Raises OutputError."""
    if not target.parent.is_dir():
        raise OutputError(f"there is no folder {target.parent} to write {target.name} in; make it or name another file")
    try:
        is_there = target.exists()
        if not is_there and target.is_symlink():  # it would be replaced by a file in another place than is meant
            raise OutputError(f"{target} is a link to {target.readlink()}, which is not there; name another file")
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; name another file") from error
    if is_there:
        if target.samefile(source):
            raise OutputError(f"{target} is the source itself; name another file")
        if not target.is_file():
            raise OutputError(f"{target} is not a regular file; name another one")
        if not is_forced:
            raise OutputError(f"{target} is there already; give --force to replace it, or name another file")


def convert(
    plan: Plan,
    target: Path,
    source_sha256: str,
    is_forced: bool = False,
    n_threads: int = 1,
    report: Report | None = None,
    free_bytes: Callable[[Path], int] | None = None,
) -> float:
    """Write the planned file and return the seconds that took; whatever ends it early, no half file stays.

    `source_sha256` goes into the new file's metadata. Raises OutputError, EngineError.
    """
    check_target(plan.source.path, target, is_forced)
    sweep(target.parent)
    free = (free_bytes or disk_bytes)(target.parent)
    if plan.n_bytes > free:
        raise OutputError(
            f"the new file takes {plan.n_bytes} bytes and {target.parent} has {free} free; "
            f"free space, choose a smaller scheme or another folder"
        )
    values = {**plan.job.values, f"{RECORD}source_sha256": source_sha256}
    started = time.monotonic()
    try:
        with replacing(target) as part:
            _write(plan, replace(plan.job, target=str(part), n_threads=n_threads, values=values), report)
            _check_result(plan, part)
            check_target(plan.source.path, target, is_forced)  # another process may have made it meanwhile
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}; name another file") from error
    return time.monotonic() - started


def _record(file: ModelFile, name: str, request: Request, importance: Importance | None) -> dict[str, str | int | bool]:
    """What the new file says of its origin; what an earlier conversion said is emptied."""
    values: dict[str, str | int | bool] = {
        key: "" for key in file.header.values if key.startswith(RECORD) and len(key.encode()) <= _LONGEST_KEY
    }
    # What the source was made with says nothing of types that are chosen without it.
    values |= {
        key: "" if isinstance(value, str) else 0
        for key, value in file.header.values.items()
        if key.startswith(IMATRIX) and isinstance(value, (str, int)) and len(key.encode()) <= _LONGEST_KEY
    }
    said: dict[str, str | int | bool | None] = {
        "source": file.path.name,
        "source_sha256": "0" * 64,
        "source_scheme": source_scheme(file.header),
        "scheme": name,
        "output_type": request.output_type,
        "embedding_type": request.embedding_type,
        "pure": request.is_pure or None,
        "imatrix": request.imatrix.name if request.imatrix else None,
        "by": f"localreason {version('localreason')}, llama-cpp-python {version('llama-cpp-python')}",
    }
    said |= {f"tensors.{i}": f"{pattern}={kind}" for i, (pattern, kind) in enumerate(request.tensors)}
    values |= {RECORD + key: value for key, value in said.items() if value is not None}
    if importance is not None and request.imatrix is not None:
        values["quantize.imatrix.file"] = request.imatrix.name
        values["quantize.imatrix.entries_count"] = len(importance.entries)
        values["quantize.imatrix.chunks_count"] = importance.n_chunks
        if importance.dataset:
            values["quantize.imatrix.dataset"] = importance.dataset
    return {key: _fit(value) if isinstance(value, str) else value for key, value in values.items()}


def _fit(text: str) -> str:
    """As much of a text as llama.cpp takes, without half characters."""
    return text.encode("utf-8", "replace")[:LONGEST_VALUE].decode("utf-8", "ignore")


def _dry_run(file: ModelFile, job: Job) -> tuple[dict[str, str], int]:
    """The type of each tensor of the new file, and the bytes of its header."""
    types, header_bytes = {}, -1
    for event in run_job(job):
        if "tensor" in event:
            name = str(event["tensor"])
            types[name] = str(event["type"] or (file.tensors[name].type_name if name in file.tensors else "")).upper()
        header_bytes = event.get("header_bytes", header_bytes)
    if types.keys() != file.tensors.keys() or header_bytes < 0 or not SCHEMES.keys() >= set(types.values()):
        raise EngineError(
            f"llama.cpp planned {len(types)} of {len(file.tensors)} tensors of {file.path} in words that this version "
            f"does not know; update localreason"
        )
    return types, header_bytes


def _write(plan: Plan, job: Job, report: Report | None) -> None:
    tensors = plan.source.tensors
    total, done, size = sum(tensor.n_bytes for tensor in tensors.values()), 0, 0
    for event in run_job(job):
        if "tensor" in event and event["tensor"] in tensors:
            done, size = done + size, tensors[event["tensor"]].n_bytes
            if report is not None:
                report(done, total, event["tensor"])
    if report is not None:
        report(total, total, "")


def _check_result(plan: Plan, part: Path) -> None:
    """Compare what was written with the plan: a full disk is not always reported."""
    n_bytes = part.stat().st_size
    if n_bytes != plan.n_bytes:
        raise OutputError(
            f"{n_bytes} bytes were written and {plan.n_bytes} planned; is {part.parent} full? It has "
            f"{disk_bytes(part.parent)} bytes free"
        )
    made = {name: tensor.type_name for name, tensor in ModelFile(part).tensors.items()}
    if made != plan.types:
        wrong = next(name for name in plan.types if made.get(name) != plan.types[name])
        raise EngineError(f"llama.cpp made {wrong} {made.get(wrong)} where {plan.types[wrong]} was planned; try again")


def disk_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on."""
    return shutil.disk_usage(folder).free


def _n_values(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _n_bytes(tensor: Tensor, kind: str) -> int:
    """Bytes of a tensor's values in another type."""
    scheme = SCHEMES[kind]
    return _n_values(tensor) // scheme.n_values * scheme.n_bytes
