"""Training a policy: real TRL trainers on tiny models; the traps of policy training each have a test."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import binom
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tokenizer
from dissonance.config import PolicyConfig, PolicyTraining, RewardConfig
from dissonance.errors import DataError, InputError, ModelError, RunError, SettingsError
from dissonance.prompts import load_prompts
from dissonance.records import Completion, Message, Preference, Prompt, Reward
from dissonance.refine import policy as policy_module
from dissonance.refine import policy_trainers
from dissonance.refine.distil import (
    Candidates,
    best_answers,
    pooled_deviation,
    ranked_pairs,
    rejection_pairs,
    rejection_sample,
    score_candidates,
)
from dissonance.refine.gold_sign import check_gold_sign, right_needed
from dissonance.refine.learner import check_trainable, load_learner, weights_digest
from dissonance.refine.policy import refine_policy
from dissonance.refine.watch import Limits, Measurement, check_reference, from_logs, mean_measurement
from dissonance.rewards import load_reward_model
from dissonance.sampling import HFPolicy, HFReference
from dissonance.sandbox import Sandbox, World, build_sandbox, gold_reward
from dissonance.sandbox.answers import preferences

PROMPTS = [Prompt(f"p{i}", (Message("user", f"w{i} w{i + 1}{' w9' * (i % 3)}"),)) for i in range(8)]
QUICK: dict[str, Any] = {"steps": 3, "prompts_per_step": 4, "n": 4, "learning_rate": 1e-2, "check_every": 2}
FREE: dict[str, Any] = {"max_kl": None, "max_length_ratio": None}


class CountsWord:
    """A reward model that counts a word, and remembers what it was asked."""

    def __init__(self, word: str = "w3") -> None:
        self.word = word
        self.asked: list[tuple[tuple[Message, ...], str]] = []

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        self.asked += [(tuple(c), text) for c, text in zip(conversations, completions, strict=True)]
        return [Reward(float(text.split().count(self.word))) for text in completions]


class Gold:
    """The exact gold reward of a sandbox."""

    def __init__(self, world: World) -> None:
        self.world = world

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        pairs = zip(conversations, completions, strict=True)
        return [Reward(gold_reward(self.world, messages[-1].content, text)) for messages, text in pairs]


def training(**changes: Any) -> PolicyTraining:
    return PolicyTraining(**{**QUICK, **FREE, **changes})


def start_of(folder: Path, **changes: Any) -> PolicyConfig:
    return PolicyConfig(**{"model": str(folder), "max_new_tokens": 12, "n": 8, "device": "cpu", **changes})


def sample(start: PolicyConfig, prompts: Sequence[Prompt] = PROMPTS) -> list[Completion]:
    policy = HFPolicy(start, seed=3)
    return [completion for batch in policy.plan(prompts) for completion in policy.sample(batch)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sandbox]:
    cache = tmp_path_factory.mktemp("worlds")

    def build(task: str) -> Sandbox:
        world = World(
            task=task, n_objects=4, policy_competence=0.5, label_noise=0.0, n_demonstrations=2400, n_pairs=3000
        )
        return build_sandbox(world, cache)

    return build


def gold_pairs(box: Sandbox, n: int = 200) -> list[Preference]:
    """Pairs of another draw than the proxy's."""
    drawn = preferences(replace(box.world, n_pairs=4 * n))[-n:]
    return [Preference((Message("user", pair.prompt),), pair.chosen, pair.rejected) for pair in drawn]


@pytest.fixture(scope="module")
def policies(make_policy: Callable[..., Path]) -> dict[str, Path]:
    return {kind: make_policy(kind) for kind in ("llama", "gpt_neox")}


# --- the direction of the reward model ---


