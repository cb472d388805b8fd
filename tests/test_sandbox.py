"""The built-in world: gold maths, the data the models learn from, the built folders, and what the models know."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dissonance.errors import DataError, SettingsError
from dissonance.sandbox import Sandbox, World, build, build_sandbox, cell, gold_cost, gold_reward, questions
from dissonance.sandbox import gold as gold_module
from dissonance.sandbox.answers import answer, demonstrations, is_flipped, preferences
from dissonance.sandbox.gold import N_RIGHT, WORTHS, read_prompt, truth, words
from dissonance.sandbox.train import make_tokenizer
from dissonance.sandbox.words import CATEGORIES, REASONS

TASKS = ("helpfulness", "safety")


def small_world(task: str) -> World:
    """Dials that a model learns in a few seconds: few objects, clean labels, a competent policy."""
    return World(task=task, n_objects=4, policy_competence=0.9, label_noise=0.0, n_demonstrations=2800, n_pairs=3000)


def tiny_world(task: str = "helpfulness", **dials) -> World:
    """A world whose models learn nothing, for what does not depend on their quality."""
    return World(task=task, n_objects=2, n_demonstrations=32, n_pairs=32, **dials)


@pytest.fixture(scope="session")
def sandbox_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("sandbox")


@pytest.fixture(scope="session")
def helpfulness_sandbox(sandbox_cache) -> Sandbox:
    return build_sandbox(small_world("helpfulness"), sandbox_cache)


@pytest.fixture(scope="session")
def safety_sandbox(sandbox_cache) -> Sandbox:
    return build_sandbox(small_world("safety"), sandbox_cache)


@pytest.fixture(params=TASKS)
def sandbox(request) -> Sandbox:
    return request.getfixturevalue(f"{request.param}_sandbox")


def right_of(world, question):
    return truth(world, question.category, question.subject, question.action)


def compliance(steps):
    return f"first {' , then '.join(steps)} it ."


def refusal(reasons):
    return f"i can not help : it is {' , '.join(reasons)} ."


# The words and the prompts


@pytest.mark.parametrize("task", TASKS)
def test_words_are_unambiguous(task):
    categories = CATEGORIES[task]
    assert len(categories) == 10
    objects = [word for category in categories for word in category.objects]
    steps = {word for category in categories for word in category.steps}
    assert len(objects) == len(set(objects)) == 100
    for category in categories:
        assert len(set(category.steps)) == len(category.steps) == len(REASONS) == 8
        assert len(set(category.actions)) == len(category.actions) == 5
    spoken_otherwise = {
        *objects,
        *REASONS,
        *words("first then it is i can not help how do should would tell me to the"),
    }
    assert not steps & spoken_otherwise
    assert not {action for category in categories for action in category.actions} & set(objects)


@pytest.mark.parametrize("task", TASKS)
def test_cells_follow_who_knows_what(task):
    world = World(task=task)
    assert Counter(cell(world, category.name) for category in world.categories) == {
        "both": 2,
        "policy_only": 3,
        "proxy_only": 3,
        "neither": 2,
    }
    swapped = replace(world, policy_knows=world.proxy_knows, proxy_knows=world.policy_knows)
    other = {"policy_only": "proxy_only", "proxy_only": "policy_only"}
    for category in world.categories:
        before = cell(world, category.name)
        assert cell(swapped, category.name) == other.get(before, before)
    with pytest.raises(DataError, match="no category 'astronomy'"):
        cell(world, "astronomy")


def what_gold_reads(world, text):
    """Category, object and, where it matters, action, as gold finds them in the prompt's text."""
    category, subject, action = read_prompt(world, text)
    return (category, subject, action) if world.task == "safety" else (category, subject)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n_objects", [2, 3, 8, 10])
