"""What runs beside the ring while it is measured, and how its logits are compared."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time

import numpy as np

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def stay_on_core(number):
    """Bind this thread, and those that it starts, to one core, as on a machine of its own, where the system can."""
    if CORES:
        os.sched_setaffinity(0, {CORES[number % len(CORES)]})


@contextlib.contextmanager
def on_core(number):
    """What is started in here is bound to that core."""
    before = os.sched_getaffinity(0) if CORES else ()
    stay_on_core(number)
    try:
        yield
    finally:
        if CORES:
            os.sched_setaffinity(0, before)


@contextlib.contextmanager
def awake_cores():
    """A process of Linux's idle class on every core."""
    spin = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); print(flush=True)\nwhile True: pass"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}}); {spin}"], stdout=subprocess.PIPE
        )
        for core in CORES
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
        if CORES:
            os.sched_setaffinity(0, CORES)  # a link takes no core of a machine's
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        ready.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def _log_softmax(x):
    x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def compare(rows, base):
    """Of two sets of logits: divergences in nats, and the largest difference over the largest logit."""
    one, other = _log_softmax(base), _log_softmax(rows)
    divergence = (np.exp(one) * (one - other)).sum(axis=1)
    return {
        "mean_kl": float(divergence.mean()),
        "most_kl": float(divergence.max()),
        "same_top": float((rows.argmax(1) == base.argmax(1)).mean()),
        "far": float(np.abs(rows - base).max() / np.abs(base).max()),
    }
