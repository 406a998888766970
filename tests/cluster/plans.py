"""Cases for plans: small random ones with every ring that there is, and the worked example of the reference."""

import heapq
import itertools
import math
import random
from dataclasses import replace

from localreason.cluster.costs import Links, ModelCosts
from localreason.cluster.device import Device

GIB = 1 << 30


def device(name="head", memory=100, speed=10.0, gpu=0, gpu_speed=0.0, disk=5.0, bandwidth=50.0, prefill=400.0):
    return Device(
        name=name,
        memory_bytes=memory,
        weight_speeds={"Q4_K": speed, "Q6_K": speed * 0.8},
        prefill_speeds={"Q4_K": prefill, "Q6_K": prefill * 0.7},
        memory_bandwidth=bandwidth,
        disk_sequential=disk,
        disk_random=disk,
        gpu_name="gpu" if gpu else "",
        gpu_memory_bytes=gpu,
        gpu_speed=gpu_speed,
    )


def costs(layers=(10,) * 4, types=None, cache=1, n_context=2, output=5, **others):
    types = types or ("Q4_K",) * len(layers)
    return ModelCosts(tuple(layers), tuple(types), cache, n_context, output, "Q6_K", 1, **others)


def random_case(seed, is_alike=False):
    """A small model, one to three devices, links, and whether the disk is allowed. On every third machine steps of
    some samples were timed, and need not grow evenly."""
    draw = random.Random(seed)
    n_layers = draw.randint(2, 5)
    layers = [draw.randint(5, 20)] * n_layers if is_alike else [draw.randint(5, 20) for _ in range(n_layers)]
    types = ["Q4_K"] * n_layers if is_alike else [draw.choice(["Q4_K", "Q6_K"]) for _ in range(n_layers)]
    model = costs(layers, types, draw.randint(0, 2), draw.randint(1, 3), draw.randint(0, 12), scratch_bytes=2)
    devices = [
        device(
            f"d{i}",
            draw.randint(15, 90),
            draw.uniform(3, 30),
            *draw.choice([(0, 0.0), (draw.randint(5, 50), draw.uniform(2, 200))]),
            disk=draw.uniform(2, 40),
            prefill=draw.uniform(100, 900),
        )
        for i in range(draw.randint(1, 3))
    ]
    timed = {kind: tuple(n * draw.uniform(0.4, 1.2) for n in (2, 4, 8, 16)) for kind in ("Q4_K", "Q6_K")}
    devices = [replace(one, row_costs=timed if seed % 3 == 0 else {}) for one in devices]
    names = [d.name for d in devices]
    pairs = {
        (a, b): (draw.uniform(0, 0.5), draw.uniform(2, 100))
        for a in names
        for b in names
        if a != b and draw.random() < 0.7
    }
    return model, devices, Links(pairs, (0.2, 30.0)), draw.random() < 0.4


def step(model, one, layers, n_gpu, is_output_there, is_head, is_disk, n_rounds, n_rows):
    """Seconds of computing, of reading, and of reading late, from the definition; None where it does not fit."""
    cells = model.cache_bytes * model.n_context
    on_cpu, on_gpu = layers[: len(layers) - n_gpu], layers[len(layers) - n_gpu :]

    def times(n_bytes, kind):
        """On the CPU one row and what all rows are in a prompt, or all one by one; on the GPU the weights are read
        once, until so many rows are slower than that."""
        speed, prefill = one.weight_speed(kind), one.prefill_speed(kind)
        rows = n_rows * n_bytes / prefill
        seconds = min(n_rows * n_bytes / speed, n_bytes / speed + rows)
        if kind in one.row_costs:
            timed = [(1, 1.0), *zip((2, 4, 8, 16), one.row_costs[kind], strict=True)]
            (n, cost), (m, more) = next(pair for pair in itertools.pairwise(timed) if n_rows <= pair[1][0])
            seconds = (cost + (more - cost) * (n_rows - n) / (m - n)) * n_bytes / speed
        return seconds, max(n_bytes / speed, rows) * speed / one.gpu_speed if one.gpu_speed else math.inf

    layer_times = {i: times(model.layer_bytes[i], model.layer_type[i]) for i in layers}
    busy = sum(layer_times[i][0] + n_rows * cells / one.memory_bandwidth for i in on_cpu)
    ram, gpu = sum(model.layer_bytes[i] for i in on_cpu), sum(model.layer_bytes[i] + cells for i in on_gpu)
    if on_gpu or is_output_there:
        if not one.gpu_speed:
            return None
        busy += sum(layer_times[i][1] + n_rows * cells / one.gpu_speed for i in on_gpu)
    if is_head and is_output_there:
        busy += times(model.output_bytes, "Q6_K")[1]
        gpu += model.output_bytes
    elif is_head:
        busy += times(model.output_bytes, "Q6_K")[0]
        ram += model.output_bytes
    if (on_gpu or is_output_there) and gpu + model.scratch_bytes > one.gpu_memory_bytes:
        return None
    room = one.memory_bytes - model.scratch_bytes - len(on_cpu) * cells
    if room < 0 or (ram > room and not is_disk):
        return None
    return busy, max(0, ram - room) / one.disk_sequential, max(0, ram - n_rounds * room) / one.disk_sequential


