"""The pages: labelling, joining and leaving, and the lead's overview."""

from typing import Annotated

from fastapi import APIRouter, Form, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from dissonance.errors import DataError
from dissonance.feedback.access import end_session, person_of_token, sign_in
from dissonance.feedback.answers import Said
from dissonance.feedback.overview import overview
from dissonance.feedback.store import Lease
from dissonance.feedback.web.forms import AnswerForm, Handle, QueryId, answer_of
from dissonance.feedback.web.given import Given, given_again, given_by_lease, given_to_lead
from dissonance.feedback.web.site import LeadOf, Site, SiteOf, Visitor, VisitorOf, too_many
from dissonance.feedback.web.views import differences
from dissonance.feedback.wording import in_words

router = APIRouter(include_in_schema=False)
_MAX_ID = 2**31 - 1


@router.get("/")
def label_page(site: SiteOf, visitor: VisitorOf) -> HTMLResponse:
    """The labelling page with the first question in it."""
    lease = site.lease(visitor.person)
    return site.html(
        "label.html",
        person=visitor.person,
        csrf=visitor.csrf,
        settings=site.settings,
        guidelines_html=site.guidelines_html,
        view=None if lease is None else site.view(visitor.person, given_by_lease(lease)),
        progress=site.progress(visitor.person) if lease is None else None,
    )


@router.get("/question")
def next_question(site: SiteOf, visitor: VisitorOf) -> HTMLResponse:
    """The question that comes next, as a part of the page."""
    return _next(site, visitor, site.lease(visitor.person))


@router.get("/question/previous")
def previous_question(
    site: SiteOf, visitor: VisitorOf, before: Annotated[int | None, Query(ge=1, le=_MAX_ID)] = None
) -> HTMLResponse:
    """The question answered last (or last before a label), with that answer filled in."""
    person = visitor.person
    label = site.store.last_label(person.annotator_id, before)
    if label is None:
        raise HTTPException(404, "there is no earlier answer of yours")
    view = site.view(person, given_again(label, site.store.question(label.query_id)), label)
    return site.html("_question.html", person=person, csrf=visitor.csrf, view=view)


@router.get("/question/differences")
def question_differences(site: SiteOf, visitor: VisitorOf, question: Handle) -> HTMLResponse:
    """What stands in one text of a question alone, as a part of the page; worked out only when somebody asks."""
    given = site.given(visitor.person, question)
    return site.html("_differences.html", texts=differences(given.question, given.shown))


@router.post("/answers")
def answer(site: SiteOf, visitor: VisitorOf, form: Annotated[AnswerForm, Form()]) -> HTMLResponse:
    """Store an answer, and give the next question; the answer is on disk before this is sent."""
    given = site.given(visitor.person, form.question)
    answer = answer_of(form, given.question, given.shown)
    lease = site.record_and_lease(visitor.person, given.query_id, answer, form.key, **_said(form, given))
    return _next(site, visitor, lease)


def _next(site: Site, visitor: Visitor, lease: Lease | None) -> HTMLResponse:
    person = visitor.person
    if lease is None:
        return site.html("_done.html", person=person, csrf=visitor.csrf, progress=site.progress(person))
    view = site.view(person, given_by_lease(lease))
    return site.html("_question.html", person=person, csrf=visitor.csrf, view=view)


def _said(form: AnswerForm, given: Given, *, adjudicated: bool = False) -> Said:
    return {
        "shown": given.shown,
        "seconds": form.seconds,
        "note": form.note,
        "flagged": form.flagged == "on",
        "adjudicated": adjudicated,
    }


@router.get("/join")
def join_page(site: SiteOf) -> Response:
    """Where a personal link leads; its token stands behind the #, and the page's script posts it."""
    return site.html("join.html", error=None) if site.local is None else RedirectResponse("/", 303)


@router.post("/join")
def join(request: Request, site: SiteOf, token: Annotated[str, Form(max_length=500)] = "") -> Response:
    """Sign in with a token, or with the link that holds it."""
    if site.local is not None:
        return RedirectResponse("/", 303)
    given = token.rpartition("#")[2].strip()
    # A wrong token too many is only looked up: signing in would write of each.
    if (wait := site.limit.wait(request)) and person_of_token(site.store, given) is None:
        raise too_many(wait)
    secret = sign_in(site.store, given, site.settings.session_seconds)
    if secret is None:
        site.limit.failed(request)
        return site.html("join.html", 401, error="This link is not, or no longer, good: ask for a new one.")
    if earlier := request.cookies.get(site.cookie):
        end_session(site.store, earlier)
    response = RedirectResponse("/", 303)
    response.set_cookie(
        site.cookie,
        secret,
        max_age=int(site.settings.session_seconds),
        httponly=True,
        samesite="strict",
        secure=site.settings.secure_cookies,
    )
    return response


@router.post("/leave")
def leave(site: SiteOf, visitor: VisitorOf) -> Response:
    """Sign out."""
    if visitor.session is not None:
        end_session(site.store, visitor.session)
    response = RedirectResponse("/join", 303)
    response.delete_cookie(site.cookie, httponly=True, samesite="strict", secure=site.settings.secure_cookies)
    return response


@router.get("/overview")
def overview_page(site: SiteOf, lead: LeadOf) -> HTMLResponse:
    """The state of the asking, for the lead."""
    return site.html(
        "overview.html", overview=overview(site.store), person=lead.person, csrf=lead.csrf, settings=site.settings
    )


@router.get("/overview/live")
def overview_live(site: SiteOf, lead: LeadOf) -> HTMLResponse:
    """The part of the overview that changes."""
    return site.html("_overview.html", overview=overview(site.store), person=lead.person, csrf=lead.csrf)


@router.get("/overview/queries/{query_id:path}")
def query_page(site: SiteOf, lead: LeadOf, query_id: QueryId) -> HTMLResponse:
    """All that was answered to one query, and a form to settle it."""
    person = lead.person
    try:
        question = site.store.question(query_id)
    except DataError as error:
        raise HTTPException(404, str(error)) from error
    labels = site.store.labels(query_id=query_id)
    mine = next((label for label in labels if label.annotator == person.name), None)
    return site.html(
        "query.html",
        view=site.view(person, given_to_lead(question), mine),
        labels=labels,
        question=question,
        in_words=in_words,
        gold=site.store.gold().get(query_id),
        person=person,
        csrf=lead.csrf,
        settings=site.settings,
    )


@router.post("/overview/queries/{query_id:path}")
def adjudicate(
    request: Request, site: SiteOf, lead: LeadOf, query_id: QueryId, form: Annotated[AnswerForm, Form()]
) -> Response:
    """Settle a query: the lead's answer outweighs the others."""
    given = site.given(lead.person, form.question)
    if given.query_id != query_id:
        raise HTTPException(422, f"the form is about query {given.query_id!r}, the address about {query_id!r}")
    answer = answer_of(form, given.question, given.shown)
    site.record(lead.person, query_id, answer, form.key, **_said(form, given, adjudicated=True))
    if "hx-request" in request.headers:
        return Response(status_code=204, headers={"HX-Redirect": "/overview"})
    return RedirectResponse("/overview", 303)
