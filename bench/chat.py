"""The picture of the README: a question put to a real model in the chat, keys pressed meanwhile, the screen as SVG.

    python bench/chat.py --model MODEL.gguf [--size 100x34]

The last line is JSON. Written to bench/results/chat.svg.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from textual import events

from localreason.cli import build, config
from localreason.cli.chat_models import ChatBackend
from localreason.tui.app import ChatApp
from localreason.tui.history import History

QUESTION = "Lena reads 18 pages a day. Her book has 250 pages. After 9 days, how many pages are left?"
OUT = Path(__file__).parent / "results" / "chat.svg"


async def press(app: ChatApp) -> float:
    """Seconds from a key's arrival until the screen is painted with it."""
    composer = app.chat.composer
    key, wanted, painted = events.Key("x", "x"), composer.text + "x", asyncio.Event()
    key.set_sender(app)
    started = time.perf_counter()
    app.post_message(key)
    while composer.text != wanted:
        await asyncio.sleep(0)
    composer.call_after_refresh(painted.set)
    await painted.wait()
    return time.perf_counter() - started


async def picture(app: ChatApp, size: tuple[int, int], seconds: list[float]) -> str:
    """Ask, press keys while the model replies, unfold the thinking and go to its first mark; the screen."""
    async with app.run_test(size=size) as pilot:
        app.animation_level = "none"
        while app.dialogue.streamer is None:
            await pilot.pause(0.1)
        app.clear_notifications()
        app.chat.composer.insert(QUESTION)
        await pilot.press("enter")
        while app.dialogue.run is not None:
            seconds.append(await press(app))
            await pilot.pause(0.2)
        app.chat.composer.text = ""
        await pilot.press("shift+tab", "m")
        app.chat.transcript.scroll_home(animate=False)
        app.clear_notifications()
        await pilot.pause(0.5)
        return app.export_screenshot(title="localreason chat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--size", default="100x34")
    chosen = parser.parse_args()
    columns, rows = map(int, chosen.size.split("x"))
    flags = {name: getattr(chosen, name) for name in ("model", "preset", "seed", "threads")}
    settings = config.load(flags)
    recipe = build.make_recipe(settings)
    backend = ChatBackend(settings, recipe, build.Wiring())
    with tempfile.TemporaryDirectory() as folder, History(Path(folder) / "chats.sqlite3") as history:
        seconds: list[float] = []
        app = ChatApp(backend, history, recipe, chosen.preset, chosen.model)
        svg = asyncio.run(picture(app, (columns, rows), seconds))
        stats = app.dialogue.path[-1].stats
        backend.close()
    OUT.write_text(svg, encoding="utf-8")
    assert stats is not None
    row = {"model": stats.model, "thinking": stats.n_thinking, "answer": stats.n_answer, "stop": stats.stop}
    row |= {"tokens_per_second": round(stats.tokens_per_second, 1), "n_keys": len(seconds)}
    row |= {"key_ms_median": round(1000 * median(seconds), 1), "key_ms_worst": round(1000 * max(seconds), 1)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