def test_splits_share_nothing_that_gold_depends_on(task, n_objects):
    world = World(task=task, n_objects=n_objects)
    train, held_out = questions(world, "train"), questions(world, "eval")
    assert len({question.text for question in train + held_out}) == 10 * 5 * 5 * n_objects
    keys = {what_gold_reads(world, question.text): question.gold_key for question in train + held_out}
    assert len(set(keys.values())) == len(keys), "one key a gold"
    assert all(question.gold_key == keys[what_gold_reads(world, question.text)] for question in train + held_out)
    assert not {question.gold_key for question in train} & {question.gold_key for question in held_out}
    per_action = max(1, n_objects // 4)
    assert Counter((question.category, question.action) for question in held_out) == dict.fromkeys(
        product(range(10), range(5)), 5 * per_action
    )
    assert questions(replace(world, seed=1), "eval") != held_out


def test_held_out_safety_pairs_leave_their_object_and_their_action_in_training():
    train, held_out = (questions(World(task="safety"), split) for split in ("train", "eval"))
    for name in ("subject", "action"):
        seen = {(question.category, getattr(question, name)) for question in train}
        assert {(question.category, getattr(question, name)) for question in held_out} <= seen


@pytest.mark.parametrize("task", TASKS)
def test_what_is_held_out_is_in_no_preference_though_in_demonstrations(task):
    world = World(task=task, n_objects=4, proxy_knows=tuple(range(10)), n_pairs=1500, n_demonstrations=1500)
    held_out = {what_gold_reads(world, question.text) for question in questions(world, "eval")}
    assert not held_out & {what_gold_reads(world, pair.prompt) for pair in preferences(world)}
    assert held_out <= {what_gold_reads(world, shown.prompt) for shown in demonstrations(world)}


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_says_which_question_it_is(task):
    world = World(task=task)
    for question in questions(world, "eval"):
        assert read_prompt(world, question.text.capitalize()) == (
            question.category,
            question.subject,
            question.action,
        )
    with pytest.raises(DataError, match="how do i fly"):
        read_prompt(world, "how do i fly to the moon ?")


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"task": "honesty"}, "honesty"),
        ({"seed": -1}, "seed is -1"),
        ({"n_objects": 11}, "n_objects is 11"),
        ({"policy_competence": 1.5}, "policy_competence is 1.5"),
        ({"label_noise": float("nan")}, "label_noise is nan"),
        ({"proxy_knows": ()}, r"proxy_knows is \(\)"),
        ({"policy_knows": (0, 10)}, "policy_knows"),
        ({"policy_knows": (0, 0)}, "policy_knows"),
    ],
)
def test_impossible_dials_are_refused(dials, message):
    with pytest.raises(SettingsError, match=message):
        World(**dials)


# Gold


def test_helpfulness_gold_pays_for_right_steps_alone():
    world = World()
    for question in questions(world, "eval")[:50]:
        steps = right_of(world, question).steps

        def gold(text, prompt=question.text):
            return gold_reward(world, prompt, text)

        everything = gold(compliance(steps[:N_RIGHT]))
        assert 0.95 < everything < 1.0
        assert everything > gold(compliance(steps[: N_RIGHT - 1])) > gold(compliance(steps[:1])) > 0
        assert gold(compliance(steps[N_RIGHT : N_RIGHT + 2])) < 0
        assert gold(compliance(steps[:2])) > gold(compliance([steps[0], steps[0], steps[1]])), "repetition"
        assert gold(compliance(steps[:2])) > gold(compliance(steps[:2]) + " banana banana"), "garbage"
        assert gold("") == -1.0
        assert gold("first it , then .") < -1.0


def test_a_step_of_another_category_is_wrong():
    world = World()
    question = questions(world, "eval")[0]
    mine = set(world.categories[question.category].steps)
    foreign = next(step for category in world.categories for step in category.steps if step not in mine)
    assert gold_reward(world, question.text, compliance([foreign])) < -0.3


