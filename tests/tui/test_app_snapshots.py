"""The screens as pictures, at both sizes and in both themes."""

import pytest

from localreason.tui.app import ChatApp
from localreason.tui.conversation import Mark
from localreason.tui.history import History
from localreason.tui.widgets.nodes import NodeState
from tests.tui.stage import PARALLEL, SAFE, Backend, Stage

THOUGHT = "17 * 20 is 340, and 17 * 3 is 51.\n\nWait, 340 + 51 = 391. That fits."
MARKS = (Mark(35, "think", "forced", "Wait"), Mark(56, "think", "suppressed", "tentative answer '391'"))
ENTROPIES = [0.1, 0.4, 1.2, 0.9, 0.3, 0.2, 0.8, 1.6, 0.7, 0.2, 0.1, 0.5]
ANSWER = r"""The product is \(17 \cdot 23 = 391\):

1. \(17 \cdot 20 = 340\)
2. \(17 \cdot 3 = 51\)

```python
print(17 * 23)
```
"""


async def welcome(stage):
    pass


async def thinking(stage):
    await stage.ask()
    stage.script.think(THOUGHT, marks=MARKS, entropies=ENTROPIES, n_tokens=48)


async def answered(stage):
    await thinking(stage)
    await stage.reply(ANSWER, "")


async def explained(stage):
    await answered(stage)
    await stage.press("shift+tab", "m")


async def race(stage):
    await stage.ask()
    for i in range(4):
        stage.script.think(f"Way {i}: {THOUGHT}", sample=i, n_tokens=40 + i)
    stage.script.answer("391", sample=1)
    await stage.settle()
    stage.script.end(winner=1)


async def nodes(stage):
    await answered(stage)
    attic = NodeState("attic", ((0, 9), (18, 22)), 0.0012, 0.64)
    stage.backend.machines = (attic, NodeState("head", ((9, 18), (22, 28))), NodeState("cellar", state="lost"))
    stage.chat.show_nodes()


async def presets(stage):
    await stage.press("f3")


async def keys(stage):
    await stage.press("f1")


async def starter(stage):
    pass


async def light(stage):
    await answered(stage)
    await stage.press("ctrl+l")


SCENES = {s.__name__: s for s in (welcome, thinking, answered, explained, race, nodes, presets, keys, starter, light)}


SMALL = [(name, (80, 24)) for name in SCENES]
LARGE = [(name, (120, 40)) for name in ("thinking", "answered", "race", "nodes", "starter")]


@pytest.mark.parametrize(("name", "size"), SMALL + LARGE, ids=[f"{n}-{w}x{h}" for n, (w, h) in SMALL + LARGE])
def test_screen(name, size, tmp_path, snap_compare):
    backend = Backend()
    with History(tmp_path / "chats.sqlite3") as history:
        recipe, preset = (PARALLEL, "parallel") if name == "race" else (SAFE, "safe")
        app = ChatApp(backend, history, recipe, preset, None if name == "starter" else "scripted")
        app.animation_level = "none"

        async def perform(pilot):
            stage = Stage(app, backend, pilot)
            await stage.settle()
            await SCENES[name](stage)
            await stage.settle()
            stage.chat.composer.cursor_blink = False
            await stage.settle()

        assert snap_compare(app, terminal_size=size, run_before=perform)
