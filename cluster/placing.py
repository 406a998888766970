"""From a model file and measured machines to the windows of a ring: what the planner must know, and its answer."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..quant.gguf import ModelFile, Tensor
from ..runtime.memory import is_cache_possible
from ..runtime.room import cell_bytes
from .codec import MICRO_BATCH, VALUE_BYTES
from .costs import Links, ModelCosts
from .device import Device
from .errors import PlanImpossible
from .formation import HEAD, Assignment, Placement
from .plan import N_PROMPT, ROUNDS, Objective, Plan, plan

T = TypeVar("T")
HEAD_NAME = "head"
"""The head's name among devices."""
GUESSED = 0.3
"""Share of the tokens of a lone answer that are taken to be guessed right: less than was measured for solutions of
problems, for another text may repeat itself less."""
N_READ = 1024
"""Tokens of context that a typical step reads."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a plan is to be good at."""

    objective: Objective = "latency"
    n_in_flight: int | None = None
    is_disk_allowed: bool = False
    rounds: int = 0
    """0 leaves the choice to the plan."""
    n_batch: int = MICRO_BATCH
    guessed: float = 0.0
    """Share of a lone answer's tokens that the ring is expected to guess right."""

    @classmethod
    def of(cls, n_sequences: int, is_disk_allowed: bool = False, rounds: int = 0, n_batch: int = MICRO_BATCH) -> "Wish":
        """One sequence asks for latency, several for throughput."""
        if n_sequences == 1:
            return cls("latency", None, is_disk_allowed, rounds, n_batch)
        return cls("throughput", n_sequences, is_disk_allowed, rounds, n_batch)

    def plan(self, costs: ModelCosts, devices: Sequence[Device], links: Links) -> Plan:
        """The best ring, the head being the first device. Raises PlanImpossible."""
        return plan(
            costs,
            devices,
            links,
            self.objective,
            self.n_in_flight,
            self.is_disk_allowed,
            self.rounds or ROUNDS,
            self.n_batch,
            self.guessed,
        )

    def seconds(self, found: Plan) -> float:
        """Of what is wished for: a token, a token of all samples together, or a prompt of `N_PROMPT` tokens."""
        if self.objective == "prefill":
            return found.prefill_seconds(N_PROMPT)
        return found.throughput_seconds if self.objective == "throughput" else found.lone_seconds


def model_costs(
    file: ModelFile, n_context: int, cache_type: str, row_type: str = "f32", n_batch: int = MICRO_BATCH
) -> ModelCosts:
    """What the layers of a file weigh, with a cache of `n_context` cells."""
    layers = [file.layer(i) for i in range(file.n_layers)]
    kinds = []
    for layer in layers:
        weighed = Counter[str]()
        for tensor in layer:
            weighed[tensor.type_name] += tensor.n_bytes
        kinds.append(weighed.most_common(1)[0][0])
    n_experts, n_used = (_number(file, f"expert_{name}count") for name in ("", "used_"))
    n_ff = max(
        (
            tensor.shape[1] * (n_used if _is_experts(tensor) else 1)
            for layer in layers
            for tensor in layer
            if "ffn_up" in tensor.name
        ),
        default=4 * file.n_embd,
    )
    barred = frozenset(
        (first, end)
        for first in range(file.n_layers)
        for end in range(first + 1, file.n_layers + 1)
        if not file.is_window(first, end)
    )
    return ModelCosts(
        layer_bytes=tuple(sum(tensor.n_bytes for tensor in layer) for layer in layers),
        layer_type=tuple(kinds),
        cache_bytes=int(cell_bytes(file.header.values, cache_type) / file.n_layers),
        n_context=n_context,
        output_bytes=file.output.n_bytes,
        output_type=file.output.type_name,
        n_embd=file.n_embd,
        scratch_bytes=4 * n_batch * (8 * file.n_embd + 3 * n_ff + file.n_vocab) + (32 << 20),
        n_read=min(n_context, N_READ),
        value_bytes=VALUE_BYTES[row_type],
        barred=barred,
        expert_parts=tuple(
            sum(tensor.n_bytes for tensor in layer if _is_experts(tensor)) / sum(tensor.n_bytes for tensor in layer)
            for layer in layers
        ),
        expert_share=n_used / n_experts if 0 < n_used <= n_experts else 1.0,
    )


