"""Against a real vLLM server, on the CPU: `make test-vllm`.

It lives in an environment of its own, with SmolLM2's weights beside it; where that is missing, these tests fail.
"""

import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import requests
from transformers import LlamaConfig

from dissonance.config import AuditConfig, PolicyConfig, RewardConfig
from dissonance.errors import ModelError
from dissonance.measuring import audit
from dissonance.prompts import load_prompts
from dissonance.records import Completion, Message, Prompt
from dissonance.rewards import HFRewardModel, load_reward_model
from dissonance.sampling import HFPolicy, HFReference, HTTPPolicy, load_policy
from dissonance.sandbox import Sandbox, World, build_sandbox, train
from dissonance.sections import ServerConfig

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]  # a server takes minutes to start

ENVIRONMENT = Path(os.environ.get("DISSONANCE_TEST_ENVS", Path(__file__).parent.parent)) / ".venv-vllm"
SMOLLM2 = ENVIRONMENT / "smollm2"
PER_TOKEN = 1e-4
"""Nats by which log-likelihoods may differ from those of this process, for each token; both compute in float32."""
REWARDS = 1e-4
"""By how much rewards may."""


class Vllm:
    """A server on loopback, which can be killed and started again at the same address."""

    def __init__(self, model: Path, log: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{self._port}", log
        # On a CPU, 0.32 stops at a request with a seed whose prompt it reads in parts: hence whole prompts.
        whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
        self._arguments = ["--model", str(model), "--dtype", "float32", "--enforce-eager", *whole, *arguments]
        self.start()

    def start(self) -> None:
        python = ENVIRONMENT / "bin" / "python"
        assert python.exists(), f"{python} is missing: run make test-vllm"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", *self._arguments]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self._port)],
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 400
        while True:
            try:
                requests.get(f"{self.url}/health", timeout=5).raise_for_status()
                return
            except requests.RequestException:
                assert self._process.poll() is None, self._log.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def sandbox(folder: Path) -> Sandbox:
    """A built-in world, its models with three heads of 32 where they have four of 24: vLLM has no such on CPUs."""
    original = train._config

    def config(*arguments: Any, **changes: Any) -> LlamaConfig:
        made = original(*arguments, **changes)
        made.num_attention_heads, made.num_key_value_heads, made.head_dim = 3, 3, 32
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_config", config)
        return build_sandbox(World(n_demonstrations=400, n_pairs=200), folder)


def served(model: Path, folder: Path, *arguments: str) -> Iterator[Vllm]:
    server = Vllm(model, folder / f"{model.name}.log", *arguments)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def narrowed(sandbox: Sandbox, folder: Path) -> Path:
    """The policy with a generation config that would change what is sampled, as many models come with."""
    out = folder / "narrowed"
    shutil.copytree(sandbox.policy, out)
    path = out / "generation_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "temperature": 0.1}))
    return out


@pytest.fixture(scope="module")
def policy_server(narrowed: Path, folder: Path) -> Iterator[Vllm]:
    yield from served(narrowed, folder)


@pytest.fixture(scope="module")
def reward_server(sandbox: Sandbox, folder: Path) -> Iterator[Vllm]:
    yield from served(sandbox.reward_model, folder, "--runner", "pooling")


@pytest.fixture(scope="module")
def smollm2_server(folder: Path) -> Iterator[Vllm]:
    assert (SMOLLM2 / "config.json").exists(), f"{SMOLLM2} is missing: run make test-vllm"
    yield from served(SMOLLM2, folder, "--max-model-len", "512")


def policy_config(server: Vllm, model: Path, /, **settings: Any) -> PolicyConfig:
    where = ServerConfig(url=server.url, **{"patience": 20, **settings.pop("server", {})})
    settings = {"n": 8, "max_new_tokens": 24, "dtype": "float32", **settings}
    return PolicyConfig(model=str(model), server=where, **settings)


def sampled(policy: Any, prompts: list[Prompt]) -> list[Completion]:
    return [one for batch in policy.plan(prompts) for one in policy.sample(batch)]


def read_here(config: PolicyConfig, prompts: list[Prompt], drawn: list[Completion]) -> list[float]:
    """The log-likelihoods as this process computes them."""
    ids = [[c.token_ids for c in drawn if c.prompt_id == prompt.prompt_id] for prompt in prompts]
    return [value for values in HFReference(config, config.model).logprobs(prompts, ids) for value in values]


def differences(drawn: list[Completion], own: list[float]) -> list[float]:
    return [abs(c.logprob - value) / len(c.token_ids) for c, value in zip(drawn, own, strict=True)]


@pytest.fixture(scope="module")
def prompts(sandbox: Sandbox) -> list[Prompt]:
    return list(load_prompts(str(sandbox.prompts), limit=40).prompts)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9)])
