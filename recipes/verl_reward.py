"""A reward function for verl that asks the server of recipes/serve_reward.py.

reward.custom_reward_function.path=recipes/verl_reward.py reward.custom_reward_function.name=compute_score

REWARD_URL is the server's address, http://HOST:PORT; REWARD_TOKEN its token, if it has one.
"""

import json
import os
import urllib.request
from collections.abc import Mapping
from typing import Any

TIMEOUT = 180.0
"""Seconds: the server may have a queue."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **_: Any
) -> float:
    """The reward of one answer to the conversation in `extra_info["messages"]`, a JSON text (see ppo_prompts.py).

    A server that cannot be reached is an error: a made-up reward would be trained on.
    """
    del data_source, ground_truth
    messages = json.loads((extra_info or {})["messages"])
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("REWARD_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(  # noqa: S310 - the address is the user's own
        f"{os.environ.get('REWARD_URL', 'http://127.0.0.1:5000')}/score",
        json.dumps({"messages": [messages], "completions": [solution_str]}).encode(),
        headers,
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
        return float(json.load(response)["rewards"][0])
