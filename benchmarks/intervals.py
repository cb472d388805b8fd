"""How often 95 % intervals of a mean hold the truth, by kind of bootstrap and number of clusters.

    python benchmarks/intervals.py [--trials 2000]

Four kinds of clustered data: normal effects; skewed (exponential) ones; shares that differ from cluster to cluster; and
normal effects with clusters of different sizes. `expanded` is what `dissonance.evaluate` uses.
"""

import argparse

import numpy as np
import numpy.typing as npt
from scipy.stats import norm
from scipy.stats import t as student

from dissonance.evaluate.statistics import Bootstrap

SIZE, REPLICATES, TAIL = 8, 1000, 0.025
KINDS = ("normal", "skewed", "share", "sizes")


FloatArray = npt.NDArray[np.float64]


def draw(kind: str, clusters: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray, float]:
    """Sums and counts by cluster, and the true mean."""
    effect = rng.normal(size=clusters)
    count = np.full(clusters, float(SIZE))
    if kind == "share":
        return rng.binomial(SIZE, rng.beta(8, 2, size=clusters)).astype(float), count, 0.8
    if kind == "skewed":
        effect = rng.exponential(size=clusters) - 1
    if kind == "sizes":
        count = rng.integers(2, 2 * SIZE, size=clusters).astype(float)
    return effect * count + rng.normal(size=clusters) * np.sqrt(count), count, 0.0


def intervals(total: FloatArray, count: FloatArray, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """The interval of each kind for the mean of all items."""
    clusters = len(total)
    estimate = total.sum() / count.sum()
    residual = total - estimate * count
    error = np.sqrt(np.sum(residual**2) * clusters / (clusters - 1)) / count.sum()
    drawn = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=REPLICATES)
    means = drawn @ total / (drawn @ count)
    found = {"percentile": tuple(np.quantile(means, [TAIL, 1 - TAIL]))}

    left_out = (total.sum() - total) / (count.sum() - count)
    lean = left_out.mean() - left_out
    acceleration = np.sum(lean**3) / (6 * np.sum(lean**2) ** 1.5 + 1e-300)
    bias = norm.ppf(np.clip(np.mean(means < estimate) / 2 + np.mean(means <= estimate) / 2, 1e-3, 1 - 1e-3))
    shifted = bias + norm.ppf([TAIL, 1 - TAIL])
    found["BCa"] = tuple(np.quantile(means, norm.cdf(bias + shifted / (1 - acceleration * shifted))))

    squares = drawn @ total**2 - 2 * means * (drawn @ (total * count)) + means**2 * (drawn @ count**2)
    errors = np.sqrt(np.maximum(squares * clusters / (clusters - 1), 1e-12)) / (drawn @ count)
    low, high = np.quantile((means - estimate) / errors, [TAIL, 1 - TAIL])
    found["bootstrap-t"] = (estimate - high * error, estimate - low * error)

    half = student.ppf(1 - TAIL, clusters - 1) * error
    found["Student's t"] = (estimate - half, estimate + half)
    ours = Bootstrap(np.arange(clusters), REPLICATES, int(rng.integers(1 << 30))).ratio(total, count)
    found["expanded"] = (estimate, estimate) if ours["low"] is None else (ours["low"], ours["high"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    trials = parser.parse_args().trials
    for kind in KINDS:
        for clusters in (5, 10, 20, 50):
            rng = np.random.default_rng([KINDS.index(kind), clusters])
            held, width = {}, {}
            for _ in range(trials):
                total, count, truth = draw(kind, clusters, rng)
                for name, (low, high) in intervals(total, count, rng).items():
                    held.setdefault(name, []).append(low <= truth <= high)
                    width.setdefault(name, []).append(high - low)
            shown = "  ".join(f"{name} {np.mean(x):.3f} ({np.median(width[name]):.2f})" for name, x in held.items())
            print(f"{kind:7} {clusters:3} clusters, coverage (median width): {shown}", flush=True)


if __name__ == "__main__":
    main()
