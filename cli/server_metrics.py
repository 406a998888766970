"""The server's numbers in Prometheus' text format."""

from collections.abc import Iterable

from .server_runner import Runner


def render_metrics(runner: Runner) -> str:
    """All metrics of a runner."""
    totals = runner.totals
    lines = [
        *_metric("requests_total", "counter", "Requests by how they ended.", "outcome", totals.requests.items()),
        *_metric("tokens_total", "counter", "Tokens of ended replies by kind.", "kind", totals.tokens.items()),
        *_metric("sequences_running", "gauge", "Sequences in the batch.", "", [("", runner.n_running)]),
        *_metric("sequences_waiting", "gauge", "Sequences in the queue.", "", [("", runner.n_waiting)]),
        *_metric("parallel", "gauge", "Sequences that the batch holds at most.", "", [("", runner.n_parallel)]),
        *_metric(
            "failing",
            "gauge",
            "1 since the engine failed, until a reply ends.",
            "",
            [("", int(runner.problem is not None))],
        ),
        "# HELP localreason_first_token_seconds Time from a request to its first token.",
        "# TYPE localreason_first_token_seconds summary",
        f"localreason_first_token_seconds_sum {totals.first_seconds:.6f}",
        f"localreason_first_token_seconds_count {totals.n_first}",
    ]
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, help: str, label: str, values: Iterable[tuple[str, int]]) -> list[str]:
    name = f"localreason_{name}"
    rows = [f'{name}{{{label}="{value}"}} {n}' if label else f"{name} {n}" for value, n in sorted(values)]
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}", *rows]
