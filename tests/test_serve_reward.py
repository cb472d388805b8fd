"""The reward server of the PPO recipe: real requests, in the shape in which OpenRLHF and verl send them."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
import requests
from fastapi.testclient import TestClient

from conftest import make_tokenizer
from dissonance.config import RewardConfig
from dissonance.errors import DataError
from dissonance.records import Message, Reward
from dissonance.rewards import load_reward_model

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


serve_reward, verl_reward, ppo_prompts = (recipe(name) for name in ("serve_reward", "verl_reward", "ppo_prompts"))


def post(url: str, body: Any, **headers: str) -> Any:
    response = requests.post(url, json=body, headers=headers, timeout=30)
    response.raise_for_status()
    return response.json()


@pytest.fixture(scope="module")
def models(make_policy: Callable[..., Path], make_reward_model: Callable[..., Path]) -> dict[str, Path]:
    return {"policy": make_policy(), "reward": make_reward_model()}


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[str]:
    """The script itself, as a process, with a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(RECIPES / "serve_reward.py"), str(models["reward"]), "--kind", "cost",
               "--policy", str(models["policy"]), "--port", str(port)]  # fmt: skip
    environment = {**os.environ, "REWARD_TOKEN": "open-sesame", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                requests.get(f"{url}/health?token=open-sesame", timeout=5).raise_for_status()
                break
            except (requests.ConnectionError, requests.Timeout):
                assert process.poll() is None, "the server has stopped"
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


CONVERSATION = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2"}]


def rewards(models: dict[str, Path], completions: Sequence[str]) -> list[float]:
    """What our own code says."""
    model = load_reward_model(RewardConfig(model=str(models["reward"]), kind="cost"))
    messages = tuple(Message(**turn) for turn in CONVERSATION)
    return [reward.value for reward in model.score([messages] * len(completions), completions)]


def openrlhf_query(text: str, *, end: str = " <eos>") -> tuple[str, str]:
    """A query and its prompt as OpenRLHF makes them: tokens of prompt and answer, decoded with their special tokens."""
    tokenizer = make_tokenizer()
    prompt = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    ids = (
        tokenizer(prompt, add_special_tokens=False)["input_ids"]
        + tokenizer(text + end, add_special_tokens=False)["input_ids"]
    )
    return tokenizer.decode(ids, skip_special_tokens=False), prompt


def test_openrlhf_gets_the_rewards_of_the_audit(server: str, models: dict[str, Path]) -> None:
    texts = ["w3 w4 w5", "w6"]
    queries, prompts = zip(*(openrlhf_query(text) for text in texts), strict=True)
    body = {"query": queries, "prompts": prompts, "labels": [json.dumps(CONVERSATION)] * 2}
    found = post(f"{server}/get_reward?token=open-sesame", body)
    assert found["rewards"] == found["scores"] == pytest.approx(rewards(models, texts))
    assert found["extra_logs"] == {"reward_truncated": [0.0, 0.0]}


def test_verl_gets_the_same(server: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_URL", server)
    monkeypatch.setenv("REWARD_TOKEN", "open-sesame")
    extra = {"index": 0, "messages": json.dumps(CONVERSATION)}
    asked = [
        {"data_source": "d", "solution_str": text, "ground_truth": "", "extra_info": extra}
        for text in ("w3 w4 w5", "w6")
    ]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda arguments: verl_reward.compute_score(**arguments), asked))
    assert found == pytest.approx(rewards(models, ["w3 w4 w5", "w6"]))
    with pytest.raises(KeyError):
        verl_reward.compute_score("d", "w3", "", {})


def test_nobody_without_the_token_is_answered(server: str) -> None:
    body = {"messages": [CONVERSATION], "completions": ["w3"]}
    for url, headers in (
        (f"{server}/score", {}),
        (f"{server}/score?token=guess", {}),
        (f"{server}/score", {"Authorization": "Bearer x"}),
    ):
        assert requests.post(url, json=body, headers=headers, timeout=30).status_code == 401
    assert len(post(f"{server}/score", body, Authorization="Bearer open-sesame")["rewards"]) == 1


