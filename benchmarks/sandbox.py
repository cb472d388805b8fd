"""What the built-in world's models know: the 2 x 2 of knowledge in figures, before any human feedback.

For each task, split and cell: the share of answer pairs of different gold that the proxy orders rightly (a tie counts
one half), on the policy's own samples and on generated answers of mixed quality; the mean gold of the samples; the mean
Kendall-tau distance K; and Pearson's correlation, over prompts, of K with the proxy's pair error on the same samples.
Every figure is the mean over seeds, each seed a world of its own, with the lowest and the highest.

    python benchmarks/sandbox.py --seeds 2 --per-category 40
"""

import argparse
from collections import defaultdict
from typing import get_args

import numpy as np
import numpy.typing as npt

from dissonance.config import PolicyConfig, RewardConfig
from dissonance.conflict import conflicts
from dissonance.records import Message, Prompt
from dissonance.rewards import HFRewardModel
from dissonance.sampling import HFPolicy
from dissonance.sandbox import Sandbox, Task, World, build_sandbox, cell, gold_reward, questions
from dissonance.sandbox.answers import answer
from dissonance.sandbox.gold import truth
from dissonance.sandbox.world import Question, Split

N = 8
MAX_NEW_TOKENS = 32
CELLS = ("both", "policy_only", "proxy_only", "neither", "all")
FIGURES = ("accuracy, own", "accuracy, generated", "gold", "K", "corr(K, error)")

FloatArray = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="worlds per task")
    parser.add_argument("--per-category", type=int, default=40, help="prompts per category and split")
    arguments = parser.parse_args()
    for task in get_args(Task):
        sandboxes = [build_sandbox(World(task=task, seed=seed)) for seed in range(arguments.seeds)]
        for split in get_args(Split):
            _show(task, split, [measure(sandbox, split, arguments.per_category) for sandbox in sandboxes])


def measure(sandbox: Sandbox, split: Split, per_category: int) -> dict[str, list[float]]:
    """The values of `FIGURES` in each of `CELLS`."""
    world = sandbox.world
    asked = choose(world, split, per_category)
    sampled, logprobs = sample(sandbox, asked)
    rng = np.random.default_rng([world.seed, 8])
    generated = [
        [answer(world, truth(world, q.category, q.subject, q.action), rng.random(), rng) for _ in range(N)]
        for q in asked
    ]
    rewards, gold = score(sandbox, asked, sampled), judge(world, asked, sampled)
    found = conflicts(rewards.ravel(), logprobs.ravel(), np.arange(len(asked) + 1) * N)
    distance = np.where(found.degenerate, np.nan, found.kendall_tau_distance)
    own = pair_accuracy(rewards, gold)
    other = pair_accuracy(score(sandbox, asked, generated), judge(world, asked, generated))
    cells = np.array([cell(world, world.categories[q.category].name) for q in asked])
    return {
        name: [
            *(float(np.nanmean(x[rows])) for x in (own, other, gold, distance)),
            correlation(distance, 1 - own, rows),
        ]
        for name in CELLS
        for rows in [(cells == name) | (name == "all")]
    }


def choose(world: World, split: Split, per_category: int) -> list[Question]:
    """The first questions of each category, which stand in random order; fewer where the split has no more."""
    mine: dict[int, list[Question]] = defaultdict(list)
    for question in questions(world, split):
        mine[question.category].append(question)
    return [question for category in sorted(mine) for question in mine[category][:per_category]]


def sample(sandbox: Sandbox, asked: list[Question]) -> tuple[list[list[str]], FloatArray]:
    """The policy's own answers, and their log-likelihoods (P, N)."""
    config = PolicyConfig(model=str(sandbox.policy), n=N, max_new_tokens=MAX_NEW_TOKENS, device="cpu", dtype="float32")
    policy = HFPolicy(config, seed=sandbox.world.seed)
    prompts = [Prompt(f"{i:05d}", (Message("user", question.text),)) for i, question in enumerate(asked)]
    drawn = [completion for batch in policy.plan(prompts) for completion in policy.sample(batch)]
    drawn.sort(key=lambda completion: (completion.prompt_id, completion.completion_id))
    texts = [completion.text for completion in drawn]
    logprobs = np.array([completion.logprob for completion in drawn]).reshape(len(asked), N)
    return [texts[start : start + N] for start in range(0, len(texts), N)], logprobs


def score(sandbox: Sandbox, asked: list[Question], texts: list[list[str]]) -> FloatArray:
    """The proxy's rewards (P, N), higher is better."""
    config = RewardConfig(model=str(sandbox.reward_model), kind=sandbox.reward_kind, device="cpu", dtype="float32")
    conversations = [[Message("user", question.text)] for question in asked for _ in range(N)]
    rewards = HFRewardModel(config).score(conversations, [text for row in texts for text in row])
    return np.array([reward.value for reward in rewards]).reshape(len(asked), N)


def judge(world: World, asked: list[Question], texts: list[list[str]]) -> FloatArray:
    """The exact gold (P, N)."""
    return np.array([[gold_reward(world, q.text, t) for t in row] for q, row in zip(asked, texts, strict=True)])


def pair_accuracy(rewards: FloatArray, gold: FloatArray) -> FloatArray:
    """Share (P,) of the pairs of different gold in the right order, ties in the reward one half; NaN without any."""
    first, second = np.triu_indices(N, 1)
    wanted, said = (np.sign(x[:, first] - x[:, second]) for x in (gold, rewards))
    right = np.where(wanted == 0, 0.0, (1 + wanted * said) / 2).sum(axis=1)
    differing = (wanted != 0).sum(axis=1)
    return np.divide(right, differing, out=np.full(len(gold), np.nan), where=differing > 0)


def correlation(x: FloatArray, y: FloatArray, rows: npt.NDArray[np.bool_]) -> float:
    """Pearson's correlation over these rows, without those where either is NaN."""
    kept = rows & np.isfinite(x) & np.isfinite(y)
    return float(np.corrcoef(x[kept], y[kept])[0, 1])


def _show(task: Task, split: Split, seeds: list[dict[str, list[float]]]) -> None:
    print(f"\n{task}, {split} prompts")
    print(f"{'':12}" + "".join(f"{name:>21}" for name in FIGURES))
    for name in CELLS:
        values = np.array([found[name] for found in seeds])
        columns = zip(values.mean(axis=0), values.min(axis=0), values.max(axis=0), strict=True)
        texts = (f"{mean:.2f} ({low:.2f}..{high:.2f})" for mean, low, high in columns)
        print(f"{name:12}" + "".join(f"{text:>21}" for text in texts))


if __name__ == "__main__":
    main()
