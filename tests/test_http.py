"""Policies and reward models behind a server: a real one over tiny models, which can be told to fail in every way.

`tests/test_vllm.py` has what only vLLM can show.
"""

import asyncio
import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import uvicorn
from peft import LoraConfig, get_peft_model
from starlette.responses import JSONResponse, Response
from transformers import AutoModelForCausalLM

from conftest import WORDS, make_tokenizer
from dissonance.cli import run as run_command
from dissonance.config import AuditConfig, PolicyConfig, RewardConfig
from dissonance.errors import DataError, ModelError, SettingsError
from dissonance.loop import refine
from dissonance.measuring import audit, audit_settings, select
from dissonance.overlap import overlapped
from dissonance.records import Completion, Message, Prompt
from dissonance.remote import _MOST_FAILURES
from dissonance.rewards import ClassifyRewardModel, GetRewardModel, HFRewardModel, load_reward_model
from dissonance.sampling import HFPolicy, HFReference, HTTPPolicy, load_policy
from dissonance.sections import ServerConfig, deciding, parse_section, without_servers
from model_server import Models, ModelServer

ROOT = Path(__file__).parent.parent
PROMPTS = [Prompt(f"p{i}", (Message("user", " ".join(WORDS[i : i + 2 + i % 5])),)) for i in range(20)]
TURNS = [prompt.messages for prompt in PROMPTS]
ANSWERS = [" ".join(WORDS[3 * i % 70 : 3 * i % 70 + 1 + i % 6]) for i in range(20)]


@pytest.fixture(scope="module")
def reward_model(make_reward_model: Callable[..., Path]) -> Path:
    return make_reward_model(seed=3)


@pytest.fixture(scope="module")
def shared(policy_folder: Path, reward_model: Path) -> Iterator[ModelServer]:
    server = ModelServer(Models(policy_folder, reward_model)).start()
    yield server
    server.stop()


@pytest.fixture
def server(shared: ModelServer) -> Iterator[ModelServer]:
    shared.bodies.clear()
    shared.keys.clear()
    before = dict(vars(shared.models))
    yield shared
    vars(shared.models).update(before)
    shared.behave = lambda _body, _n: None


def policy_config(server: ModelServer | str, folder: Path, /, **settings: Any) -> PolicyConfig:
    url = server if isinstance(server, str) else server.url
    where = {"url": url, "patience": 60.0, **settings.pop("server", {})}
    return PolicyConfig(
        **{"model": str(folder), "n": 4, "max_new_tokens": 12, **settings}, server=ServerConfig(**where)
    )


def reward_config(server: ModelServer | str, folder: Path, /, **settings: Any) -> RewardConfig:
    url = server if isinstance(server, str) else server.url
    where = {"url": url, "patience": 60.0, **settings.pop("server", {})}
    return RewardConfig(model=str(folder), server=ServerConfig(**where), **settings)


def sample(policy: Any, prompts: list[Prompt] = PROMPTS) -> list[Completion]:
    return [one for batch in policy.plan(prompts) for one in policy.sample(batch)]


# -- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_log_likelihoods_are_those_of_the_model(
    server: ModelServer, policy_folder: Path, temperature: float, top_p: float
) -> None:
    config = policy_config(server, policy_folder, temperature=temperature, top_p=top_p)
    policy = load_policy(config, seed=1)
    assert isinstance(policy, HTTPPolicy)
    drawn = sample(policy)
    assert [(c.prompt_id, c.completion_id) for c in drawn] == [(p.prompt_id, i) for p in PROMPTS for i in range(4)]
    ids = [[c.token_ids for c in drawn[4 * i : 4 * i + 4]] for i in range(len(PROMPTS))]
    own = [v for values in HFReference(config, str(policy_folder)).logprobs(PROMPTS, ids) for v in values]
    assert [c.logprob for c in drawn] == pytest.approx(own, abs=1e-4)
    tokenizer = make_tokenizer()
    for c in drawn:
        assert c.text == tokenizer.decode(c.token_ids, skip_special_tokens=True)
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == 2)
        assert c.finish_reason == "stop" or len(c.token_ids) == 12
    assert {c.finish_reason for c in drawn} == {"stop", "length"}


