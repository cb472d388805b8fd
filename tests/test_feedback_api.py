"""The JSON API under schemathesis: whatever is sent, by whomever, the reply is one that its description names."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode

from dissonance.feedback.access import invite
from dissonance.records import Answer
from web_clients import LOGIN, ask, client_of, store_of

QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# The first guesses tokens, and the server soon listens to no token of this address; test_feedback_access.py tries every
# door without one. The second takes every refusal of what the schema allows for a fault, and a schema cannot say all:
# that an answer is a choice or a rating, which of them the question takes, or who is called what already.
UNFIT = [schemathesis.checks.ignored_auth, schemathesis.checks.positive_data_acceptance]


def hammer(operation: Any, mode: GenerationMode, headers: dict[str, str]) -> set[int]:
    """Send what the description allows (or forbids), check every reply, and give the statuses that came."""
    seen = set()

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        seen.add(case.call_and_validate(headers=headers, excluded_checks=UNFIT).status_code)

    send()
    return seen


@pytest.mark.parametrize("role", ["lead", "annotator", "nobody"])
def test_every_reply_is_one_that_the_description_names(tmp_path: Path, role: Any) -> None:
    with store_of(tmp_path, ask("q1"), ask("r1", "rating"), ask("k1", "ranking")) as store:
        store.record(store.annotator("else").annotator_id, "q1", Answer("first"), key="k", note="a note")
        headers = {} if role == "nobody" else {"Authorization": f"Bearer {invite(store, 'me', role)}"}
        app = client_of(store, LOGIN).app
        schema = schemathesis.openapi.from_dict(app.openapi())
        schema.app = app
        for_leads = {"/api/overview", "/api/annotators", "/api/annotators/{name}/tokens"}
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {operation.path for operation in operations} > for_leads
        for operation in operations:
            allowed = hammer(operation, GenerationMode.POSITIVE, headers)
            seen = allowed | hammer(operation, GenerationMode.NEGATIVE, headers)
            assert max(seen) < 500
            if role == "nobody":
                assert allowed <= {401, 429}, operation.label
            elif role == "annotator" and operation.path in for_leads:
                assert allowed == {403}, operation.label
            else:
                assert allowed & {200, 201, 404}, operation.label