def test_the_sandbox_policy_has_the_log_likelihoods_of_this_process(
    policy_server: Vllm, narrowed: Path, prompts: list[Prompt], temperature: float, top_p: float
) -> None:
    config = policy_config(policy_server, narrowed, temperature=temperature, top_p=top_p)
    drawn = sampled(load_policy(config, seed=1), prompts)
    assert [(c.prompt_id, c.completion_id) for c in drawn] == [(p.prompt_id, i) for p in prompts for i in range(8)]
    found = differences(drawn, read_here(config, prompts, drawn))
    print(f"sandbox: largest difference {max(found):.1e} nats a token")
    assert max(found) < PER_TOKEN
    stopped = [c for c in drawn if c.finish_reason == "stop"]
    assert stopped
    ends = {c.token_ids[-1] for c in stopped}
    assert len(ends) == 1
    assert not any(ends & set(c.token_ids[:-1]) for c in drawn)
    again = sampled(load_policy(config, seed=1), prompts[::-1])
    same = {(c.prompt_id, c.completion_id): c.token_ids for c in again}
    share = statistics.mean(same[c.prompt_id, c.completion_id] == c.token_ids for c in drawn)
    print(f"sandbox: {share:.1%} of the answers are the same in other batches")
    assert share > 0.95


def test_the_generation_config_changes_nothing(policy_server: Vllm, narrowed: Path, prompts: list[Prompt]) -> None:
    config = policy_config(policy_server, narrowed, n=16)
    drawn = sampled(HTTPPolicy(config, seed=1), prompts)
    own = sampled(HFPolicy(config.model_copy(update={"server": None}), seed=1), prompts)
    means = [statistics.mean(c.logprob for c in some) for some in (drawn, own)]
    error = math.sqrt(sum(statistics.variance([c.logprob for c in some]) / len(some) for some in (drawn, own)))
    print(f"sandbox: mean log-likelihood {means[0]:.3f} by the server, {means[1]:.3f} here, standard error {error:.3f}")
    assert abs(means[0] - means[1]) < 5 * error
    body = {"model": str(narrowed), "prompt": HTTPPolicy(config)._encode(prompts[0]), "n": 16, "max_tokens": 12}
    said = requests.post(f"{policy_server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert len({choice["text"] for choice in said}) == 1  # which the server would do, if it were not told otherwise
    assert len({c.text for c in drawn[:16]}) > 4


def test_smollm2_has_the_log_likelihoods_of_this_process(smollm2_server: Vllm) -> None:
    topics = ("eggs", "a river", "the moon", "old maps")
    prompts = [Prompt(name, (Message("user", f"Tell me about {name}."),)) for name in topics]
    config = policy_config(smollm2_server, SMOLLM2, n=4, max_new_tokens=32, temperature=0.9, top_p=0.95)
    drawn = sampled(load_policy(config, seed=1), prompts)
    found = differences(drawn, read_here(config, prompts, drawn))
    print(f"SmolLM2: largest difference {max(found):.1e} nats a token")
    assert max(found) < PER_TOKEN


def test_log_probabilities_after_processing_are_refused(narrowed: Path, folder: Path) -> None:
    server = Vllm(narrowed, folder / "processed.log", "--logprobs-mode", "processed_logprobs")
    try:
        with pytest.raises(ModelError, match="`--logprobs-mode raw_logprobs`, vLLM's default"):
            HTTPPolicy(policy_config(server, narrowed, temperature=0.7))
    finally:
        server.kill()


@pytest.mark.parametrize("max_length", [None, 14])
def test_rewards_are_those_of_this_process_and_not_squashed(
    reward_server: Vllm, sandbox: Sandbox, prompts: list[Prompt], max_length: int | None
) -> None:
    config = RewardConfig(
        model=str(sandbox.reward_model),
        dtype="float32",
        max_length=max_length,
        server=ServerConfig(url=reward_server.url),
    )
    turns = [prompt.messages for prompt in prompts]
    answers = [" ".join(prompts[-1 - i].messages[-1].content.split()[: 2 + i % 9]) for i in range(len(prompts))]
    local = HFRewardModel(config.model_copy(update={"server": None})).score(turns, answers)
    found = load_reward_model(config).score(turns, answers)
    difference = max(abs(a.value - b.value) for a, b in zip(found, local, strict=True))
    spread = max(one.value for one in local) - min(one.value for one in local)
    print(f"rewards: largest difference {difference:.1e}, of a spread of {spread:.2f}")
    assert difference < REWARDS
    assert [one.truncated for one in found] == [one.truncated for one in local]
    assert any(one.truncated for one in found) == (max_length is not None)
    squashed = [1 / (1 + math.exp(-one.value)) for one in local]
    assert max(abs(a.value - b) for a, b in zip(found, squashed, strict=True)) > 100 * REWARDS
    cost = load_reward_model(config.model_copy(update={"kind": "cost"})).score(turns, answers)
    assert [one.value for one in cost] == pytest.approx([-one.value for one in found], abs=REWARDS)


def test_servers_killed_in_the_middle_of_an_audit_lose_and_double_nothing(
    policy_server: Vllm, reward_server: Vllm, narrowed: Path, sandbox: Sandbox, folder: Path
) -> None:
    config = AuditConfig(
        prompts={"source": str(sandbox.prompts), "limit": 96},
        policy=policy_config(policy_server, narrowed, server={"patience": 400, "requests": 2}),
        reward_model=RewardConfig(
            model=str(sandbox.reward_model), dtype="float32",
            server=ServerConfig(url=reward_server.url, patience=400, requests=2),
        ),
    )  # fmt: skip
    audit(config, folder / "undisturbed")
    parts = folder / "killed" / "round-000" / "parts"
    with ThreadPoolExecutor(1) as pool:
        audited = pool.submit(audit, config, folder / "killed")
        for stage, server in (("completions", policy_server), ("rewards", reward_server)):
            while not list(parts.glob(f"{stage}-*")) and not audited.done():
                time.sleep(0.001)
            server.kill()
            assert len(list(parts.glob(f"{stage}-*"))) < 6
            server.start()
        audited.result(400)
    whole, killed = (
        pq.read_table(folder / name / "round-000" / "completions.parquet") for name in ("undisturbed", "killed")
    )
    keys = ["prompt_id", "completion_id"]
    assert killed.select(keys) == whole.select(keys)
    same = [a == b for a, b in zip(killed["token_ids"].to_pylist(), whole["token_ids"].to_pylist(), strict=True)]
    print(f"restart: {statistics.mean(same):.1%} of the answers are the same, token for token")
    assert statistics.mean(same) > 0.95
    for name, most in (("logprob", 24 * PER_TOKEN), ("reward", REWARDS)):
        pairs = zip(same, killed[name].to_pylist(), whole[name].to_pylist(), strict=True)
        largest = max(abs(a - b) for equal, a, b in pairs if equal)
        print(f"restart: {name} differs by up to {largest:.1e} where they are")
        assert largest < most