def everything(model, devices, links, is_disk, n_rounds=1, n_samples=None):
    """(seconds of a token, seconds between tokens of all samples) of every ring that fits, the samples spread over one
    batch, two, four and so on."""
    head, *workers = devices
    batches = (1, 2, 4, 8, 16)
    for n, n_rows in itertools.product(range(len(workers) + 1), {math.ceil((n_samples or 1) / b) for b in batches}):
        row = 4 * model.n_embd
        for chosen in itertools.permutations(workers, n):
            ring = [*chosen, head]
            hops = list(zip(ring, [*ring[1:], ring[0]], strict=True)) if n else []
            hop = n_rounds * sum(links.seconds(a.name, b.name, row) for a, b in hops)
            rows_hop = n_rounds * sum(links.seconds(a.name, b.name, n_rows * row) for a, b in hops)
            use = n_rounds * max((links.transfer_seconds(a.name, b.name, n_rows * row) for a, b in hops), default=0)
            for cuts in itertools.combinations(range(1, model.n_layers), n):
                bounds = [0, *cuts, model.n_layers]
                runs = [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
                if min(map(len, runs)) < n_rounds:
                    continue
                options = []
                for one, layers in zip(ring, runs, strict=True):
                    places = [(0, False)] + [(g, one is head) for g in range(len(layers) + 1) if one.gpu_speed]
                    found = [
                        [step(model, one, layers, g, there, one is head, is_disk, n_rounds, r) for r in (1, n_rows)]
                        for g, there in places
                    ]
                    options.append([entry for entry in found if entry[0]])
                for parts in itertools.product(*options):
                    total, sum_of_rows = (
                        hops + sum(busy + late for busy, _, late in steps)
                        for hops, steps in zip((hop, rows_hop), zip(*parts, strict=True), strict=True)
                    )
                    bound, slowest = (max(busy + read for busy, read, _ in steps) for steps in zip(*parts, strict=True))
                    between = max(slowest, use)
                    if n_samples:
                        between = max(math.ceil(n_samples / n_rows) * between, sum_of_rows) / n_samples
                    yield max(total, bound), between


def pass_round(stages, hops, n_rounds, n_batches):
    """Seconds until all batches are through, each machine serving what comes first: `stages` and `hops` of one batch in
    all rounds, by machine, the head last. Two batches a machine are under way."""
    n, free, events, issued = len(stages), [0.0] * len(stages), [], itertools.count()

    def issue(now):
        if (number := next(issued)) < n_batches:
            heapq.heappush(events, (now + hops[-1] / n_rounds, number, 0))

    for _ in range(2 * n):
        issue(0.0)
    done = 0.0
    while events:
        now, number, hop = heapq.heappop(events)
        machine = hop % n
        done = free[machine] = max(now, free[machine]) + stages[machine] / n_rounds
        if hop == n * n_rounds - 1:
            issue(done)
        else:
            heapq.heappush(events, (done + hops[machine] / n_rounds, number, hop + 1))
    return done


def best(values, key):
    return min(values, key=key, default=None)


def worked_example():
    """Section 3 of the reference; C's 0.3 GiB of swap count as memory, compute buffers are taken off."""
    mib, cell, n_cells = 1 << 20, 2048, 2048
    model = ModelCosts((200_000_000,) * 28, ("Q4_K",) * 28, cell, n_cells, 400_003_000, "Q6_K", 1, value_bytes=1)

    def machine(name, gflops, ram_bandwidth, memory, **others):
        layer, output = 0.6 / gflops + 0.2 / ram_bandwidth, 0.8 / gflops + 0.400003 / ram_bandwidth
        return Device(
            name=name,
            memory_bytes=memory,
            weight_speeds={"Q4_K": 200e6 / layer, "Q6_K": 400.003e6 / output},
            prefill_speeds={"Q4_K": 1e12},
            memory_bandwidth=ram_bandwidth * 1e9,
            **others,
        )

    on_gpu = 0.6 / 6000 + (0.2 + cell * n_cells / 1e9) / 300
    devices = [
        machine("A", 200, 25, 2 * GIB - 200 * mib, disk_sequential=2e9),
        machine(
            "B",
            300,
            40,
            GIB - 200 * mib,
            disk_sequential=1e9,
            gpu_name="gpu",
            gpu_memory_bytes=3 * GIB - 700 * mib,
            gpu_speed=(200e6 + cell * n_cells) / on_gpu,
        ),
        machine("C", 50, 10, int(1.5 * GIB) - 100 * mib, disk_sequential=0.8e9),
    ]
    free = 1e30
    links = Links({("A", "B"): (0.002, free), ("B", "C"): (0.0021, free), ("C", "A"): (0.006, free)})
    return model, devices, links
