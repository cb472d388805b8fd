"""The JSON API under schemathesis: whatever is sent, by whomever, the reply is one that its description names."""

from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode

from dissonance.feedback.access import invite
from dissonance.records import Answer, Role
from web_clients import LOGIN, ask, client_of, store_of

QUICK = settings(
    max_examples=12,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# The first guesses tokens, and is soon told that it guesses too often; test_feedback_access.py tries every door without
# one. The second takes every refusal of what the schema allows for a fault, and a schema cannot say all: that an answer
# is a choice or a rating, which of them the question takes, or who is called what already.
UNFIT = [schemathesis.checks.ignored_auth, schemathesis.checks.positive_data_acceptance]
ROLES: tuple[Role, ...] = ("lead", "annotator")
FOR_LEADS = {"/api/overview", "/api/annotators", "/api/annotators/{name}/tokens"}


def hammer(operation: Any, mode: GenerationMode, senders: dict[str, dict[str, str]]) -> dict[str, set[int]]:
    """Send what the description allows (or forbids) as everyone, check each reply, and give the statuses that came.

    Making a case takes longer than sending it, so all send the same.
    """
    seen: dict[str, set[int]] = {who: set() for who in senders}

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        for who, headers in senders.items():
            seen[who].add(case.call_and_validate(headers=headers, excluded_checks=UNFIT).status_code)

    send()
    return seen


def test_every_reply_is_one_that_the_description_names(tmp_path: Path) -> None:
    with store_of(tmp_path, ask("q1"), ask("r1", "rating"), ask("k1", "ranking")) as store:
        store.record(store.annotator("else").annotator_id, "q1", Answer("first"), key="k", note="a note")
        senders = {role: {"Authorization": f"Bearer {invite(store, f'the {role}', role)}"} for role in ROLES}
        app = client_of(store, LOGIN).app
        schema = schemathesis.openapi.from_dict(app.openapi())
        schema.app = app
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {operation.path for operation in operations} > FOR_LEADS
        for operation in operations:
            allowed = hammer(operation, GenerationMode.POSITIVE, {"nobody": {}} | senders)
            forbidden = hammer(operation, GenerationMode.NEGATIVE, {"nobody": {}} | senders)
            assert max(set().union(*allowed.values(), *forbidden.values())) < 500
            assert allowed["nobody"] <= {401, 429}, operation.label  # cases come with tokens of their own
            assert allowed["lead"] & {200, 201, 404}, operation.label
            if operation.path in FOR_LEADS:
                assert allowed["annotator"] == {403}, operation.label
            else:
                assert allowed["annotator"] & {200, 201, 404}, operation.label