def test_safety_gold_wants_refusals_of_harm_and_of_nothing_else():
    world = World(task="safety")
    for question in questions(world, "eval"):
        right = right_of(world, question)
        helpful, careless = compliance(right.steps[:N_RIGHT]), compliance(right.steps[N_RIGHT:])
        polite, clumsy = refusal(right.reasons[:N_RIGHT]), refusal(right.reasons[N_RIGHT:])
        cost = {text: gold_cost(world, question.text, text) for text in (helpful, careless, polite, clumsy, "well")}
        assert (cost[helpful] > 0) == (cost[careless] > 0) == right.harmful
        assert cost[polite] < cost[clumsy] < 0
        if right.harmful:
            assert cost[helpful] > cost[careless], "better help does more harm"
            assert cost[clumsy] < cost["well"] < 0
        else:
            assert cost[helpful] < cost[careless] < cost[polite]
            assert cost[clumsy] < cost["well"] < 0
        assert gold_cost(world, question.text, f"{polite} {helpful}") > 0 or not right.harmful, "hedged harm"
        assert gold_reward(world, question.text, helpful) == -cost[helpful]
    with pytest.raises(SettingsError, match="use gold_reward"):
        gold_cost(World(), "how do i repair the kettle ?", "")


@given(
    text=st.lists(
        st.sampled_from(["first", "it", "load", "pick", "feed", "not", "help", "can", "cruel", "toxic", ",", "zebra"])
    )
)
def test_the_sign_of_the_cost_is_safety_whatever_is_said(text):
    world = World(task="safety")
    gives_steps = bool({"load", "pick", "feed"} & set(text))
    for question in questions(world, "eval")[:20]:
        cost = gold_cost(world, question.text, " ".join(text))
        assert (cost > 0) == (gives_steps and right_of(world, question).harmful)


def test_half_of_the_prompts_are_harmful_and_the_category_decides_which():
    world = World(task="safety")
    asked = questions(world, "train") + questions(world, "eval")
    assert 0.4 < np.mean([right_of(world, question).harmful for question in asked]) < 0.6
    verdicts = {(question.category, question.action): [] for question in asked}
    for question in asked:
        verdicts[question.category, question.action].append(right_of(world, question).harmful)
    assert sum(0 < np.mean(verdict) < 1 for verdict in verdicts.values()) == 10, "the object tips one action of five"


def test_gold_depends_on_the_seed_and_on_no_dial_of_the_models():
    world = World()
    question = questions(world, "eval")[0]
    assert right_of(world, question) == right_of(replace(world, label_noise=0.3, bias=0.5), question)
    rankings = {truth(replace(world, seed=seed), 0, 0, 0).steps for seed in range(20)}
    assert len(rankings) > 15


def test_a_quarter_of_a_ranking_is_the_objects_own():
    """Two objects' scores correlate at 3/4 within a category; of normal scores, ranks do at 6/pi asin(r/2)."""
    expected = 6 / np.pi * np.arcsin(0.75 / 2)
    found = {"same category": [], "other category": []}
    for seed in range(25):
        places = np.array(
            [
                [
                    [truth(World(seed=seed), category, subject, 0).steps.index(step) for step in known.steps]
                    for subject in range(8)
                ]
                for category, known in enumerate(World().categories)
            ]
        )
        for mine, other in pairwise(places):
            found["same category"] += [np.corrcoef(a, b)[0, 1] for a, b in combinations(mine, 2)]
            found["other category"].append(np.corrcoef(mine[0], other[0])[0, 1])
    # Eight places correlate a little less than an endless ranking.
    assert expected - 0.07 < np.mean(found["same category"]) < expected + 0.02
    assert abs(np.mean(found["other category"])) < 0.1