def test_what_is_asked_is_all_that_decides(server: ModelServer, policy_folder: Path) -> None:
    config = policy_config(server, policy_folder, temperature=0.7, top_p=0.9)
    policy = HTTPPolicy(config, seed=1)
    server.bodies.clear()
    drawn = sample(policy)
    assert len(server.bodies) == len(PROMPTS)
    body = server.bodies[0]
    in_process = HFPolicy(config.model_copy(update={"server": None}))
    assert {tuple(one["prompt"]) for one in server.bodies} == {tuple(in_process._encode(p)) for p in PROMPTS}
    plain = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    asked = {"n": 4, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "stop_token_ids": [2], "logprobs": 0}
    assert body == {**body, **plain, **asked, "return_token_ids": True, "model": str(policy_folder)}
    assert len({one["seed"] for one in server.bodies}) == len(PROMPTS)
    assert all(0 <= one["seed"] < 2**62 for one in server.bodies)
    assert sample(HTTPPolicy(config, seed=1), PROMPTS[::-1])[-4:] == drawn[:4]
    assert [c.token_ids for c in sample(HTTPPolicy(config, seed=2))] != [c.token_ids for c in drawn]


def test_equal_token_ids_of_a_prompt_share_one_log_likelihood(server: ModelServer, policy_folder: Path) -> None:
    def jitter(reply: dict[str, Any]) -> dict[str, Any]:
        for i, choice in enumerate(reply["choices"]):
            choice["logprobs"]["token_logprobs"][-1] -= 1e-6 * i
        return reply

    policy = HTTPPolicy(policy_config(server, policy_folder, n=16, max_new_tokens=1, temperature=0.3))
    server.behave = lambda _body, _n: jitter
    drawn = sample(policy)
    said = {(c.prompt_id, c.token_ids): c.logprob for c in drawn}
    assert len(said) < len(drawn)
    assert all(c.logprob == said[c.prompt_id, c.token_ids] for c in drawn)


def _failures() -> dict[str, Callable[[], Any]]:
    def aborted(reply: dict[str, Any]) -> dict[str, Any]:
        last = reply["choices"][-1]
        last["finish_reason"] = "abort"
        last["token_ids"] = last["token_ids"][:1]
        return reply

    async def dropped() -> Response:
        return Response(b'{"choi', 200, {"content-length": "1000"}, "application/json")

    return {
        "500": lambda: Response("engine died", 500),
        "503": lambda: Response("busy", 503, {"retry-after": "0"}),
        "429": lambda: Response("busy", 429, {"retry-after-ms": "10"}),
        "half a reply": lambda: Response(b'{"choices": [', 200),
        "connection lost": dropped,
        "server stopped": lambda: aborted,
    }


@pytest.mark.parametrize("kind", _failures())
def test_what_failed_is_asked_again_and_nothing_is_there_twice(
    server: ModelServer, policy_folder: Path, kind: str
) -> None:
    config = policy_config(server, policy_folder)
    whole = sample(HTTPPolicy(config, seed=1))
    policy = HTTPPolicy(config, seed=1)
    asked: Counter[tuple[int, ...]] = Counter()

    def behave(body: dict[str, Any], _n: int) -> Any:
        asked[tuple(body["prompt"])] += 1
        return _failures()[kind]() if asked[tuple(body["prompt"])] == 1 else None

    server.behave = behave
    assert sample(policy) == whole
    assert set(asked.values()) == {2}


def test_no_more_requests_are_in_flight_than_allowed_and_batches_overlap(
    server: ModelServer, policy_folder: Path
) -> None:
    flying, most, missing = 0, 0, threading.Event()

    async def counted(body: dict[str, Any]) -> Any:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        while most < 24 and not missing.is_set():  # until as many are here as may be: more than a batch of 16
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        flying -= 1

    stop = threading.Timer(20, missing.set)
    stop.start()
    policy = HTTPPolicy(policy_config(server, policy_folder, n=2, server={"requests": 24}))
    server.behave = lambda body, _n: counted(body)
    prompts = [Prompt(str(i), (Message("user", f"w{i} w{i % 7}"),)) for i in range(60)]
    with closing(overlapped(policy, policy.plan(prompts), policy.sample)) as computed:
        assert sum(len(found) for _, found in computed) == 120
    stop.cancel()
    assert most == 24