class Slow:
    """Says the length of an answer, and how many it was asked at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        assert len(conversations) == len(completions)
        self.batches.append(len(completions))
        time.sleep(0.05)
        if "bad" in completions:
            raise DataError("it gave nan for 'bad'")
        return [Reward(float(len(text)), truncated=len(text) > 3) for text in completions]


@pytest.fixture
def client() -> Iterator[tuple[TestClient, Slow]]:
    model = Slow()
    with TestClient(serve_reward.make_app(model, "slow")) as client:
        yield client, model


def test_requests_that_wait_are_scored_together(client: tuple[TestClient, Slow]) -> None:
    server, model = client

    def ask(n: int) -> dict[str, Any]:
        return server.post("/score", json={"messages": [CONVERSATION], "completions": ["x" * n]}).json()

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(1, 17)))
    assert [one["rewards"] for one in found] == [[float(n)] for n in range(1, 17)]
    assert [one["truncated"] for one in found] == [[n > 3] for n in range(1, 17)]
    assert sum(model.batches) == 16
    assert len(model.batches) < 16
    assert server.get("/health").json() == {"model": "slow", "scored": 16}


def test_a_request_that_cannot_be_scored_gets_no_reward(client: tuple[TestClient, Slow]) -> None:
    server, _ = client
    for body, said in (
        ({"messages": [CONVERSATION], "completions": ["bad"]}, "it gave nan"),
        ({"messages": [CONVERSATION], "completions": ["a", "b"]}, "2 answers to 1 conversations"),
        ({"messages": [[{"role": "robot", "content": "w1"}]], "completions": ["a"]}, "unknown role 'robot'"),
        ({"messages": [], "completions": []}, "at least 1 item"),
    ):
        response = server.post("/score", json=body)
        assert response.status_code == 422
        assert said in response.text
    label = json.dumps(CONVERSATION)
    for query, prompt, given, said in (
        ("w1 w2 w3", "w2", label, "the query does not begin with its prompt"),
        ("w1 w2 w3", "w1", "42", "the label is not a conversation as JSON"),
        ("w1 w2 w3", "w1", "", "--data.label_key"),
    ):
        response = server.post("/get_reward", json={"query": [query], "prompts": [prompt], "labels": [given]})
        assert response.status_code == 422
        assert said in response.json()["detail"]
    assert server.post("/score", json={"messages": [CONVERSATION], "completions": ["ok"]}).json()["rewards"] == [2.0]


@pytest.mark.parametrize(
    ("query", "prompt", "answer"),
    [
        ("<user> hi <assistant> w1 w2 <eos>", "<user>hi<assistant>", "w1 w2"),
        ("<bos> <user>hi<assistant>w1", "<user>hi<assistant>", "w1"),
        ("<bos><user>hi<assistant>w1<eos><pad><pad>", "<bos><user>hi<assistant>", "w1"),
        ("Question: a\n\nAnswer: no <eos> way", "Question: a\n\nAnswer:", "no <eos> way"),
        ("a <eos>", "a", ""),
    ],
)
def test_the_answer_is_what_follows_the_prompt(query: str, prompt: str, answer: str) -> None:
    assert serve_reward.completion_of(query, prompt, ["<bos>", "<eos>", "<pad>"]) == answer


def test_prompts_carry_their_conversation_for_both(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text(json.dumps({"id": "a", "prompt": CONVERSATION}) + "\n" + json.dumps({"prompt": "w5"}) + "\n")
    command = [sys.executable, str(RECIPES / "ppo_prompts.py"), str(source)]
    subprocess.run(
        [*command, "--openrlhf", str(tmp_path / "o.jsonl"), "--verl", str(tmp_path / "v.parquet")], check=True
    )
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [CONVERSATION, [{"role": "user", "content": "w5"}]]
    assert [json.loads(row["label"]) for row in rows] == [row["prompt"] for row in rows]
    table = pq.read_table(tmp_path / "v.parquet").to_pylist()
    assert [row["prompt"] for row in table] == [row["prompt"] for row in rows]
    assert [json.loads(row["extra_info"]["messages"]) for row in table] == [row["prompt"] for row in rows]
    assert table[0].keys() == {"data_source", "prompt", "reward_model", "extra_info"}