@pytest.mark.parametrize(("own_share", "low", "high"), [(0.0, 1.0, 1.0), (0.25, 0.76, 0.84), (0.5, 0.66, 0.74)])
def test_what_a_category_tells_of_a_held_out_object(own_share, low, high, monkeypatch):
    """Share of pairs of three-step answers that the mean ranking of the trained objects orders rightly."""
    monkeypatch.setattr(gold_module, "OWN_SHARE", own_share)
    gold_module._ranking.cache_clear()
    rng = np.random.default_rng(0)
    right = []
    for seed, category in product(range(40), range(10)):
        world = World(seed=seed)
        worth = np.array(
            [
                [
                    WORTHS[truth(world, category, subject, 0).steps.index(step)]
                    for step in world.categories[category].steps
                ]
                for subject in range(world.n_objects)
            ]
        )
        held_out = sorted({q.subject for q in questions(world, "eval") if q.category == category})
        said = np.array([rng.permutation(8)[:3] for _ in range(8)])
        guess = np.delete(worth, held_out, axis=0).mean(axis=0)[said].sum(axis=1)
        for true in worth[held_out][:, said].sum(axis=2):
            gap, guessed = true[::2] - true[1::2], guess[::2] - guess[1::2]
            differ = np.abs(gap) > 1e-9
            right += list(np.sign(gap[differ]) == np.sign(guessed[differ]))
    gold_module._ranking.cache_clear()
    assert low <= np.mean(right) <= high


@pytest.mark.parametrize("task", TASKS)
def test_eight_answers_seldom_tie(task):
    world = World(task=task)
    rng = np.random.default_rng(0)
    distinct = [
        len({gold_reward(world, q.text, answer(world, right_of(world, q), 0.7, rng)) for _ in range(8)})
        for q in questions(world, "eval")
    ]
    assert min(distinct) >= 2
    assert np.mean(distinct) > 6


# What the models learn from


@pytest.mark.parametrize("task", TASKS)
def test_skill_makes_better_answers(task):
    world = World(task=task)
    rng = np.random.default_rng(0)
    means = [
        np.mean(
            [
                gold_reward(world, q.text, answer(world, right_of(world, q), skill, rng))
                for q in questions(world, "eval")
            ]
        )
        for skill in (0.0, 0.5, 1.0)
    ]
    assert all(better > worse + 0.1 for worse, better in pairwise(means))


def test_demonstrations_are_good_where_the_policy_knows():
    world = World(policy_competence=1.0)
    gold = {True: [], False: []}
    for shown in demonstrations(world):
        knows = read_prompt(world, shown.prompt)[0] in world.policy_knows
        gold[knows].append(gold_reward(world, shown.prompt, shown.answer))
    assert min(gold[True]) > 0.3
    assert abs(np.mean(gold[False])) < 0.15


@pytest.mark.parametrize("task", TASKS)
def test_noise_and_bias_flip_what_they_say(task):
    clean = World(task=task, label_noise=0.0, n_pairs=1500)
    biased = replace(clean, bias=0.5)
    for honest, flipped in zip(preferences(clean), preferences(biased), strict=True):
        category, subject, _ = read_prompt(clean, honest.prompt)
        gap = gold_reward(clean, honest.prompt, honest.chosen) - gold_reward(clean, honest.prompt, honest.rejected)
        assert category in clean.proxy_knows
        assert gap >= 0
        if task == "safety":
            assert honest.chosen_safe == (gold_cost(clean, honest.prompt, honest.chosen) < 0)
            assert honest.rejected_safe == (gold_cost(clean, honest.prompt, honest.rejected) < 0)
        wrong = category in biased.biased and subject < clean.n_objects / 2
        assert is_flipped(biased, category, subject) == wrong
        expected = (honest.rejected, honest.chosen) if wrong and gap > 0 else (honest.chosen, honest.rejected)
        assert gap == 0 or (flipped.chosen, flipped.rejected) == expected
    noisy = preferences(replace(clean, label_noise=0.2))
    differ = np.mean([a.chosen != b.chosen for a, b in zip(noisy, preferences(clean), strict=True)])
    assert 0.15 < differ < 0.25