@given(st.integers(1, 300), st.sampled_from([0.0, 0.1]), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_needed_number_is_the_least_that_the_one_sided_test_accepts(
    n: int, margin: float, confidence: float
) -> None:
    needed = right_needed(n, margin, confidence)
    assert binom.sf(needed - 1, n, 0.5 + margin) <= 1 - confidence
    assert binom.sf(needed - 2, n, 0.5 + margin) > 1 - confidence


def test_a_cost_model_read_as_a_reward_trains_nothing(sandbox: Callable[[str], Sandbox], tmp_path: Path) -> None:
    """Trap 1. The very same model passes once it is read as what it is."""
    box = sandbox("safety")
    gold = gold_pairs(box)
    wrong = load_reward_model(RewardConfig(model=str(box.reward_model), kind="reward"))
    prompts = load_prompts(str(box.prompts), limit=8).prompts
    start = PolicyConfig(model=str(box.policy), max_new_tokens=24)
    with pytest.raises(ModelError) as refused:
        refine_policy(training(), start, wrong, prompts, tmp_path / "out", gold_pairs=gold)
    found, needed = (
        check_gold_sign(load_reward_model(RewardConfig(model=str(box.reward_model), kind="cost")), gold),
        113,
    )
    said = str(refused.value)
    assert f"ranks {200 - found.right:g} of 200" in said
    assert f"needs {needed} (56.5%)" in said
    assert "wrong way" in said
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
    assert found.accuracy > 0.7
    assert found.metrics()["needed"] == needed


def test_gold_pairs_that_tie_say_nothing_and_rewards_that_tie_count_half() -> None:
    messages = (Message("user", "w0"),)
    pair = Preference(messages, "w3 w3", "w3")
    level, tie = Preference(messages, "w1", "w2"), Preference(messages, "w1", "w3", tie=True)
    found = check_gold_sign(CountsWord(), [*[pair] * 9, level, tie])
    assert (found.pairs, found.right, found.needed) == (10, 9.5, 9)
    with pytest.raises(ModelError, match=r"ranks 8.5 of 10 .*needs 9 .*train it on more or better pairs"):
        check_gold_sign(CountsWord(), [*[pair] * 8, level, replace(pair, chosen="w3", rejected="w3 w3")])
    with pytest.raises(DataError, match="4 held-out gold pairs are too few"):
        check_gold_sign(CountsWord(), [pair] * 4)
    with pytest.raises(ModelError, match=r"chance \+ 0.4 at 95%"):
        check_gold_sign(CountsWord(), [*[pair] * 88, *[level] * 12], margin=0.4)


# --- what offline methods learn from ---


def completion(i: int, prompt_id: str = "p0", ids: tuple[int, ...] | None = None, end: str = "stop") -> Completion:
    return Completion(prompt_id, i, " ".join(["w3"] * i), ids or (12 + i, 2), end, -1.0)  # type: ignore[arg-type]


def candidates(rewards: Sequence[float], ids: Sequence[tuple[int, ...]] | None = None) -> Candidates:
    some = tuple(completion(i, ids=None if ids is None else ids[i]) for i in range(len(rewards)))
    return Candidates(PROMPTS[0], some, np.array(rewards, float))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=12), st.floats(0.05, 5), st.integers(0, 99), st.data())
def test_rejection_sampling_keeps_that_many_different_answers(
    rewards: list[int], beta: float, seed: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, len(rewards)))
    kept = rejection_sample(np.array(rewards, float), keep, beta, np.random.default_rng(seed))
    assert len(set(kept)) == len(kept) == keep
    greedy = rejection_sample(np.array(rewards, float), keep, 1e-9, np.random.default_rng(seed))
    assert sorted(rewards[i] for i in greedy) == sorted(sorted(rewards)[-keep:])
    assert rejection_sample(np.array(rewards, float), keep, 1e12, np.random.default_rng(seed)) == list(range(keep))


def test_rejection_sampling_accepts_with_the_stated_probability() -> None:
    """Of two answers d apart, the worse one in front is kept with probability exp(-d / beta); behind, never."""
    rng, n = np.random.default_rng(0), 20_000
    first = sum(rejection_sample(np.array([0.0, 1.0]), 1, 0.5, rng) == [0] for _ in range(n)) / n
    assert first == pytest.approx(np.exp(-2), abs=0.01)
    assert all(rejection_sample(np.array([1.0, 0.0]), 1, 0.5, rng) == [0] for _ in range(100))
    # Once the best is taken, the others are measured against the best of what is left.
    third = [rejection_sample(np.array([9.0, 0.0, 1.0]), 2, 0.5, rng)[1] for _ in range(n)]
    assert third.count(1) / n == pytest.approx(np.exp(-2), abs=0.01)


