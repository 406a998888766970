"""What `localreason quant measure` found, in lines for a person; and what is said beside results."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..quant.measure import Drift
    from ..quant.paired import Comparison


def drift_lines(drift: "Drift") -> list[str]:
    """A divergence."""
    low, high = drift.reference_perplexity, drift.candidate_perplexity
    kl, top, change = drift.divergence, drift.same_top, drift.log_probability_difference
    return [
        f"scored tokens         {drift.n_scored} in {drift.n_chunks} chunks of {drift.n_context}",
        f"perplexity            {low.value:.4f} ± {low.error:.4f} reference, {high.value:.4f} ± {high.error:.4f}",
        f"KL divergence         {kl.value:.6f} ± {kl.error:.6f} nats; 99 % below {drift.divergence_p99:.4f}, "
        f"largest {drift.divergence_max:.4f}",
        f"same top token        {top.value:.2%} ± {top.error:.2%}",
        f"log-probability       {change.value:+.6f} ± {change.error:.6f} nats a token",
    ]


def paired_lines(found: "Comparison") -> list[str]:
    """A comparison on problems."""
    from ..quant.evidence import is_too_few

    lines = [f"problems              {found.n_problems}, {found.n_failed} left out"]
    if found.accuracy is not None:
        difference = found.accuracy
        lines.append(
            f"accuracy              {found.reference_accuracy:.1%} reference, {found.candidate_accuracy:.1%}; "
            f"{difference.mean:+.1%} ({difference.low:+.1%} to {difference.high:+.1%})"
        )
        lines.append(
            f"right in one only     {found.n_only_reference} reference, {found.n_only_candidate}; "
            f"McNemar's p {found.mcnemar_p:.3g}"
        )
        if is_too_few(found.n_graded, found.mcnemar_p):
            lines.append(f"too few to tell       {found.n_graded} problems; give 100 or more")
    length = found.thinking
    lines.append(
        f"thinking tokens       {found.reference_thinking:.0f} reference, {found.candidate_thinking:.0f}; "
        f"{length.mean:+.1f} ({length.low:+.1f} to {length.high:+.1f})"
    )
    lines.append(f"not ended by itself   {found.reference_unfinished} reference, {found.candidate_unfinished}")
    return lines