BAD_REPLIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no token ids": (lambda c: c.pop("token_ids"), "gives no token ids"),
    "no logprobs": (lambda c: c.update(logprobs=None), "the server's reply has no logprobs"),
    "one too few": (lambda c: c["logprobs"]["token_logprobs"].pop(), "log-probabilities for"),
    "nan": (lambda c: c["logprobs"].update(token_logprobs=[math.nan] * len(c["token_ids"])), "gave nan as a log-prob"),
    "null": (lambda c: c["logprobs"].update(token_logprobs=[None] * len(c["token_ids"])), "gave None as a log-prob"),
    "positive": (lambda c: c["logprobs"].update(token_logprobs=[3.0] * len(c["token_ids"])), "gave 3.0 as a log-prob"),
    "minus infinity": (lambda c: c["logprobs"].update(token_logprobs=[-9999.0] * len(c["token_ids"])), "gave -9999"),
    "numbered twice": (lambda c: c.update(index=1), "gave 4 answers, numbered"),
    "ended early": (
        lambda c: c.update(token_ids=[20, 21], finish_reason="length", logprobs={"token_logprobs": [-1.0, -1.0]}),
        "ended an answer after 2 of 12 tokens, at token 21",
    ),
    "another end": (
        lambda c: c.update(token_ids=[20], finish_reason="stop", logprobs={"token_logprobs": [-1.0]}),
        "--generation-config vllm",
    ),
    "never stops": (
        lambda c: c.update(token_ids=[2, 21], finish_reason="length", logprobs={"token_logprobs": [-1.0, -1.0]}),
        "ignores stop_token_ids",
    ),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_server_that_says_something_else_is_refused(server: ModelServer, policy_folder: Path, name: str) -> None:
    change, said = BAD_REPLIES[name]

    def changed(reply: dict[str, Any]) -> dict[str, Any]:
        change(reply["choices"][0])
        return reply

    policy = HTTPPolicy(policy_config(server, policy_folder))
    server.behave = lambda _body, _n: changed
    with pytest.raises(ModelError, match=said):
        policy.sample(PROMPTS[:3])


def test_an_answer_too_few_is_refused(server: ModelServer, policy_folder: Path) -> None:
    policy = HTTPPolicy(policy_config(server, policy_folder))
    server.behave = lambda _body, _n: lambda reply: {"choices": reply["choices"][1:]}
    with pytest.raises(ModelError, match=r"gave 3 answers, numbered \[1, 2, 3\], and not 4"):
        policy.sample(PROMPTS[:1])


@pytest.mark.parametrize(("mode", "said"), [("processed", "after temperature and top-p"), ("logits", "raw_logprobs")])
def test_log_probabilities_that_are_not_raw_are_refused(
    server: ModelServer, policy_folder: Path, mode: str, said: str
) -> None:
    server.models.logprobs = mode
    with pytest.raises(ModelError, match=said):
        HTTPPolicy(policy_config(server, policy_folder, temperature=0.7))


def test_a_server_that_cannot_be_checked_is_refused(server: ModelServer, policy_folder: Path) -> None:
    def without(reply: dict[str, Any]) -> dict[str, Any]:
        reply["choices"][0]["prompt_logprobs"] = None
        return reply

    server.behave = lambda _body, _n: without
    with pytest.raises(ModelError, match="gives no `prompt_logprobs`"):
        HTTPPolicy(policy_config(server, policy_folder))


