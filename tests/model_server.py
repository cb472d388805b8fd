"""A real, small server of vLLM's protocol over tiny models: for faults that vLLM would not make on demand.

python tests/model_server.py --policy FOLDER --reward FOLDER --port PORT     as a process, to be killed
"""

import argparse
import asyncio
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dissonance.sampling.decode import decode
from dissonance.sampling.draw import _nucleus

Behaviour = Callable[[dict[str, Any], int], Any]


class Models:
    """What is served; `logprobs` and `squashes` make it a server that is set up in another way."""

    def __init__(self, policy: Path | None, reward: Path | None) -> None:
        self.names = [str(folder) for folder in (policy, reward) if folder is not None]
        self.longest = 64
        self.logprobs = "raw"
        self.squashes = False
        self._lock = threading.Lock()
        with torch.inference_mode():
            if policy is not None:
                self.policy = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
                self.tokenizer = AutoTokenizer.from_pretrained(policy)
            if reward is not None:
                loaded = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
                self.reward = loaded.eval()

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """`/v1/completions`, n answers of their own seeds."""
        ends = [] if body.get("ignore_eos") else body.get("stop_token_ids", [2])
        seeds = [body.get("seed", 0) + i for i in range(body["n"])]
        uniforms = np.stack([np.random.default_rng(seed).random(body["max_tokens"]) for seed in seeds])
        with self._lock:
            drawn = decode(
                self.policy, [body["prompt"]], torch.from_numpy(uniforms),
                eos_ids=ends or [-2], temperature=body["temperature"], top_p=body["top_p"],
            )  # fmt: skip
            return {"choices": [self._choice(body, i, list(row.token_ids), row.stopped) for i, row in enumerate(drawn)]}

    def _choice(self, body: dict[str, Any], index: int, ids: list[int], stopped: bool) -> dict[str, Any]:
        whole = [*body["prompt"], *ids]
        logits = self.policy(torch.tensor([whole])).logits[0, :-1].float()
        raw = logits.log_softmax(-1)
        said = {"raw": raw, "logits": logits, "processed": self._processed(body, logits)}[self.logprobs]
        places = torch.arange(len(whole) - 1)
        choice: dict[str, Any] = {
            "index": index,
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": "stop" if stopped else "length",
            "token_ids": ids,
            "logprobs": {"token_logprobs": said[places, whole[1:]].tolist()[-len(ids) :]},
        }
        if "prompt_logprobs" in body:
            values = raw[places, whole[1:]].tolist()[: len(body["prompt"]) - 1]
            read = [{str(token): {"logprob": value}} for token, value in zip(body["prompt"][1:], values, strict=True)]
            choice["prompt_logprobs"] = [None, *read]
        return choice

    @staticmethod
    def _processed(body: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
        kept = _nucleus(torch.softmax(logits / body["temperature"], dim=-1), body["top_p"])
        return (kept / kept.sum(-1, keepdim=True)).log().nan_to_num(neginf=-9999.0)

    @torch.inference_mode()
    def classify(self, body: dict[str, Any]) -> dict[str, Any]:
        """`/classify`, a row at a time."""
        with self._lock:
            logits = [self.reward(torch.tensor([ids])).logits[0] for ids in body["input"]]
        if body["use_activation"] or self.squashes:
            logits = [row.sigmoid() if len(row) == 1 else row.softmax(-1) for row in logits]
        return {"data": [{"index": i, "probs": row.tolist()} for i, row in enumerate(logits)]}


class ModelServer:
    """Over a real socket; `behave(body, n)` may answer the n-th request in the models' place, n from 0."""

    def __init__(self, models: Models, port: int = 0) -> None:
        self.models = models
        self.behave: Behaviour = lambda _body, _n: None
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        routes = [
            Route("/v1/models", self._list),
            Route("/v1/completions", self._answer(models.complete), methods=["POST"]),
            Route("/classify", self._answer(models.classify), methods=["POST"]),
            Route("/get_reward", self._answer(lambda _: {}), methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)

    async def _list(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        return JSONResponse(
            {"data": [{"id": name, "max_model_len": self.models.longest} for name in self.models.names]}
        )

    def _answer(self, work: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            instead = self.behave(body, len(self.bodies) - 1)
            instead = await instead if asyncio.iscoroutine(instead) else instead
            if isinstance(instead, Response):
                return instead
            if callable(instead):  # changes what the models say
                return Response(json.dumps(instead(work(body))), media_type="application/json")
            return JSONResponse(await asyncio.to_thread(work, body))

        return endpoint

    def start(self) -> "ModelServer":
        self._thread = threading.Thread(target=self.run)
        self._thread.start()
        return self

    def run(self) -> None:
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        self._socket.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--reward", type=Path)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ModelServer(Models(given.policy, given.reward), given.port).run()
