"""The JSON API: what the pages do, for scripts that hold a personal token."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, HTTPException, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from dissonance.errors import DataError
from dissonance.feedback import overview as overviews
from dissonance.feedback.access import invite, revoke_tokens
from dissonance.feedback.rows import answer_from_json, answer_to_json
from dissonance.feedback.web.forms import Handle, Key, Note, Seconds, reordered
from dissonance.feedback.web.given import given_by_lease
from dissonance.feedback.web.site import SiteOf, VisitorOf, get_lead, get_visitor
from dissonance.feedback.web.views import PersonProgress
from dissonance.records import AnnotatorKind, Choice, QueryKind, Role


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="One line: what, which value, what to do.")


_COMMON: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body cannot be parsed"},
    401: {"model": Problem, "description": "Nobody is signed in, or the token opens nothing"},
    403: {"model": Problem, "description": "Not for this role, from another site's page, or without its CSRF token"},
    413: {"model": Problem, "description": "The request is larger than the server takes"},
    422: {"model": Problem, "description": "A value cannot be used"},
    429: {"model": Problem, "description": "Too many wrong tokens; Retry-After says for how long to wait"},
    503: {"model": Problem, "description": "The label store cannot be used now; Retry-After says when to try again"},
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no such thing"}}
_LEADS = [Depends(get_lead)]
_CONFLICT: dict[int | str, dict[str, Any]] = {409: {"model": Problem, "description": "The key was used for another"}}

router = APIRouter(prefix="/api", responses=_COMMON)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class MessageReply(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class QuestionReply(BaseModel):
    """A question that is yours until `expires_at`."""

    question_id: str = Field(description="What to send back with the answer.")
    kind: QueryKind
    messages: list[MessageReply]
    completions: list[str] = Field(description="The texts, in an order drawn at random: the one to show them in.")
    expires_at: float = Field(description="Seconds since 1970, UTC.")


class AnswerValue(_Strict):
    """A choice, a rating (with or without safe), ranks; or none of them, which is a skip."""

    choice: Choice | None = Field(None, description="The first or the second of `completions` is better, or neither.")
    rating: Annotated[int, Field(ge=1, le=5)] | None = None
    safe: bool | None = None
    ranks: Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(min_length=2, max_length=100)] | None = Field(
        None, description="One for each of `completions`, in its order, 1 the best; equal ranks are ties."
    )


class AnswerRequest(_Strict):
    """An answer to a question."""

    question_id: Handle
    key: Key
    answer: AnswerValue
    seconds: Seconds | None = None
    note: Note = ""
    flagged: bool = False


class LabelReply(BaseModel):
    """A label that is stored."""

    label_id: int
    question_id: str
    answer: AnswerValue
    seconds: float | None
    note: str
    flagged: bool
    created_at: float
    supersedes: int | None = Field(description="The label that this one corrects.")


class AnnotatorReply(BaseModel):
    """Someone who may answer, or has answered."""

    name: str
    kind: AnnotatorKind
    role: Role


class InviteRequest(_Strict):
    """Whom to invite."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]
    role: Role = "annotator"
    days: Annotated[float, Field(gt=0, le=36_000, allow_inf_nan=False)] | None = Field(
        None, description="How long the link is good for; null for until it is revoked."
    )


class InviteReply(BaseModel):
    """A personal link."""

    name: str
    role: Role
    link: str = Field(description="Shown this once; the server keeps no more than a hash of it.")


class RevokeReply(BaseModel):
    """What was revoked."""

    revoked: int = Field(description="How many tokens.")


@router.get("/question")
def question(site: SiteOf, visitor: VisitorOf) -> QuestionReply | None:
    """Your next question; null where nothing is left for you to answer now."""
    lease = site.lease(visitor.person)
    if lease is None:
        return None
    asked = lease.question
    texts = dict(zip(asked.completion_ids, asked.completions, strict=True))
    return QuestionReply(
        question_id=given_by_lease(lease).handle,
        kind=asked.kind,
        messages=[MessageReply(role=m.role, content=m.content) for m in asked.messages],
        # Not in the order of asking: a strategy may put the likelier winner first.
        completions=[texts[completion_id] for completion_id in lease.shown],
        expires_at=lease.expires_at,
    )


@router.post("/answers", responses=_NOT_FOUND | _CONFLICT)
def answer(site: SiteOf, visitor: VisitorOf, said: Annotated[AnswerRequest, Body()]) -> LabelReply:
    """Store an answer; it is on disk when this replies. Another answer to the same question corrects the first."""
    given = site.given(visitor.person, said.question_id)
    asked, shown = given.question, given.shown
    answer = answer_from_json(said.answer.model_dump(exclude_none=True))
    answer.fits(asked)
    label = site.record(
        visitor.person,
        given.query_id,
        reordered(answer, shown, asked.completion_ids),
        said.key,
        shown=shown,
        seconds=said.seconds,
        note=said.note,
        flagged=said.flagged,
    )
    return LabelReply(
        label_id=label.label_id,
        question_id=given.handle,
        answer=AnswerValue(**answer_to_json(reordered(label.answer, asked.completion_ids, shown))),
        seconds=label.seconds,
        note=label.note,
        flagged=label.flagged,
        created_at=label.created_at,
        supersedes=label.supersedes,
    )


@router.get("/progress")
def progress(site: SiteOf, visitor: VisitorOf) -> PersonProgress:
    """How far you are."""
    return site.progress(visitor.person)


@router.get("/overview", dependencies=_LEADS)
def overview(site: SiteOf) -> dict[str, Any]:
    """How far everyone is, and how good the answers are (leads)."""
    return overviews.overview(site.store).to_json()


@router.get("/annotators", dependencies=_LEADS)
def annotators(site: SiteOf) -> list[AnnotatorReply]:
    """Everyone who may answer or has answered (leads)."""
    return [AnnotatorReply(name=p.name, kind=p.kind, role=p.role) for p in site.store.annotators()]


@router.post("/annotators", status_code=201, dependencies=_LEADS)
def invite_annotator(request: Request, site: SiteOf, who: Annotated[InviteRequest, Body()]) -> InviteReply:
    """Give a person, added if there is none of this name, a personal link; earlier links stay good (leads)."""
    token = invite(site.store, who.name, who.role, who.days)
    address = request.base_url
    if site.settings.secure_cookies:
        address = address.replace(scheme="https")
    return InviteReply(name=who.name, role=who.role, link=f"{address}join#{token}")


@router.delete("/annotators/{name:path}/tokens", responses=_NOT_FOUND, dependencies=_LEADS)
def revoke(site: SiteOf, name: Annotated[str, InPath(min_length=1, max_length=200)]) -> RevokeReply:
    """Revoke a person's links; what they opened is closed at once (leads)."""
    try:
        return RevokeReply(revoked=revoke_tokens(site.store, name))
    except DataError as error:
        raise HTTPException(404, str(error)) from error


@router.get("/openapi.json", include_in_schema=False, dependencies=[Depends(get_visitor)])
def schema(request: Request) -> JSONResponse:
    """This API's OpenAPI description."""
    return JSONResponse(request.app.openapi())
