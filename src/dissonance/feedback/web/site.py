"""What every page and every API call shares: the store, the settings, the templates, and who is asking."""

import hashlib
import hmac
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Unpack

from fastapi import Depends, HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jinja2 import Environment, FileSystemLoader
from sqlalchemy import bindparam, select
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse

from dissonance.errors import DataError
from dissonance.feedback.access import person_of_session, person_of_token
from dissonance.feedback.answers import Said
from dissonance.feedback.schema import labels
from dissonance.feedback.store import Lease, Person, Store
from dissonance.feedback.web.forms import fields_of
from dissonance.feedback.web.given import Given, find_given
from dissonance.feedback.web.lookups import person_progress
from dissonance.feedback.web.markdown import render_markdown
from dissonance.feedback.web.security import SAFE_METHODS, SignInLimit
from dissonance.feedback.web.settings import LabelSettings
from dissonance.feedback.web.views import PersonProgress, QuestionView, question_view
from dissonance.records import Answer, Label

HERE = Path(__file__).parent
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


class NotSignedInError(Exception):
    """Nobody is signed in: pages lead to /join, the API says 401."""


@dataclass(frozen=True)
class Visitor:
    """Who asks."""

    person: Person
    csrf: str
    """What a form must send back; empty where no cookie says who asks."""
    session: str | None = None
    """The secret of the session, where there is one."""


class Site:
    """One server's parts; endpoints run in threads and share it."""

    def __init__(self, store: Store, settings: LabelSettings) -> None:
        self.store = store
        self.settings = settings
        # What tells runs apart in a browser. The run's id itself is on no page: gold questions come where it says.
        self.run = hashlib.sha256(store.run_id.encode()).hexdigest()[:16]
        self.limit = SignInLimit()
        self.guidelines_html = render_markdown(settings.guidelines) if settings.guidelines.strip() else ""
        self.cookie = "__Host-dissonance" if settings.secure_cookies else "dissonance"
        self.templates = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, auto_reload=False)
        self.local: Visitor | None = None
        if not settings.login_required:
            person = store.annotator(settings.local_name, "person", "lead")
            self.local = Visitor(replace(person, role="lead"), csrf="")

    def html(self, template: str, status_code: int = 200, /, **context: Any) -> HTMLResponse:
        """Render a page or a part of one."""
        return HTMLResponse(self.templates.get_template(template).render(context, run=self.run), status_code)

    def lease(self, person: Person) -> Lease | None:
        """The next question of a person."""
        return self.store.lease(
            person.annotator_id, seconds=self.settings.lease_seconds, gold_every=self.settings.gold_every
        )

    def progress(self, person: Person) -> PersonProgress:
        """How far a person is."""
        return person_progress(self.store, person.annotator_id, self.settings.gold_every)

    def view(self, person: Person, given: Given, label: Label | None = None) -> QuestionView:
        """Show a question, with the person's earlier answer filled in where there is one."""
        progress, ask_safety = self.progress(person), self.settings.ask_safety
        view = question_view(given.question, given.shown, uuid.uuid4().hex, progress, ask_safety=ask_safety)
        if label is None:
            return view
        return replace(
            view,
            chosen=fields_of(label.answer, given.question, given.shown),
            note=label.note,
            flagged=label.flagged,
            correcting=True,
            previous_before=label.label_id,
        )

    def given(self, person: Person, handle: str) -> Given:
        """What an answer of this person is about; 404 where it is nothing that they were given."""
        given = find_given(self.store, person, handle)
        if given is None:
            raise HTTPException(404, f"there is no question {handle!r} of yours: load the page again")
        return given

    def record(self, person: Person, query_id: str, answer: Answer, key: str, **said: Unpack[Said]) -> Label:
        """Store an answer; 409 where the key was used for another."""
        with self._conflict_of_keys(person, key):
            return self.store.record(person.annotator_id, query_id, answer, key=key, **said)

    def record_and_lease(
        self, person: Person, query_id: str, answer: Answer, key: str, **said: Unpack[Said]
    ) -> Lease | None:
        """Store an answer, and give the next question; 409 where the key was used for another."""
        with self._conflict_of_keys(person, key):
            _, lease = self.store.record_and_lease(
                person.annotator_id,
                query_id,
                answer,
                key=key,
                lease_seconds=self.settings.lease_seconds,
                gold_every=self.settings.gold_every,
                **said,
            )
        return lease

    @contextmanager
    def _conflict_of_keys(self, person: Person, key: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            used = self.store.rows(_LABEL_OF_KEY, {"me": person.annotator_id, "key": key})
            if not used:
                raise
            raise HTTPException(409, str(error)) from error


_LABEL_OF_KEY = select(labels.c.label_id).where(
    labels.c.annotator_id == bindparam("me"), labels.c.key == bindparam("key")
)


async def get_site(request: Request) -> Site:
    """The site that a request came to."""
    site: Site = request.app.state.site
    return site


SiteOf = Annotated[Site, Depends(get_site)]
_bearer = HTTPBearer(auto_error=False, scheme_name="token", description="A personal token.")


async def get_visitor(
    request: Request, site: SiteOf, bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Visitor:
    """Who asks, by token, by session, or because no login is required; what a session sends must carry its CSRF token.

    Raises:
        NotSignedInError: nobody.
        HTTPException: 401 for a wrong token, 429 after too many of them, 403 without the CSRF token.
    """
    if bearer is not None:
        return await run_in_threadpool(_by_token, request, site, bearer.credentials)
    if site.local is not None:
        return site.local
    secret = request.cookies.get(site.cookie, "")
    person = await run_in_threadpool(person_of_session, site.store, secret) if secret else None
    if person is None:
        raise NotSignedInError
    visitor = Visitor(person, csrf_token(secret), secret)
    if request.method not in SAFE_METHODS:
        sent = request.headers.get("x-csrf-token") or await _form_field(request, "csrf")
        if not hmac.compare_digest(sent.encode(), visitor.csrf.encode()):
            raise HTTPException(403, "the form is not this session's: load the page again")
    return visitor


def csrf_token(secret: str) -> str:
    """What proves that a form came from a page of this session: only who holds the cookie can work it out."""
    return hmac.digest(secret.encode(), b"csrf", "sha256").hex()


def _by_token(request: Request, site: Site, token: str) -> Visitor:
    person = person_of_token(site.store, token)
    if person is None:
        if wait := site.limit.wait(request):
            raise too_many(wait)
        site.limit.failed(request)
        raise HTTPException(401, "this token opens nothing: ask for a new link", headers={"WWW-Authenticate": "Bearer"})
    return Visitor(person, csrf="")


def too_many(wait: int) -> HTTPException:
    """The reply to someone who tried too many wrong tokens."""
    return HTTPException(429, f"too many wrong links: wait {wait} seconds", headers={"Retry-After": str(wait)})


async def _form_field(request: Request, name: str) -> str:
    if not request.headers.get("content-type", "").lower().startswith(_FORMS):
        return ""
    value = (await request.form()).get(name)
    return value if isinstance(value, str) else ""


VisitorOf = Annotated[Visitor, Depends(get_visitor)]


async def get_lead(visitor: VisitorOf) -> Visitor:
    """Who asks, if it is a lead; else 403."""
    if visitor.person.role != "lead":
        raise HTTPException(403, "this is for leads: ask for a lead's link")
    return visitor


LeadOf = Annotated[Visitor, Depends(get_lead)]