def test_rejection_pairs_do_not_depend_on_the_scale_of_the_rewards() -> None:
    some = [candidates([0.3, 1.0, 0.1, 0.9, 0.5, 0.2]), candidates([0.2, 0.1, 0.6, 0.4, 0.9, 0.8])]
    scaled = [replace(one, rewards=one.rewards * 1000 - 7) for one in some]
    drawn = [rejection_pairs(which, 4, 0.5, np.random.default_rng(1)) for which in (some, scaled)]
    assert [(p.chosen, p.rejected) for p in drawn[0].pairs] == [(p.chosen, p.rejected) for p in drawn[1].pairs]
    assert len(drawn[0].pairs) == 4
    rewards = {c.completion_id: r for one in some[:1] for c, r in zip(one.completions, one.rewards, strict=True)}
    for pair in drawn[0].pairs[:2]:
        assert rewards[pair.chosen.completion_id] > rewards[pair.rejected.completion_id]
    assert pooled_deviation([one.rewards for one in some]) == pytest.approx(
        np.concatenate([one.rewards - one.rewards.mean() for one in some]).std()
    )
    with pytest.raises(DataError, match="rso_keep is 8, but a prompt has only 6 answers"):
        rejection_pairs(some, 8, 0.5, np.random.default_rng(1))


def test_the_best_stands_against_the_worst_and_what_cannot_be_told_apart_is_counted() -> None:
    some = [candidates([0.5, 2.0, -1.0]), candidates([1.0, 1.0]), candidates([1.0, 2.0], [(5, 2), (5, 2)])]
    found = ranked_pairs(some)
    assert [(p.chosen.completion_id, p.rejected.completion_id) for p in found.pairs] == [(1, 2)]
    assert found.tied == 2
    assert [answer.completion_id for _, answer in best_answers(some)] == [1, 0, 1]


def test_candidates_are_grouped_by_prompt_and_unfinished_answers_pay() -> None:
    answers = [completion(2, "p1", end="length"), completion(1, "p0"), completion(0, "p0"), completion(5, "p1")]
    found = score_candidates(CountsWord(), PROMPTS[:2], answers, 1.5)
    assert [(c.prompt.prompt_id, list(c.rewards)) for c in found] == [("p0", [1.0, 0.0]), ("p1", [0.5, 5.0])]
    with pytest.raises(DataError, match="1 prompts have fewer than two answers"):
        score_candidates(CountsWord(), PROMPTS[:2], answers[:-1], 0.0)
    with pytest.raises(DataError, match="prompt 'p1', which is not among the prompts"):
        score_candidates(CountsWord(), PROMPTS[:1], answers, 0.0)


# --- when to stop ---


def measured(**changes: float) -> Measurement:
    return Measurement(**{"reward": 1.0, "kl": 1.0, "length": 10.0, "entropy": 2.0, "unfinished": 0.0, **changes})


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({}, None),
        ({"kl": -0.5}, None),
        ({"kl": 5.1}, "KL from the start policy is 5.1 nats per completion, above max_kl 5"),
        ({"length": 20.0}, None),
        ({"length": 20.5}, "answers have 20.5 tokens, those of the start policy 10.0"),
        ({"length": 4.9}, "beyond max_length_ratio 2"),
        ({"kl": float("nan")}, "not a finite number"),
        ({"reward": float("inf")}, "not a finite number"),
    ],
)
def test_what_counts_as_running_away(now: dict[str, float], said: str | None) -> None:
    found = Limits(max_kl=5, max_length_ratio=2).broken(measured(**now), measured(kl=0.0))
    assert found is None if said is None else found is not None and said in found


