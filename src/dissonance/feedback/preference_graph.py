"""The preferences among a prompt's completions as a graph, and rewards from what is left when its cycles are cut.

An arc i -> j says that i is preferred to j: it has more votes than j, and than tie and both bad. It weighs the *net*
vote, the votes for i less those for j. Weighing every vote instead would make a cycle of length 2 of each disagreement,
and change no order: whichever way round i and j stand, the votes of the smaller side are lost at least, and what it
costs more to go against the larger is the net vote.

Where the arcs run in a circle no order satisfies them all. The *minimum feedback arc set* is the lightest set of arcs
whose removal leaves no cycle; what remains is acyclic, and gives the deconflicted graph rewards of Liu et al.,
"Taming the Judge" (arXiv 2510.15514): arcs out less arcs in. Where we differ: arcs are weighted (there, one judge says
once which of two is better), so that a cycle is cut where the answers are least sure; and the reward is divided by
N - 1, so that it lies in [-1, 1] whatever the number of completions.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components

from dissonance.feedback.votes import FIRST, MIRRORED, SECOND, decided

EXACT_UP_TO = 12
"""Completions in one tangle of cycles up to which the feedback arc set is exactly minimal: 2^N subsets are weighed."""

_TOLERANCE = 1e-9  # relative: sums of the same shares in another order are ties

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


class Comparison(NamedTuple):
    """The votes on two completions."""

    first: int
    second: int
    votes: Sequence[float]
    """(4,) for FIRST, SECOND, TIE and BOTH_BAD."""


@dataclass(frozen=True, eq=False, slots=True)
class PreferenceGraph:
    """Who beats whom among N completions of one prompt."""

    completion_ids: tuple[int, ...]
    """(N,) rising."""
    votes: FloatArray
    """(N, N, 4) votes[i, j] are those on i and j, i the first."""
    net: FloatArray
    """(N, N) net[i, j] is the weight of the arc i -> j, 0 where there is none; never positive in both directions."""

    @property
    def strength(self) -> FloatArray:
        """(N, N) net votes as shares of the votes, in [0, 1]; 1 is unanimous."""
        cast = self.votes.sum(axis=2)
        share: FloatArray = np.divide(self.net, cast, out=np.zeros_like(self.net), where=cast > 0)
        return share


@dataclass(frozen=True, eq=False, slots=True)
class Deconflicted:
    """A preference graph without its cycles."""

    kept: BoolArray
    """(N, N) the arcs that remain; no cycle among them."""
    removed: BoolArray
    """(N, N) the feedback arc set; empty where there was no cycle."""
    rewards: FloatArray
    """(N,) in [-1, 1]: strength of the arcs kept out of each completion less those into it, over N - 1."""
    exact: bool
    """Whether `removed` is proved the lightest; otherwise a heuristic found it."""


def preference_graph(comparisons: Iterable[Comparison]) -> PreferenceGraph:
    """Sum the votes on each pair of completions; a pair may be compared any number of times, either way round."""
    rows = list(comparisons)
    ids = sorted({i for row in rows for i in (row.first, row.second)})
    place = {completion_id: i for i, completion_id in enumerate(ids)}
    votes = np.zeros((len(ids), len(ids), 4))
    for first, second, cast in rows:
        votes[place[first], place[second]] += cast
        votes[place[second], place[first]] += [cast[value] for value in MIRRORED]
    net = np.zeros((len(ids), len(ids)))
    for i, j in np.argwhere(votes.any(axis=2)).tolist():
        value, _ = decided(votes[i, j].tolist())
        if value == FIRST:
            net[i, j] = votes[i, j, FIRST] - votes[i, j, SECOND]
    return PreferenceGraph(tuple(ids), votes, net)


def tangles(net: FloatArray) -> list[IntArray]:
    """Find the strongly connected components of two completions or more: each holds a cycle, and every cycle is in one.

    Returns the places of each one's members, rising.
    """
    if len(net) < 3:
        return []
    _, component = connected_components(net > 0, directed=True, connection="strong")
    sizes = np.bincount(component)
    return sorted((np.flatnonzero(component == c) for c in np.flatnonzero(sizes > 1)), key=lambda members: members[0])


def find_cycle(graph: PreferenceGraph) -> tuple[int, ...]:
    """Find a cycle: completion_ids, each preferred to the next and the last to the first; () where there is none.

    Of the cycles through the lowest completion_id that is on one, it is the shortest, first in order of ids.
    """
    beaten = [np.flatnonzero(row).tolist() for row in graph.net > 0]
    for start in range(len(beaten)):
        paths: dict[int, tuple[int, ...]] = {start: (start,)}
        waiting = deque([start])
        while waiting:
            node = waiting.popleft()
            if start in beaten[node]:
                return tuple(graph.completion_ids[i] for i in paths[node])
            for after in beaten[node]:
                if after not in paths:
                    paths[after] = (*paths[node], after)
                    waiting.append(after)
    return ()


def deconflict(graph: PreferenceGraph) -> Deconflicted:
    """Cut the cycles at the least weight.

    Each tangle is cut by itself: an arc between two of them is on no cycle. In one of up to `EXACT_UP_TO` completions
    the cut is the lightest there is, and of several such, that of the order whose first completion_id that differs is
    lower, whatever the order of votes. A larger one is ordered by a heuristic, and `exact` says so.
    """
    removed = np.zeros(graph.net.shape, np.bool_)
    exact = True
    for members in tangles(graph.net):
        inner = graph.net[np.ix_(members, members)]
        exact &= len(members) <= EXACT_UP_TO
        order = optimal_order(inner) if len(members) <= EXACT_UP_TO else greedy_order(inner)
        place = np.argsort(order)
        removed[np.ix_(members, members)] = (inner > 0) & (place[:, None] > place[None, :])
    kept = (graph.net > 0) & ~removed
    strength = np.where(kept, graph.strength, 0.0)
    rewards = (strength.sum(axis=1) - strength.sum(axis=0)) / max(1, len(strength) - 1)
    return Deconflicted(kept, removed, rewards, exact)


def optimal_order(net: FloatArray) -> IntArray:
    """Order N items so that the arcs from later to earlier ones weigh least; ties go to the lower place first.

    Dynamic programming over subsets (Lawler 1964): with v first among the items S, the arcs into v from the rest of S
    are lost, and the rest is the same problem again. Time N 2^N, vectorised over the subsets of each size.
    """
    n = len(net)
    into = np.zeros((n, 1 << n))  # into[v, S]: what is lost where v stands before all of S
    size = np.zeros(1 << n, np.int64)
    for u in range(n):
        below, above = slice(0, 1 << u), slice(1 << u, 2 << u)
        into[:, above] = into[:, below] + net[u][:, None]
        size[above] = size[below] + 1
    items, bits = np.arange(n)[:, None], 1 << np.arange(n)[:, None]
    lost = np.full(1 << n, np.inf)
    lost[0] = 0.0
    for k in range(1, n + 1):
        layer = np.flatnonzero(size == k)
        rest = layer & ~bits  # (N, L); the subset itself, still infinite, where v is not in it
        lost[layer] = (lost[rest] + into[items, rest]).min(axis=0)
    slack = _TOLERANCE * net.sum()
    order, left = [], (1 << n) - 1
    while left:
        best = next(
            v
            for v in range(n)
            if left >> v & 1 and lost[left ^ (1 << v)] + into[v, left ^ (1 << v)] <= lost[left] + slack
        )
        order.append(best)
        left ^= 1 << best
    return np.array(order)


def greedy_order(net: FloatArray) -> IntArray:
    """Order N items by the heuristic of Eades, Lin and Smyth (1993), with weights; ties go to the lower place.

    Items that beat none of the rest go to the end, those that none of the rest beats to the front, and when there is
    neither, the one with the largest wins less losses to the front. It loses at most half the weight of all arcs.
    """
    left = np.arange(len(net))
    front: list[int] = []
    end: list[int] = []
    while left.size:
        inner = net[np.ix_(left, left)]
        wins, losses = inner.sum(axis=1), inner.sum(axis=0)
        if (wins == 0).any():
            at = int(np.argmax(wins == 0))
            end.insert(0, int(left[at]))
        else:
            score = np.where(losses == 0, np.inf, wins - losses)
            at = int(np.argmax(score >= score.max() - _TOLERANCE * net.sum()))
            front.append(int(left[at]))
        left = np.delete(left, at)
    return np.array(front + end)
