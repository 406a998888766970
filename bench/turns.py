"""How the cases of a comparison take turns."""

import statistics


class Turns:
    """Values of cases that take turns forth and back, the mean of both counting: in each turn all have the same mean
    time, so a machine that becomes slower does so for all. Ratios are of one turn."""

    def __init__(self, cases, n_turns, parts=()):
        """`cases` are functions by name that return a number; with `parts`, as many numbers, each a case of its own.

        One more turn comes first as a warm-up."""
        names, found = list(cases), {}
        for turn in range(-1, n_turns):
            for name in names + names[::-1] if turn >= 0 else names:
                values = cases[name]()
                keys = [f"{name}, {part}" for part in parts] or [name]
                for key, value in zip(keys, values if parts else [values], strict=True):
                    if turn >= 0:
                        found.setdefault(key, []).append(value)
        self.values = {key: [(a + b) / 2 for a, b in zip(v[::2], v[1::2], strict=True)] for key, v in found.items()}

    def medians(self):
        return {key: statistics.median(values) for key, values in self.values.items()}

    def ratios(self, pairs):
        """Of each pair of cases the median of the turns' ratios, with their quartiles."""
        return {f"{one}, to {other}": self.ratio(one, other) for one, other in pairs}

    def ratio(self, one, other):
        return quartiles([a / b for a, b in zip(self.values[one], self.values[other], strict=True)])


def quartiles(ratios):
    """The median of some ratios and what lies between a fourth of them and three."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"ratio": middle, "low": low, "high": high}