def _is_experts(tensor: Tensor) -> bool:
    """True for the matrices of all experts in one, of which a token is multiplied with a few."""
    return "_exps." in tensor.name


def _number(file: ModelFile, name: str) -> int:
    """A number of the architecture, 1 where there is none."""
    found = file.header.values.get(f"{file.architecture}.{name}")
    return found if isinstance(found, int) and found > 0 else 1


def with_gpu_layers(head: Device, n_gpu_layers: int | None, costs: ModelCosts) -> Device:
    """The head with room for at most so many layers on its GPU; None leaves it what it has."""
    if n_gpu_layers is None:
        return head
    if not n_gpu_layers:
        return replace(head, gpu_memory_bytes=0, gpu_speed=0.0)
    layers = sum(sorted(costs.layer_bytes)[:n_gpu_layers])
    room = layers + min(n_gpu_layers, costs.n_layers) * costs.held_cache_bytes + costs.scratch_bytes
    if n_gpu_layers > costs.n_layers:  # llama.cpp counts the output as a layer
        room += costs.output_bytes
    return replace(head, gpu_memory_bytes=min(head.gpu_memory_bytes, room))


def with_cache_type(file: ModelFile, wanted: str | None, find: Callable[[str], T]) -> tuple[str, T]:
    """What `find` makes of a type of cache, and the type: f16 where none is wanted, or q8_0 where f16 does not fit.
    Raises PlanImpossible."""
    try:
        return wanted or "f16", find(wanted or "f16")
    except PlanImpossible:
        if wanted is not None or not is_cache_possible(file.header, "q8_0"):
            raise
    return "q8_0", find("q8_0")


def types_of(file: ModelFile) -> list[str]:
    """The types of weights whose speed decides."""
    large = [tensor.type_name for tensor in file.tensors.values() if len(tensor.shape) > 1]
    return [name for name, _ in Counter(large).most_common(4)]


def placement_of(found: Plan, wish: Wish) -> Placement:
    """The plan as a ring is formed by it."""
    token_seconds = found.throughput_seconds if wish.n_in_flight else found.lone_seconds
    is_output_on_gpu = found.per_device[-1].is_output_on_gpu
    windows = []
    for i, window in enumerate(found.windows):
        is_last = i == len(found.windows) - 1
        n_gpu = counted_by_llama(window.n_gpu_layers, is_last and is_output_on_gpu)
        windows.append(
            Assignment(HEAD if window.device == HEAD_NAME else window.device, window.first, window.end, n_gpu)
        )
    n_spread = -(-wish.n_in_flight // found.n_rows) if wish.n_in_flight else 0
    return Placement(tuple(windows), found.is_disk_used, token_seconds, n_spread)


def counted_by_llama(n_gpu_layers: int, is_output_on_gpu: bool = False) -> int:
    """A window's layers on a GPU as llama.cpp counts them: the output, of which every window has a stub, is the first
    that goes there."""
    return n_gpu_layers + 1 if n_gpu_layers or is_output_on_gpu else 0


def planned(
    costs: ModelCosts, devices: Mapping[str, Device], links: Links, wish: Wish
) -> Callable[[list[str]], Placement]:
    """A placer that plans anew for whoever is there. `devices` by name, the head's by `HEAD_NAME`."""

    def place(names: list[str]) -> Placement:
        found = wish.plan(costs, [devices[HEAD_NAME], *(devices[name] for name in names)], links)
        return placement_of(found, wish)

    return place