def test_a_server_with_other_words_is_refused(
    server: ModelServer, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_tokenizer()
    monkeypatch.setattr(server.models, "tokenizer", other)
    HTTPPolicy(policy_config(server, policy_folder))
    monkeypatch.setattr(other, "decode", lambda *_, **__: "other words")
    with pytest.raises(ModelError, match="it serves another model"):
        HTTPPolicy(policy_config(server, policy_folder))


def test_the_served_model_is_named_or_found(server: ModelServer, policy_folder: Path, make_policy: Any) -> None:
    HTTPPolicy(policy_config(server, policy_folder, server={"served_name": str(policy_folder)}))
    elsewhere = make_policy()
    with pytest.raises(
        ModelError, match=rf"no model '{elsewhere}': set server.served_name to one of .*{policy_folder}"
    ):
        HTTPPolicy(policy_config(server, elsewhere))
    with pytest.raises(ModelError, match="no model 'mine'"):
        HTTPPolicy(policy_config(server, policy_folder, server={"served_name": "mine"}))
    server.models.names = ["only"]
    HTTPPolicy(policy_config(server, elsewhere))


def test_prompts_must_fit_the_servers_context(server: ModelServer, policy_folder: Path) -> None:
    server.models.longest = 16
    policy = HTTPPolicy(policy_config(server, policy_folder))
    with pytest.raises(DataError, match="no room for 12 new tokens in the policy's 16 positions"):
        policy.plan(PROMPTS)


def test_a_refusal_is_said_in_the_servers_words(server: ModelServer, policy_folder: Path) -> None:
    policy = HTTPPolicy(policy_config(server, policy_folder))
    server.behave = lambda _body, _n: JSONResponse({"error": {"message": "Token id 7 is unlucky"}}, 400)
    server.bodies.clear()
    with pytest.raises(ModelError, match=r"refuses a request: 400 Token id 7 is unlucky"):
        policy.sample(PROMPTS[:1])
    assert len(server.bodies) == 1


def test_one_request_that_always_fails_ends_it_though_others_are_answered(
    server: ModelServer, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dissonance.remote._LONGEST_PAUSE", 0.01)
    policy = HTTPPolicy(policy_config(server, policy_folder, server={"patience": 1e6}))
    poison = policy._encode(PROMPTS[2])
    server.behave = lambda body, _n: Response("boom", 500) if body["prompt"] == poison else None
    with pytest.raises(ModelError, match=r"failed (\d+) times at one request, at last with: 500 boom") as caught:
        policy.sample(PROMPTS[:4])
    # More than that many where the others' answers take long.
    assert 8 == _MOST_FAILURES <= int(re.findall(r"failed (\d+)", str(caught.value))[0]) < 80


def test_a_server_that_is_away_behind_a_gateway_is_waited_for(
    server: ModelServer, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dissonance.remote._LONGEST_PAUSE", 0.01)
    policy = HTTPPolicy(policy_config(server, policy_folder, server={"patience": 60}))
    expected = policy.sample(PROMPTS[:2])
    server.bodies.clear()
    server.behave = lambda _body, n: Response("bad gateway", 502) if n < 40 else None
    assert policy.sample(PROMPTS[:2]) == expected


def test_an_adapter_is_asked_for_by_the_name_that_the_server_has_for_it(
    server: ModelServer, policy_folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(policy_folder)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(adapter)
    with pytest.raises(ModelError, match=r"adapter is an adapter: say as server\.served_name what the server calls"):
        HTTPPolicy(policy_config(server, policy_folder, adapter=str(adapter)))
    HTTPPolicy(policy_config(server, policy_folder, adapter=str(adapter), server={"served_name": str(policy_folder)}))


def test_a_key_is_said_nowhere(
    server: ModelServer, policy_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("A_KEY", "sk-one\r\n")  # as files with Windows' line ends leave it
    HTTPPolicy(policy_config(server, policy_folder, server={"api_key_env": "A_KEY"}))
    assert server.keys[-1] == "Bearer sk-one"
    monkeypatch.setenv("A_KEY", "sk-\N{HORIZONTAL ELLIPSIS}one")
    with pytest.raises(SettingsError, match="A_KEY holds characters that no API key has") as refused:
        HTTPPolicy(policy_config(server, policy_folder, server={"api_key_env": "A_KEY"}))
    assert "one" not in str(refused.value)


def test_a_busy_server_that_works_at_what_it_took_is_waited_for(server: ModelServer, policy_folder: Path) -> None:
    policy = HTTPPolicy(policy_config(server, policy_folder, server={"patience": 0.3, "requests": 2}))
    expected = policy.sample(PROMPTS[:2])
    done = threading.Event()

    async def slowly() -> None:
        await asyncio.sleep(1.5)
        done.set()

    def behave(body: dict[str, Any], _n: int) -> Any:
        if body["prompt"] == policy._encode(PROMPTS[0]):
            return slowly()
        return None if done.is_set() else Response("busy", 503, {"retry-after-ms": "20"})

    server.behave = behave
    assert policy.sample(PROMPTS[:2]) == expected


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_server_out_of_reach_is_one_clear_error(
    policy_folder: Path,
    prompts_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    (tmp_path / "length.py").write_text("def reward(prompts, completions):\n    return [len(c) for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["audit", "--policy", policy_folder, "--reward-model", "length:reward", "--prompts", prompts_file]
    arguments += ["--out", tmp_path / "run", "--policy-server", url, "--server-patience", "0.5", "--quiet"]
    assert run_command([str(one) for one in arguments]) == 2
    said = capsys.readouterr().err
    assert f"the server {url} gave no answer for 0.5 seconds (ConnectError" in said
    assert not (tmp_path / "run").exists()


def test_the_key_is_sent_and_must_be_there(
    server: ModelServer, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = policy_config(server, policy_folder, server={"api_key_env": "MY_KEY"})
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(SettingsError, match="environment variable MY_KEY is not set"):
        HTTPPolicy(config)
    monkeypatch.setenv("MY_KEY", "open-sesame")
    HTTPPolicy(config)
    assert server.keys == ["Bearer open-sesame"]


# -- reward models ---------------------------------------------------------------------------------------------------


def values(model: Any) -> list[float]:
    return [reward.value for reward in model.score(TURNS, ANSWERS)]


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_rewards_are_the_models_own_outputs(server: ModelServer, reward_model: Path, kind: Any) -> None:
    remote = load_reward_model(reward_config(server, reward_model, kind=kind))
    assert isinstance(remote, ClassifyRewardModel)
    local = HFRewardModel(RewardConfig(model=str(reward_model), kind=kind))
    assert values(remote) == pytest.approx(values(local), abs=1e-5)
    sign = 1 if kind == "reward" else -1
    squashed = [sign / (1 + math.exp(-sign * value)) for value in values(local)]
    assert values(remote) != pytest.approx(squashed, abs=1e-2)


def test_conversations_are_cut_as_in_this_process(server: ModelServer, reward_model: Path) -> None:
    local = HFRewardModel(RewardConfig(model=str(reward_model), max_length=9)).score(TURNS, ANSWERS)
    found = load_reward_model(reward_config(server, reward_model, max_length=9)).score(TURNS, ANSWERS)
    assert [one.truncated for one in found] == [one.truncated for one in local]
    assert {one.truncated for one in found} == {True, False}
    assert [one.value for one in found] == pytest.approx([one.value for one in local], abs=1e-5)
    server.models.longest = 20
    with pytest.raises(ModelError, match="takes 20 tokens, and the model 64: .* --reward-max-length 20"):
        load_reward_model(reward_config(server, reward_model))


def test_an_output_can_be_chosen_and_must_be_there(make_reward_model: Any, server: ModelServer) -> None:
    folder = make_reward_model(num_labels=3)
    three = ModelServer(Models(None, folder)).start()
    try:
        found = load_reward_model(reward_config(three, folder, index=2))
        local = HFRewardModel(RewardConfig(model=str(folder), index=2))
        assert values(found) == pytest.approx(values(local), abs=1e-5)
        with pytest.raises(ModelError, match="has 3 outputs: name the one"):
            load_reward_model(reward_config(three, folder))
        three.behave = lambda _body, _n: lambda reply: {"data": [{**one, "probs": [0.5]} for one in reply["data"]]}
        with pytest.raises(ModelError, match="gave 3 times 1 outputs for 3 texts, and .* has 3"):
            load_reward_model(reward_config(three, folder, index=2))
    finally:
        three.stop()


def test_a_row_that_ends_with_pad_tokens_is_read_where_the_model_reads_it(make_reward_model: Any) -> None:
    folder = make_reward_model(chat=False)
    config = json.loads((folder / "config.json").read_text())
    # The end of sequence, which ends every plain text.
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 2}))
    server = ModelServer(Models(None, folder)).start()
    try:
        found = load_reward_model(reward_config(server, folder))
        assert values(found) == pytest.approx(values(HFRewardModel(RewardConfig(model=str(folder)))), abs=1e-5)
        assert all(ids[-1] != 2 for body in server.bodies for ids in body["input"])
    finally:
        server.stop()


def test_a_server_that_squashes_is_refused(server: ModelServer, reward_model: Path) -> None:
    server.models.squashes = True
    with pytest.raises(ModelError, match="squashes its outputs into 0 to 1 whatever `use_activation` says"):
        load_reward_model(reward_config(server, reward_model))


def test_segments_cannot_be_sent(server: ModelServer, make_reward_model: Any) -> None:
    folder = make_reward_model("bert")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_input_names": names}))
    with pytest.raises(ModelError, match="by segments, which cannot be sent"):
        load_reward_model(reward_config(server, folder))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda reply: {"data": reply["data"][1:]}, ModelError, "not that of vLLM's /classify"),
        (lambda reply: {"embedding": []}, ModelError, "not that of vLLM's /classify"),
        (lambda reply: {"data": [{**one, "probs": [math.nan]} for one in reply["data"]]}, DataError, "NaN or infinity"),
    ],
)
def test_rewards_that_cannot_be_are_refused(
    server: ModelServer, reward_model: Path, change: Any, error: type[Exception], said: str
) -> None:
    model = load_reward_model(reward_config(server, reward_model))
    server.behave = lambda _body, _n: change
    with pytest.raises(error, match=said):
        model.score(TURNS, ANSWERS)


@pytest.fixture(scope="module")
def serve_reward() -> Any:
    spec = importlib.util.spec_from_file_location("serve_reward_recipe", ROOT / "recipes" / "serve_reward.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("chat", [True, False])
def test_get_reward_agrees_with_the_model_behind_it(make_reward_model: Any, serve_reward: Any, chat: bool) -> None:
    folder = make_reward_model(chat=chat)
    behind = HFRewardModel(RewardConfig(model=str(folder), max_length=12))
    app = serve_reward.make_app(behind, "it", make_tokenizer().all_special_tokens, "open-sesame")
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/get_reward"
        os.environ["REWARD_KEY"] = "open-sesame"
        model = load_reward_model(reward_config(url, folder, server={"api_key_env": "REWARD_KEY"}))
        assert isinstance(model, GetRewardModel)
        answers = [*ANSWERS[:-1], ""]
        found = model.score(TURNS, answers)
        expected = behind.score(TURNS, answers)
        assert [one.value for one in found] == pytest.approx([one.value for one in expected], abs=1e-5)
        assert [one.truncated for one in found] == [one.truncated for one in expected]
        assert {one.truncated for one in found} == {True, False}
        flipped = load_reward_model(reward_config(url, folder, kind="cost", server={"api_key_env": "REWARD_KEY"}))
        assert values(flipped)[:3] == pytest.approx([-one.value for one in found[:3]], abs=1e-5)
        os.environ["REWARD_KEY"] = "wrong"
        refused = load_reward_model(reward_config(url, folder, server={"api_key_env": "REWARD_KEY"}))
        with pytest.raises(ModelError, match="refuses a request: 401 the token is missing or wrong"):
            refused.score(TURNS[:1], ANSWERS[:1])
    finally:
        os.environ.pop("REWARD_KEY", None)
        running.should_exit = True
        thread.join(20)
        listening.close()


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        ({"rewards": [1.0]}, ModelError, "gave 1 rewards for 2 texts"),
        ({"scores": [1.0, 2.0]}, ModelError, "gave no list of rewards for 2 texts"),
        ({"rewards": [1.0, None]}, DataError, "gave None for"),
        ({"rewards": [[1.0], [2.0]]}, DataError, r"gave \[1.0\] for"),
        ({"rewards": [1.0, math.inf]}, DataError, "gave inf for"),
    ],
)
def test_get_reward_must_give_a_finite_number_for_each(
    server: ModelServer, reward_model: Path, reply: Any, error: type[Exception], said: str
) -> None:
    model = load_reward_model(reward_config(f"{server.url}/get_reward", reward_model))
    server.behave = lambda _body, _n: lambda _: reply
    with pytest.raises(error, match=said):
        model.score(TURNS[:2], ANSWERS[:2])


def test_get_reward_is_told_nothing_that_it_cannot_do(reward_model: Path) -> None:
    url = "http://127.0.0.1:9/get_reward"
    for name, value in (("index", 0), ("max_length", 12), ("template", "pair")):
        with pytest.raises(SettingsError, match="get_reward server"):
            load_reward_model(reward_config(url, reward_model, **{name: value}))
    with pytest.raises(SettingsError, match="must be an OpenAI-compatible server"):
        HTTPPolicy(policy_config(url, reward_model))


# -- in a run --------------------------------------------------------------------------------------------------------


def audit_config(policy: PolicyConfig, reward: RewardConfig, prompts: Path) -> AuditConfig:
    return AuditConfig(prompts={"source": str(prompts)}, policy=policy, reward_model=reward)


def tables(run: Path) -> dict[str, list[dict[str, Any]]]:
    names = ("prompts", "completions")
    return {name: pq.read_table(run / "round-000" / f"{name}.parquet").to_pylist() for name in names}


def test_an_audit_goes_on_at_another_address_but_not_without_a_server(
    server: ModelServer, policy_folder: Path, reward_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    second = ModelServer(server.models).start()
    try:
        first, other = (
            audit_config(policy_config(at, policy_folder), reward_config(at, reward_model), prompts_file)
            for at in (server, second)
        )
        done = audit(first, tmp_path / "run")
        assert done["completions"] == 48
        assert audit(other, tmp_path / "run") == done
        settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
        assert settings["policy"]["server"] == settings["reward_model"]["server"] == "openai"
        assert settings["resolved"] == {"policy": {}, "reward_model": {}}
        assert server.url.rpartition("/")[2] not in json.dumps(settings)
        here = parse_section(AuditConfig, without_servers(first.model_dump(mode="json")))
        assert here.policy.server is None
        with pytest.raises(Exception, match="policy.server: 'openai', now None"):
            audit(here, tmp_path / "run")
    finally:
        second.stop()


def test_settings_without_a_server_are_what_they_were(policy_folder: Path, reward_model: Path) -> None:
    here = audit_config(
        PolicyConfig(model=str(policy_folder)), RewardConfig(model=str(reward_model)), policy_folder / "none"
    )
    assert "server" not in json.dumps(audit_settings(here))
    named = ServerConfig(url="http://h:1", served_name="mine").model_dump()
    assert deciding({"model": "m", "server": named}) == {"model": "m", "server": "openai mine"}
    others = {"a": [{"b": 1}], "trl_arguments": {"server": "x"}}  # a key of the user's own
    assert deciding({**others, "policy": {"model": "m", "server": None}}) == {**others, "policy": {"model": "m"}}


def test_what_was_trained_is_not_asked_of_the_server_that_holds_the_old_weights(tmp_path: Path) -> None:
    server = ServerConfig(url="http://127.0.0.1:8000")
    policy = PolicyConfig(model="base", adapter="a", server=server)
    reward = RewardConfig(model="base", index=1, server=server)
    for start in (policy, reward):
        trained = start.trained(tmp_path)
        assert (trained.model, trained.adapter, trained.server) == (str(tmp_path), None, None)


def test_a_round_after_the_first_samples_and_scores_what_was_trained(
    server: ModelServer, policy_folder: Path, reward_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    from dissonance.artifacts import create_run
    from dissonance.round_training import POLICY, REWARD_MODEL, models_of_round

    config = audit_config(policy_config(server, policy_folder), reward_config(server, reward_model), prompts_file)
    with create_run(tmp_path / "run", "run", {}, {}) as run:
        policy, reward = models_of_round(run, 1, config)
        assert policy.server is not None  # nothing was trained yet
        assert reward.server is not None
        for name in (POLICY, REWARD_MODEL):
            (run.round() / name).mkdir()
        policy, reward = models_of_round(run, 1, config)
        assert policy.server is reward.server is None
        assert (policy.model, reward.model) == (str(run.round() / POLICY), str(run.round() / REWARD_MODEL))


def test_an_audit_of_a_server_can_be_refined(
    server: ModelServer, policy_folder: Path, reward_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = audit_config(policy_config(server, policy_folder), reward_config(server, reward_model), prompts_file)
    run = tmp_path / "run"
    audit(config, run)
    select(run, budget=20)
    gold = ["label", str(run), "--annotator", "gold", "--reward-model", str(reward_model), "--quiet"]
    assert run_command(gold) == 0
    server.behave = lambda _body, _n: Response("nobody should ask", 400)
    found = refine(run, {"refine": {"policy": None, "reward": {"epochs": 1}}})
    assert found["reward_model"]["steps"] >= 1
    assert (run / "round-000" / "reward_model").is_dir()


def start_server(policy: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tests" / "model_server.py"), "--policy", str(policy), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    return subprocess.Popen(command, env=environment)


def audit_command(policy: Path, reward: Path, prompts: Path, port: int, out: Path) -> list[str]:
    url = f"http://127.0.0.1:{port}"
    options = {"policy": policy, "reward-model": reward, "prompts": prompts, "out": out, "policy-server": url,
               "reward-server": url, "server-requests": 4, "n": 8, "max-new-tokens": 24}  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "dissonance", "audit", *words]


@pytest.fixture
def many_prompts(tmp_path: Path) -> Path:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{i % 80} w{i // 3 % 80}"}) + "\n" for i in range(96)))
    return path


def test_a_server_killed_and_started_again_in_the_middle_changes_no_table(
    server: ModelServer, policy_folder: Path, reward_model: Path, many_prompts: Path, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    killed, undisturbed = (
        audit_config(
            policy_config(at, policy_folder, server={"requests": 2, "patience": 300}),
            RewardConfig(model=str(reward_model)), many_prompts,
        )
        for at in (url, server)
    )  # fmt: skip
    process = start_server(policy_folder, int(url.rpartition(":")[2]))
    try:
        with ThreadPoolExecutor(1) as pool:
            audited = pool.submit(audit, killed, tmp_path / "killed")
            parts = tmp_path / "killed" / "round-000" / "parts"
            while len(list(parts.glob("completions-*"))) < 2 and not audited.done():
                time.sleep(0.002)
            process.kill()
            process.wait()
            assert len(list(parts.glob("completions-*"))) < 5
            process = start_server(policy_folder, int(url.rpartition(":")[2]))
            audited.result(300)
    finally:
        process.kill()
        process.wait()
    audit(undisturbed, tmp_path / "undisturbed")
    assert tables(tmp_path / "killed") == tables(tmp_path / "undisturbed")


def test_a_server_that_stays_away_stops_the_run_which_then_goes_on(
    server: ModelServer, policy_folder: Path, reward_model: Path, many_prompts: Path, tmp_path: Path
) -> None:
    policy = policy_config(server, policy_folder, server={"patience": 0.5, "requests": 2})
    config = audit_config(policy, RewardConfig(model=str(reward_model)), many_prompts)
    whole = audit(config, tmp_path / "whole")
    server.bodies.clear()
    server.behave = lambda _body, n: Response("away", 503, {"retry-after-ms": "50"}) if n > 60 else None
    with pytest.raises(ModelError, match="gave no answer for 0.5 seconds \\(503 away\\)"):
        audit(config, tmp_path / "run")
    stored = list((tmp_path / "run" / "round-000" / "parts").glob("completions-*"))
    assert stored
    second = ModelServer(server.models).start()  # the same models, at another address
    try:
        moved = policy_config(second, policy_folder, server={"patience": 0.5, "requests": 2})
        found = audit(config.model_copy(update={"policy": moved}), tmp_path / "run")
    finally:
        second.stop()
    assert len(second.bodies) == 2 + 96 - 16 * len(stored)  # two to see what the server gives
    assert {**found, "seconds": 0, "tokens_per_second": 0} == {**whole, "seconds": 0, "tokens_per_second": 0}
    assert tables(tmp_path / "run") == tables(tmp_path / "whole")


def test_ctrl_c_does_not_wait_for_the_server(
    server: ModelServer, policy_folder: Path, reward_model: Path, many_prompts: Path, tmp_path: Path
) -> None:
    hanging, over = threading.Event(), threading.Event()

    async def hang() -> None:
        hanging.set()
        while not over.is_set():
            await asyncio.sleep(0.05)

    server.behave = lambda body, n: hang() if "seed" in body and n > 20 else None
    port = int(server.url.rpartition(":")[2])
    command = audit_command(policy_folder, reward_model, many_prompts, port, tmp_path / "run")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert hanging.wait(120)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)  # the server never answers
        assert process.returncode == 130, said
        assert "the same command goes on" in said
    finally:
        process.kill()
        over.set()


# -- batches at once -------------------------------------------------------------------------------------------------


class Waits:
    """Computes three at once, and none before three are there."""

    concurrency = 3

    def __init__(self) -> None:
        self.meeting = threading.Barrier(3, timeout=20)
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    def double(self, item: int) -> int:
        self.meeting.wait()
        return 2 * item

    def hang(self, item: int) -> int:
        if item == 1:
            raise ValueError("one")
        assert self.cancelled.wait(20)
        raise RuntimeError("cancelled")


def test_batches_of_a_concurrent_model_are_computed_at_once_and_no_other() -> None:
    model = Waits()
    assert sorted(overlapped(model, range(9), model.double)) == [(i, 2 * i) for i in range(9)]
    with pytest.raises(ValueError, match="one"):
        list(overlapped(model, range(9), model.hang))
    assert model.cancelled.is_set()
    seen = []
    one_by_one = overlapped(object(), range(3), lambda item: seen.append(item) or item)
    assert next(one_by_one) == (0, 0)
    assert seen == [0]
    assert list(one_by_one) == [(1, 1), (2, 2)]


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "root", "protocol"),
    [
        ("http://h:8000", "http://h:8000", "openai"),
        ("http://h:8000/v1/", "http://h:8000", "openai"),
        ("https://h/prefix/v1", "https://h/prefix", "openai"),
        ("http://h:5000/get_reward", "http://h:5000/get_reward", "openrlhf"),
    ],
)
def test_an_address_may_end_in_v1(url: str, root: str, protocol: str) -> None:
    config = ServerConfig(url=url)
    assert (config.url, config.protocol) == (root, protocol)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy-server", "localhost:8000"], "--policy-server: is 'localhost:8000': write it as http://127.0.0.1"),
        (["--policy-server", "http://h:80a"], "--policy-server: is 'http://h:80a': write it as http://127.0.0.1"),
        (["--reward-server", "http://me:pw@h"], "--reward-server: holds a password: name the variable"),
        (["--reward-server", "http://h/get_reward?token=x"], "--reward-server: holds more than an address"),
        (["--policy-server", "http://h", "--server-requests", "0"], "--server-requests: Input should be greater"),
        (["--server-timeout", "3"], "options --server-... are of servers"),
        (["--reward-served-name", "r"], "--reward-served-name is the name on a server: give --reward-server too"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], said: str, policy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["audit", "--policy", str(policy_folder), "--reward-model", "r", "--prompts", "p.jsonl", "--out", "run"]
    assert run_command([*given, *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert not any(secret in err for secret in ("me:pw", "token=x"))


def test_a_callable_has_no_server() -> None:
    with pytest.raises(ValueError, match="is a callable, which runs here"):
        RewardConfig(model="module:reward", server=ServerConfig(url="http://h"))