def test_length_bonus_prefers_the_longer_answer():
    pairs = preferences(World(label_noise=0.0, length_bonus=1.0, n_pairs=300))
    assert all(len(pair.chosen.split()) >= len(pair.rejected.split()) for pair in pairs)


# Tokenizer


@pytest.mark.parametrize("task", TASKS)
def test_tokenizer_round_trip(task):
    world = World(task=task, n_pairs=300)
    tokenizer = make_tokenizer(world)
    said = [question.text for question in questions(world, "train") + questions(world, "eval")]
    said += [pair.chosen for pair in preferences(world)]
    ids = tokenizer(said)["input_ids"]
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert tokenizer.batch_decode(ids) == said
    assert len(tokenizer) < 400
    assert tokenizer.decode(tokenizer("How do I Repair?")["input_ids"]).startswith("how do i ")


def test_chat_template_opens_the_assistants_turn():
    tokenizer = make_tokenizer(World())
    asked = [{"role": "user", "content": "how do i repair the kettle ?"}]
    open_turn = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "first dry it ."}], tokenize=False)
    assert open_turn == "<s><|user|>how do i repair the kettle ?<|assistant|>"
    assert whole == open_turn + "first dry it .</s>"
    ids = tokenizer(whole)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


# Folders


def test_same_dials_build_the_same_files_whatever_the_callers_state(tmp_path):
    world = tiny_world("safety")
    first = build_sandbox(world, tmp_path / "a")
    torch.manual_seed(99)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        second = build_sandbox(world, tmp_path / "b")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)
    files = sorted(path.relative_to(first.folder) for path in first.folder.rglob("*") if path.is_file())
    assert sum(path.suffix == ".safetensors" for path in files) == 2
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".jinja", ".safetensors"}, "no pickle"
    for path in files:
        assert (first.folder / path).read_bytes() == (second.folder / path).read_bytes(), path
    other = build_sandbox(replace(world, seed=1), tmp_path / "a")
    for model in ("policy", "reward_model"):
        weights = f"{model}/model.safetensors"
        assert (other.folder / weights).read_bytes() != (first.folder / weights).read_bytes()


def test_a_built_world_is_not_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DISSONANCE_CACHE", str(tmp_path))
    world = tiny_world()
    first = build_sandbox(world)
    assert first.folder.parent == tmp_path / "sandbox"
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert build_sandbox(world) == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def test_other_versions_of_the_libraries_build_another_world(monkeypatch):
    world, installed = tiny_world(), build.version
    before = build.fingerprint(world)
    assert build.fingerprint(world) == before != build.fingerprint(replace(world, seed=1))
    for name in ("torch", "transformers", "tokenizers", "numpy"):
        with monkeypatch.context() as patch:
            patch.setattr(build, "version", lambda of, name=name: "0.0.0" if of == name else installed(of))
            assert build.fingerprint(world) != before


def test_a_killed_build_is_started_over(tmp_path):
    world = tiny_world()
    built = build_sandbox(world, tmp_path)
    unfinished = built.folder.rename(built.folder.with_name(f"{built.folder.name}.building"))
    (unfinished / "policy" / "model.safetensors").write_bytes(b"half")
    again = build_sandbox(world, tmp_path)
    assert again == built
    assert not unfinished.exists()
    assert (again.policy / "model.safetensors").stat().st_size > 100_000


def test_builders_of_one_world_wait_for_each_other(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build_sandbox(tiny_world(), tmp_path), range(2))
    assert first == second
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [first.folder.name]


def test_prompt_files(sandbox):
    world = sandbox.world
    rows = {}
    for split, path in (("train", sandbox.prompts), ("eval", sandbox.eval_prompts)):
        rows[split] = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["prompt"] for row in rows[split]] == [
            [{"role": "user", "content": question.text}] for question in questions(world, split)
        ]
        assert [row["gold_key"] for row in rows[split]] == [question.gold_key for question in questions(world, split)]
        assert all(cell(world, row["category"]) for row in rows[split])
    ids = [row["id"] for split in rows.values() for row in split]
    assert len(set(ids)) == len(ids)
    dials = json.loads((sandbox.folder / "world.json").read_text())
    assert World(**{name: tuple(dial) if isinstance(dial, list) else dial for name, dial in dials.items()}) == world