def test_limits_can_be_switched_off_and_kl_is_per_answer() -> None:
    assert Limits(None, None).broken(measured(kl=1e9, length=1e9), measured()) is None
    logs = {
        "rewards/reward_model/mean": 3.0, "reward": 1.0, "kl": 0.5, "entropy": 2.0,
        "completions/mean_length": 8.0, "completions/clipped_ratio": 0.25,
    }  # fmt: skip
    assert from_logs(logs) == Measurement(reward=3.0, kl=4.0, length=8.0, entropy=2.0, unfinished=0.25)
    assert mean_measurement([measured(kl=1), measured(kl=2)]) == measured(kl=1.5)


# --- training ---


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("method", ["rloo", "grpo", "dpo", "rso", "best_of_n"])
@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_each_method_leaves_a_policy_that_loads(
    policies: dict[str, Path], kind: str, method: str, lora: int | None, tmp_path: Path
) -> None:
    start = start_of(policies[kind])
    config = training(method=method, lora_rank=lora)
    offline = method not in {"rloo", "grpo"}
    found = refine_policy(
        config, start, CountsWord(), PROMPTS, tmp_path / "out", completions=sample(start) if offline else None
    )
    assert (found["steps"], found["kept_step"], found["stopped"]) == (3, 3, None)
    assert [row["step"] for row in found["history"]] == ([0, 2, 3] if offline else [0, 1, 2])
    assert found["history"][0]["kl"] == found["start"]["kl"] == 0
    assert found["end"]["kl"] != 0
    for row in [*found["history"], found["start"], found["end"]]:
        assert row.keys() >= {"reward", "kl", "length", "entropy", "unfinished"}
    assert found["gold_check"]["checked"] is False
    assert "not known" in found["gold_check"]["why_not"]
    assert (found["data"] is None) != offline
    json.dumps(found, allow_nan=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    kinds = {path.suffix for path in (tmp_path / "out").rglob("*")}
    assert kinds <= {".json", ".jinja", ".safetensors"}, "no pickle, no README, no folder"
    before, after = ref_sums(start), ref_sums(start_of(tmp_path / "out"))
    assert before != after
    if lora is not None:
        assert not (tmp_path / "out" / "config.json").exists()
        assert ref_sums(start_of(policies[kind], adapter=str(tmp_path / "out"))) == after


FIXED = [[[12, 13, 14, 2], [20, 21, 2]] for _ in PROMPTS]


def ref_sums(config: PolicyConfig) -> list[list[float]]:
    """Log-likelihoods of fixed tokens under a policy, through the audit's own code."""
    from dissonance.sampling.decode import teacher_force

    policy = HFPolicy(config)
    return teacher_force(policy._model, [policy._encode(p) for p in PROMPTS], FIXED)


@pytest.mark.parametrize("method", ["rloo", "dpo"])
def test_the_same_seed_gives_the_same_weights_and_leaves_the_process_alone(
    policies: dict[str, Path], method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start, completions = start_of(policies["llama"]), None
    if method == "dpo":
        completions = sample(start)
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    capfd.readouterr()
    runs = [
        refine_policy(
            training(method=method), start, CountsWord(), PROMPTS, tmp_path / name, seed=seed, completions=completions
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert runs[0] == runs[1] != runs[2]
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_the_tokenizer_and_the_way_to_end_are_the_start_policys(policies: dict[str, Path], tmp_path: Path) -> None:
    start = start_of(policies["llama"])
    refine_policy(training(), start, CountsWord(), PROMPTS, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(f) for f in (policies["llama"], tmp_path / "out"))
    assert before.get_vocab() == after.get_vocab()
    assert before.chat_template == after.chat_template
    assert (before.pad_token, before.eos_token) == (after.pad_token, after.eos_token)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == 2
    assert model.dtype == torch.float32


def test_rloo_raises_the_reward_on_the_sandbox(sandbox: Callable[[str], Sandbox], tmp_path: Path) -> None:
    box = sandbox("helpfulness")
    prompts = load_prompts(str(box.prompts), limit=64).prompts
    start = PolicyConfig(model=str(box.policy), max_new_tokens=24, device="cpu")
    config = PolicyTraining(steps=25, prompts_per_step=8, n=4, learning_rate=1e-3, beta=0.01, check_every=25)
    found = refine_policy(config, start, Gold(box.world), prompts, tmp_path / "out", gold_pairs=gold_pairs(box))
    assert found["gold_check"]["accuracy"] > 0.98  # a tie counts one half
    assert found["end"]["reward"] > found["start"]["reward"] + 0.2
    assert found["end"]["kl"] > 0.5
    assert found["history"][0]["kl"] == 0
    policy = HFPolicy(PolicyConfig(model=str(tmp_path / "out"), max_new_tokens=24, n=2, device="cpu"))
    texts = [c.text for c in policy.sample(prompts[:32])]
    gold = [r.value for r in Gold(box.world).score([p.messages for p in prompts[:32] for _ in range(2)], texts)]
    assert np.mean(gold) == pytest.approx(found["end"]["reward"], abs=0.25)


# --- what the policy is asked, and what the reward model reads ---


@pytest.mark.parametrize(
    ("chat", "template", "content"),
    [
        (True, "auto", "w1 w2"),
        (False, "auto", "w1 w2"),
        (False, "Question: {prompt} Answer: ", "w1"),
        (False, "{prompt}", "<bos> w1"),
    ],
)
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_the_policy_reads_prompts_as_the_audit_encodes_them(
    make_policy: Callable[..., Path], chat: bool, template: str, content: str, method: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No second <bos>, no lost or added space: seen where the tokens enter the model."""
    prompts = [Prompt(f"p{i}", (Message("user", content + " w7" * i),)) for i in range(4)]
    start = start_of(make_policy("llama", chat=chat), template=template)
    seen: set[tuple[int, ...]] = set()

    def watched(*args: Any, **kwargs: Any) -> Any:
        learner = load_learner(*args, **kwargs)

        def enter(_: Any, __: Any, given: dict[str, Any]) -> None:
            if given.get("input_ids") is not None and given["input_ids"].shape[1] > 1 and "labels" not in given:
                mask = given.get("attention_mask")  # left out where nothing is padded
                whole = torch.ones_like(given["input_ids"]) if mask is None else mask
                rows = zip(given["input_ids"], whole.bool(), strict=True)
                seen.update(tuple(ids[mask].tolist()) for ids, mask in rows)

        learner.model.register_forward_pre_hook(enter, with_kwargs=True)
        return learner

    monkeypatch.setattr(policy_module, "load_learner", watched)
    refine_policy(training(method=method, steps=1, check_prompts=1), start, CountsWord(), prompts, tmp_path / "out")
    policy = HFPolicy(start)
    expected = {tuple(policy._encode(prompt)) for prompt in prompts}
    assert expected <= seen
    assert all(ids[0] == 1 and ids.count(1) == 1 for ids in expected if template != "auto" or not chat)
    assert {ids for ids in seen if len(ids) <= max(map(len, expected))} == expected


def test_the_reward_model_reads_what_the_audit_would_show_it(policies: dict[str, Path], tmp_path: Path) -> None:
    """The conversation itself, and the answer without its end; never the templated prompt."""
    reward_model = CountsWord()
    refine_policy(training(steps=1), start_of(policies["llama"]), reward_model, PROMPTS, tmp_path / "out")
    assert len(reward_model.asked) == 8 + 16 + 8  # first check, the step, last check
    conversations = {prompt.messages for prompt in PROMPTS}
    tokenizer = make_tokenizer()
    for messages, text in reward_model.asked:
        assert messages in conversations
        assert "<" not in text.replace("<user>", "").replace("<unk>", "").replace("<assistant>", "")
        assert tokenizer.eos_token not in text
    assert any(text for _, text in reward_model.asked)


def test_answers_without_an_end_pay_the_penalty(policies: dict[str, Path], tmp_path: Path) -> None:
    start = start_of(policies["llama"])
    learner = load_learner(start, None, tmp_path)
    setting = policy_trainers.Setting(
        training(missing_eos_penalty=2.5), start, learner, PROMPTS, [[1]] * 8, CountsWord(), 12, 0, tmp_path
    )
    score, penalty = policy_trainers.reward_functions(setting)
    assert score([0, 7], ["w3 w3", "w1"]) == [2.0, 0.0]
    assert penalty(completion_ids=[[12, 2], [12, 13], [2]]) == [0.0, -2.5, 0.0]
    assert len(policy_trainers.reward_functions(replace(setting, config=training()))) == 1


# --- log-probabilities: no prompt, no pad, no re-tokenised text ---


def test_kl_is_of_the_answers_own_tokens_alone(
    policies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 3, online: what is measured through TRL's forward pass is what the audit's reference model says."""
    kept: dict[str, Any] = {}

    class Spy(policy_module.Probe):  # type: ignore[misc]
        def answer(self) -> Any:
            found = super().answer()
            kept.setdefault("answers", found)
            kept["last"], kept["probe"] = found, self
            return found

    monkeypatch.setattr(policy_module, "Probe", Spy)
    start = start_of(policies["llama"])
    refine_policy(training(), start, CountsWord(), PROMPTS, tmp_path / "out")
    asked = kept["probe"].prompts
    assert len({len(ids) for ids in kept["last"].token_ids}) > 1, (
        "answers of different lengths, so that there is padding"
    )
    before, after = (HFReference(start_of(f), str(f)) for f in (policies["llama"], tmp_path / "out"))
    ids = [[answer] for answer in kept["last"].token_ids]
    assert [row[0] for row in before.logprobs(asked, ids)] == pytest.approx(kept["last"].reference_logprobs, abs=1e-4)
    assert [row[0] for row in after.logprobs(asked, ids)] == pytest.approx(kept["last"].logprobs, abs=1e-4)
    assert kept["answers"].log_ratios == [0.0] * 8


@pytest.mark.parametrize("method", ["dpo", "best_of_n"])
def test_offline_methods_learn_from_the_very_tokens_that_were_sampled(
    policies: dict[str, Path], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 3, offline: before the first step, TRL's log-likelihoods are those that the sampler gave.

    One answer's tokens are none that its text would be tokenised to.
    """
    start = start_of(policies["llama"])
    completions = sample(start)
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(policy_module.Watch, "on_log", lambda self, a, s, c, logs=None, **_: logged.append(logs))
    config = training(method=method, steps=1, prompts_per_step=8)
    refine_policy(config, start, CountsWord(), PROMPTS, tmp_path / "out", completions=completions)
    retokenised = make_tokenizer()(completions[0].text)["input_ids"]
    assert list(completions[0].token_ids) != retokenised
    scored = score_candidates(CountsWord(), PROMPTS, completions, 0.0)
    if method == "dpo":
        pairs = ranked_pairs(scored).pairs
        assert 4 <= len(pairs) <= 8
        assert logged[0]["logps/chosen"] == pytest.approx(np.mean([p.chosen.logprob for p in pairs]), abs=1e-3)
        assert logged[0]["logps/rejected"] == pytest.approx(np.mean([p.rejected.logprob for p in pairs]), abs=1e-3)
        assert logged[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    else:
        best = [answer for _, answer in best_answers(scored)]
        tokens = sum(len(answer.token_ids) for answer in best)
        assert logged[0]["loss"] == pytest.approx(-sum(answer.logprob for answer in best) / tokens, abs=1e-4)


# --- the policy must change, and from where it started ---


def test_a_policy_whose_weights_never_change_is_an_error(policies: dict[str, Path], tmp_path: Path) -> None:
    """Trap 5: a learning rate that float32 cannot add."""
    with pytest.raises(ModelError, match=r"after 3 steps none of its weights has changed: is learning_rate 1e-30"):
        refine_policy(
            training(learning_rate=1e-30), start_of(policies["llama"]), CountsWord(), PROMPTS, tmp_path / "out"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def adapter(policies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first-round") / "policy"
    refine_policy(training(lora_rank=4), start_of(policies["llama"]), CountsWord(), PROMPTS, out)
    return out


def test_an_adapter_goes_on_from_itself(policies: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    """Trap 5, both halves: the adapter is trained, and KL is measured from it, not from the base without it."""
    start = start_of(adapter)
    assert ref_sums(start) != ref_sums(start_of(policies["llama"]))
    found = refine_policy(training(lora_rank=8), start, CountsWord(), PROMPTS, tmp_path / "out")
    assert found["history"][0]["kl"] == found["start"]["kl"] == 0
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(policies["llama"])
    assert described["r"] == 4
    assert weights(tmp_path / "out").keys() == weights(adapter).keys()
    assert ref_sums(start_of(tmp_path / "out")) != ref_sums(start)


@pytest.mark.parametrize("method", ["rloo", "dpo", "best_of_n"])
@pytest.mark.parametrize("lora", [None, 4], ids=["merged", "adapter"])
def test_kl_starts_at_zero_from_a_base_with_an_adapter(
    policies: dict[str, Path], adapter: Path, method: str, lora: int | None, tmp_path: Path
) -> None:
    start = start_of(policies["llama"], adapter=str(adapter))
    found = refine_policy(
        training(method=method, lora_rank=lora), start, CountsWord(), PROMPTS, tmp_path / "out",
        completions=sample(start),
    )  # fmt: skip
    assert found["start"]["kl"] == pytest.approx(0, abs=1e-3)
    assert (tmp_path / "out" / "config.json").exists() == (lora is None)


def test_a_reference_that_is_not_the_start_policy_is_an_error(
    policies: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 5: TRL loads its reference by name, and the name of a base with a merged adapter is the base's."""

    def by_name(start: PolicyConfig, _: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(policies["llama"])
        from peft import PeftModel

        return PeftModel.from_pretrained(model, adapter).merge_and_unload().requires_grad_(True)

    monkeypatch.setattr("dissonance.refine.learner._load_whole", by_name)
    start = start_of(policies["llama"], adapter=str(adapter))
    with pytest.raises(ModelError, match="before the first step .* the reference is not the start policy"):
        refine_policy(training(), start, CountsWord(), PROMPTS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rounding_is_no_difference_from_the_reference() -> None:
    check_reference([0.0, 5e-4, -5e-3], [3, 1, 10], 1e-3)
    for ratios in ([0.0, 2e-2], [0.0, -2e-2], [0.0, float("nan")]):
        with pytest.raises(ModelError):
            check_reference(ratios, [3, 10], 1e-3)


def test_nothing_to_train_is_an_error(policies: dict[str, Path], adapter: Path) -> None:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(policies["llama"])
    everything = check_trainable(model)
    learner = load_learner(start_of(adapter), 4, adapter)
    assert 0 < check_trainable(learner.model) < everything
    frozen = PeftModel.from_pretrained(model, adapter)  # as PEFT loads by default
    with pytest.raises(ModelError, match="none of its weights are trainable"):
        check_trainable(frozen)


def test_equal_weights_have_equal_digests(policies: dict[str, Path]) -> None:
    one, other = (AutoModelForCausalLM.from_pretrained(policies["llama"]) for _ in range(2))
    assert weights_digest(one) == weights_digest(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-6
    assert weights_digest(one) != weights_digest(other)


# --- running away ---


def test_a_policy_that_runs_away_is_stopped_and_the_last_good_one_kept(
    policies: dict[str, Path], tmp_path: Path
) -> None:
    start = start_of(policies["llama"])
    config = training(steps=60, learning_rate=2e-2, beta=0.0, max_kl=4.0, check_every=1)
    found = refine_policy(config, start, CountsWord(), PROMPTS, tmp_path / "out")
    assert 0 < found["kept_step"] <= found["steps"] < 60
    assert "above max_kl 4" in found["stopped"]["reason"]
    assert abs(found["stopped"]["step"] - found["kept_step"]) <= 5
    assert found["end"]["kl"] <= 4 < max(row["kl"] for row in found["history"])
    # What was kept is what is in the folder: its KL, measured by the audit's own code, is within the limit too.
    answers = own_answers(tmp_path / "out")
    after, before = (
        HFReference(start_of(f), str(f)).logprobs(PROMPTS, answers) for f in (tmp_path / "out", start.model)
    )
    assert np.mean(np.array(after) - np.array(before)) < 6


def own_answers(folder: Path) -> list[list[tuple[int, ...]]]:
    """Eight answers of a policy to each prompt."""
    drawn = HFPolicy(start_of(folder), seed=1).sample(PROMPTS)
    return [[c.token_ids for c in drawn if c.prompt_id == prompt.prompt_id] for prompt in PROMPTS]


def test_running_away_before_anything_is_kept_is_an_error(policies: dict[str, Path], tmp_path: Path) -> None:
    config = training(steps=40, learning_rate=5e-2, beta=0.0, max_kl=2.0, check_every=40)
    with pytest.raises(SettingsError, match=r"KL from the start policy is .* before the first check at step 40"):
        refine_policy(config, start_of(policies["llama"]), CountsWord(), PROMPTS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- requests that cannot be met ---


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"prompts_per_step": 9}, SettingsError, "prompts_per_step is 9, but there are 8 prompts"),
        ({"method": "dpo"}, DataError, "dpo learns from the start policy's answers"),
        ({"micro_batch": 5}, SettingsError, "cannot be dealt out evenly"),
        ({"trl_arguments": {"beta": 1.0}}, SettingsError, "trl_arguments: beta has a setting of its own"),
        ({"trl_arguments": {"no_such": 1}}, SettingsError, "TRL refuses the settings: .*no_such"),
        ({"max_new_tokens": 60}, DataError, r"\d prompts leave no room for 60 new tokens in the policy's 64 positions"),
    ],
)
def test_requests_that_cannot_be_met(
    policies: dict[str, Path], changes: dict[str, Any], kind: type[InputError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        refine_policy(training(**changes), start_of(policies["llama"]), CountsWord(), PROMPTS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed(policies: dict[str, Path], tmp_path: Path) -> None:
    start = start_of(policies["llama"])
    with pytest.raises(SettingsError, match="trackers: trackio is not installed: pip install trackio"):
        refine_policy(training(), start, CountsWord(), PROMPTS, tmp_path / "out", trackers=("trackio",))
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_never_overwritten(policies: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="is there already"):
        refine_policy(training(), start_of(policies["llama"]), CountsWord(), PROMPTS, tmp_path / "out")


def test_answers_that_the_reward_model_cannot_tell_apart_teach_nothing(
    policies: dict[str, Path], tmp_path: Path
) -> None:
    start = start_of(policies["llama"])
    with pytest.raises(DataError, match="tells none of the 8 pairs of answers apart"):
        refine_policy(
            training(method="dpo"), start, CountsWord("never"), PROMPTS, tmp_path / "out", completions=sample(start)
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "ppo"}, "method"),
        ({"rso_keep": 3}, "rso_keep"),
        ({"method": "dpo", "beta": 0}, "dpo needs a beta above 0"),
        ({"stepz": 3}, "stepz"),
        ({"max_length_ratio": 1.0}, "max_length_ratio"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PolicyTraining(**settings)


def test_settings_that_depend_on_others() -> None:
    assert PolicyTraining().peak_learning_rate == 1e-6
    assert PolicyTraining(lora_rank=8).peak_learning_rate == pytest.approx(1e-5)
    assert PolicyTraining(method="best_of_n").peak_learning_rate == 1e-5
    assert (PolicyTraining().kl_coefficient, PolicyTraining(method="dpo").kl_coefficient) == (0.05, 0.1)
    assert PolicyTraining(beta=0).kl_coefficient == 0
    assert policy_trainers._batch(PolicyTraining(micro_batch=8), 64, 2) == {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
    }


def test_progress_counts_the_steps(policies: dict[str, Path], tmp_path: Path) -> None:
    from contextlib import contextmanager

    seen = SimpleNamespace(opened=[], done=0)

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Any:
        seen.opened.append((label, total, unit))
        yield lambda more: setattr(seen, "done", seen.done + more)

    refine_policy(training(), start_of(policies["llama"]), CountsWord(), PROMPTS, tmp_path / "out", progress=progress)
    assert seen.opened == [("rloo: training the policy", 3, "steps")]
    assert seen.done == 3
