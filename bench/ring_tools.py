"""How the cases of a comparison take turns, and what runs beside the ring while it is measured."""

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time


class Turns:
    """Speeds of cases that take turns forth and back, so that in each turn all have the same mean time: a machine that
    becomes slower does so for all. `parts` are what a case gives several speeds for, each a name of its own then."""

    def __init__(self, cases, n_turns, parts=()):
        found = {}

        def run(name):
            speeds = cases[name]()
            for part, speed in zip(parts, speeds, strict=True) if parts else [(None, speeds)]:
                found.setdefault(name if part is None else f"{name}, {part}", []).append(speed)

        names = list(cases)
        for name in names:
            cases[name]()  # a warm-up
        for _ in range(n_turns):
            for name in names + names[::-1]:
                run(name)
        # Twice the same work: the speed of both together.
        self._speeds = {
            name: [2 / (1 / a + 1 / b) for a, b in zip(speeds[::2], speeds[1::2], strict=True)]
            for name, speeds in found.items()
        }

    def medians(self):
        return {name: statistics.median(speeds) for name, speeds in self._speeds.items()}

    def ratios(self, pairs):
        """Of each pair the median of the turns' ratios, with their quartiles."""
        found = {}
        for one, other in pairs:
            each = [a / b for a, b in zip(self._speeds[one], self._speeds[other], strict=True)]
            low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
            found[f"{one}, to {other}"] = {"ratio": middle, "low": low, "high": high}
        return found


@contextlib.contextmanager
def awake_cores():
    """A process of Linux's idle class on every core."""
    spin = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); print(flush=True)\nwhile True: pass"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}}); {spin}"], stdout=subprocess.PIPE
        )
        for core in os.sched_getaffinity(0)
    ]
    try:
        for process in processes:
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def hold_back(port, delay, ready):
    """A proxy of a port that holds every byte back for some seconds in each direction; its own port goes to `ready`."""

    async def pipe(reader, writer):
        waiting = asyncio.Queue()

        async def later():
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if not data:
                    writer.close()
                    return
                writer.write(data)

        task = asyncio.create_task(later())
        while data := await reader.read(1 << 16):
            waiting.put_nowait((time.perf_counter() + delay, data))
        waiting.put_nowait((0, b""))
        await task

    async def accept(reader, writer):
        there = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError):
            await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

    async def main():
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        ready.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())