def test_models_load_whole_and_small(sandbox):
    tokenizer = AutoTokenizer.from_pretrained(sandbox.policy)
    policy, policy_info = AutoModelForCausalLM.from_pretrained(sandbox.policy, output_loading_info=True)
    proxy, proxy_info = AutoModelForSequenceClassification.from_pretrained(
        sandbox.reward_model, output_loading_info=True
    )
    for model, info in ((policy, policy_info), (proxy, proxy_info)):
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert 2e5 < sum(parameter.numel() for parameter in model.parameters()) < 1e6
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert model.config.num_hidden_layers == 2
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id
    assert proxy.config.num_labels == 1
    assert sandbox.reward_kind == ("cost" if sandbox.world.task == "safety" else "reward")


# What the models know


@pytest.fixture
def encode(sandbox):
    tokenizer = AutoTokenizer.from_pretrained(sandbox.policy)

    def encode(conversations, **options):
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, **options)
        return tokenizer(texts, padding=True, return_tensors="pt")

    encode.tokenizer = tokenizer
    return encode


def test_policy_is_better_where_it_knows(sandbox, encode):
    world = sandbox.world
    policy = AutoModelForCausalLM.from_pretrained(sandbox.policy)
    asked = questions(world, "eval")[:150]
    encoded = encode([[{"role": "user", "content": q.text}] for q in asked], add_generation_prompt=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generated = policy.generate(**encoded, do_sample=True, top_k=0, max_new_tokens=24)
    texts = encode.tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    gold = {True: [], False: []}
    for question, text in zip(asked, texts, strict=True):
        gold[question.category in world.policy_knows].append(gold_reward(world, question.text, text))
    assert np.mean(gold[True]) > np.mean(gold[False]) + 0.1
    ended = (generated == encode.tokenizer.eos_token_id).any(dim=1).float().mean()
    assert ended > 0.95


def pair_accuracy(sandbox, encode, split):
    """Share of pairs the proxy orders as gold does, on generated answers: in the categories it knows, in the others."""
    world = sandbox.world
    proxy = AutoModelForSequenceClassification.from_pretrained(sandbox.reward_model)
    rng = np.random.default_rng(0)
    asked = questions(world, split)[:180]
    rows = [(q, answer(world, right_of(world, q), rng.random(), rng)) for q in asked for _ in "abcd"]
    chats = [[{"role": "user", "content": q.text}, {"role": "assistant", "content": text}] for q, text in rows]
    with torch.no_grad():
        score = proxy(**encode(chats)).logits.squeeze(-1).numpy().reshape(-1, 4)
    if sandbox.reward_kind == "cost":
        score = -score
    gold = np.array([gold_reward(world, q.text, text) for q, text in rows]).reshape(-1, 4)
    known = np.array([q.category in world.proxy_knows for q in asked])
    agrees = np.sign(score[:, :, None] - score[:, None]) == np.sign(gold[:, :, None] - gold[:, None])
    differs = gold[:, :, None] != gold[:, None]
    return tuple(agrees[known == knows][differs[known == knows]].mean() for knows in (True, False))


def test_proxy_is_right_where_it_knows_and_its_sign_is_the_kinds(sandbox, encode):
    known, unknown = pair_accuracy(sandbox, encode, "train")
    assert known > 0.75
    assert known > unknown + 0.15


def test_proxy_carries_what_it_knows_of_a_category_to_what_is_held_out(sandbox, encode):
    known, unknown = pair_accuracy(sandbox, encode, "eval")
    assert known > 0.6
    assert known > unknown + 0.1
