"""How long a run will take, from what its samples have taken so far."""

from collections import Counter


class Forecast:
    """What the samples that are left will take, foretold from those before.

    left: their numbers; they take the settings of a sweep in turn. steps: N of each of these. sharing: among how many
    processes the samples are dealt out.
    """

    def __init__(self, left, steps, sharing=1):
        self.steps, self.sharing, self.taken = steps, sharing, {}
        self.left = Counter(i % len(steps) for i in left)

    def add(self, i, seconds, evaluations):
        """Note what sample i took, with its part of what is made once for several."""
        self.taken.setdefault(i % len(self.steps), []).append((seconds, evaluations))

    @property
    def known(self):
        """Whether there is a sample of each setting."""
        return self.taken.keys() == self.left.keys()

    def mean(self, which):
        """Seconds and evaluations of a setting's sample; those of the others by their steps, where it has none yet."""
        taken, own = self.taken, self.steps[which]
        known = taken.get(which) or [
            (own / self.steps[other] * value for value in pair) for other in taken for pair in taken[other]
        ]
        return [sum(column) / len(known) for column in zip(*known)]

    def time_left(self):
        """The time until the end, for a person; "" before the first sample's end."""
        if not self.taken:
            return ""
        left = {which: count - self.sharing * len(self.taken.get(which, ())) for which, count in self.left.items()}
        seconds = sum(max(0, count) * self.mean(which)[0] for which, count in left.items()) / self.sharing
        return f"{'about' if self.known else 'roughly'} {duration(seconds)} left"

    def __str__(self):
        seconds, evaluations = (sum(n * self.mean(which)[j] for which, n in self.left.items()) for j in (0, 1))
        return f"{evaluations:,.0f} evaluations but for ground truths, {duration(seconds / self.sharing)}"


def duration(seconds):
    """A time to wait, as a person says it."""
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (0, "seconds"))
    size, unit = next((size, unit) for size, unit in units if seconds >= 2 * size)
    return f"{seconds / size:.1f} {unit}" if size else f"{seconds:.0f} {unit}"
