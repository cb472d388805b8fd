"""Serves a reward model over HTTP, for training a policy with it on a cluster.

python recipes/serve_reward.py run/round-000/reward_model --policy MODEL --host 127.0.0.1 --port 5000

POST /get_reward  what OpenRLHF sends: {"query": [...], "prompts": [...], "labels": [...]}, one text each; the label is
                  the conversation as JSON (ppo_prompts.py writes it so) -> {"rewards", "scores", "extra_logs"}
POST /score       {"messages": [[{"role", "content"}, ...], ...], "completions": [...]} -> {"rewards", "truncated"}
GET  /health      {"model", "scored"}

Rewards are oriented: higher is better, also those of a cost model (--kind cost). With a token (the environment variable
REWARD_TOKEN), a request must carry it, as `Authorization: Bearer ...` or, since OpenRLHF sends no headers, as
`?token=...`.
"""

import argparse
import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoTokenizer

from dissonance.config import RewardConfig
from dissonance.errors import DataError, DissonanceError, InputError
from dissonance.models import RewardModel
from dissonance.records import Message, Reward
from dissonance.rewards import load_reward_model

MOST = 256
"""Answers scored in one go: requests that wait are put together."""

Conversation = tuple[Message, ...]


class Turn(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class ScoreRequest(BaseModel):
    """Answers and the conversations that they answer, one each."""

    model_config = ConfigDict(extra="forbid")
    messages: Annotated[list[list[Turn]], Field(min_length=1)]
    completions: list[str]


class OpenRlhfRequest(BaseModel):
    """What OpenRLHF's remote reward model is asked."""

    query: Annotated[list[str], Field(min_length=1)]
    prompts: list[str]
    labels: list[str]


@dataclass(frozen=True)
class _Waiting:
    conversation: Conversation
    completion: str
    answer: asyncio.Future[Reward]


class Scorer:
    """A reward model that scores what is asked of it meanwhile in one batch, one batch after another."""

    def __init__(self, reward_model: RewardModel) -> None:
        self._model = reward_model
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self.scored = 0

    async def score(self, conversations: Sequence[Conversation], completions: Sequence[str]) -> list[Reward]:
        """One reward for each answer; an error of the reward model is raised here."""
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(c, text, loop.create_future()) for c, text in zip(conversations, completions, strict=True)]
        for item in waiting:
            self._queue.put_nowait(item)
        found = await asyncio.gather(*(item.answer for item in waiting), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [result for result in found if isinstance(result, Reward)]

    async def run(self) -> None:
        """Score until cancelled."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < MOST and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                rewards = await asyncio.to_thread(
                    self._model.score, [item.conversation for item in batch], [item.completion for item in batch]
                )
            except Exception as error:  # whoever asked is told; the server goes on
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
                continue
            self.scored += len(batch)
            for item, reward in zip(batch, rewards, strict=True):
                if not item.answer.done():  # it is, where the client has gone
                    item.answer.set_result(reward)


def completion_of(query: str, prompt: str, special: Sequence[str]) -> str:
    """The answer in a query: what follows the prompt, without the special tokens around it.

    The query is the policy's tokens turned back into text, where spaces may have come or gone and a token for the
    beginning may stand before the prompt.

    Raises:
        DataError: the query does not begin with the prompt.
    """
    text = query.lstrip()
    for start in ("", *special):
        rest = _after(text.removeprefix(start), prompt) if text.startswith(start) else None
        if rest is not None:
            return _without_special(rest, special)
    raise DataError(f"the query does not begin with its prompt: {query[:80]!r}")


def _after(text: str, beginning: str) -> str | None:
    """What follows the beginning, spaces apart; None if it is not the beginning."""
    place = 0
    for letter in beginning:
        if letter.isspace():
            continue
        while place < len(text) and text[place].isspace():
            place += 1
        if place == len(text) or text[place] != letter:
            return None
        place += 1
    return text[place:]


def _without_special(text: str, special: Sequence[str]) -> str:
    while True:
        text = text.strip()
        ending = next((token for token in special if token and text.endswith(token)), None)
        if ending is None:
            return text
        text = text.removesuffix(ending)


def conversation_of(label: str) -> Conversation:
    """The conversation that a label holds.

    Raises:
        DataError: it holds none.
    """
    try:
        turns = json.loads(label)
        return tuple(Message(turn["role"], turn["content"]) for turn in turns)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"the label is not a conversation as JSON: {label[:80]!r}; make the prompts with ppo_prompts.py, and name "
            "the label column (--data.label_key label)"
        ) from error


def make_app(reward_model: RewardModel, name: str, special: Sequence[str] = (), token: str | None = None) -> FastAPI:
    """The server.

    Args:
        reward_model: oriented, higher is better.
        name: said by /health.
        special: the policy's special tokens, which OpenRLHF leaves in its queries.
        token: what a request must carry, or None.
    """
    scorer = Scorer(reward_model)

    @asynccontextmanager
    async def scoring(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(scorer.run())
        yield
        task.cancel()

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.query_params.get(
            "token", ""
        )
        if token is not None and not secrets.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "the token is missing or wrong")

    app = FastAPI(title="reward model", lifespan=scoring, dependencies=[Depends(allowed)])

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"model": name, "scored": scorer.scored}

    @app.post("/score")
    async def score(request: ScoreRequest) -> dict[str, Any]:
        conversations = [[(turn.role, turn.content) for turn in turns] for turns in request.messages]
        rewards = await _scored(scorer, conversations, request.completions)
        return {"rewards": [r.value for r in rewards], "truncated": [r.truncated for r in rewards]}

    @app.post("/get_reward")
    async def get_reward(request: OpenRlhfRequest) -> dict[str, Any]:
        try:
            pairs = zip(request.query, request.prompts, strict=True)
            texts = [completion_of(query, prompt, special) for query, prompt in pairs]
            conversations = [[(m.role, m.content) for m in conversation_of(label)] for label in request.labels]
        except (InputError, ValueError) as error:
            raise HTTPException(422, str(error)) from error
        rewards = await _scored(scorer, conversations, texts)
        values = [reward.value for reward in rewards]
        return {
            "rewards": values,
            "scores": values,
            "extra_logs": {"reward_truncated": [float(r.truncated) for r in rewards]},
        }

    return app


async def _scored(
    scorer: Scorer, conversations: Sequence[Sequence[tuple[str, str]]], completions: Sequence[str]
) -> list[Reward]:
    try:
        messages = [tuple(Message(role, content) for role, content in turns) for turns in conversations]
        if len(messages) != len(completions):
            raise DataError(f"{len(completions)} answers to {len(messages)} conversations")
        return await scorer.score(messages, completions)
    except InputError as error:
        raise HTTPException(422, str(error)) from error
    except DissonanceError as error:
        raise HTTPException(500, str(error)) from error


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a reward model's folder or hub id, or a Python callable, module:function")
    parser.add_argument("--kind", choices=("reward", "cost"), default="reward", help="cost: higher output is worse")
    parser.add_argument("--adapter", help="a PEFT adapter on the model")
    parser.add_argument("--policy", help="the policy's tokenizer, whose special tokens are cut off; OpenRLHF needs it")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets every machine in: set REWARD_TOKEN")
    parser.add_argument("--port", type=int, default=5000)
    arguments = parser.parse_args()
    config = RewardConfig(model=arguments.model, adapter=arguments.adapter, kind=arguments.kind)
    special = AutoTokenizer.from_pretrained(arguments.policy).all_special_tokens if arguments.policy else ()
    try:
        reward_model = load_reward_model(config)
    except DissonanceError as error:
        sys.exit(f"serve_reward.py: {error}")
    app = make_app(reward_model, arguments.model, special, os.environ.get("REWARD_TOKEN") or None)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
