"""The labelling server: pages and a JSON API over one label store.

security.py  what stands before every request       pages.py  HTML     views.py, markdown.py  what a question shows
site.py      who asks, and what all share           api.py    JSON     forms.py               what an answer says
                                                                      given.py               what it is about
"""

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from sqlalchemy import text as sql
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.staticfiles import StaticFiles

from dissonance.errors import DataError, StoreError
from dissonance.feedback.store import Store
from dissonance.feedback.web import api, pages
from dissonance.feedback.web.security import Guard
from dissonance.feedback.web.settings import LabelSettings
from dissonance.feedback.web.site import HERE, NotSignedInError, Site, SiteOf

RETRY_SECONDS = 2
_log = logging.getLogger(__name__)


def create_app(store: Store, settings: LabelSettings) -> FastAPI:
    """Make the server of a store.

    Raises:
        StoreError: the store cannot be read or written.
        DataError: `settings.local_name` is no name of a person.
    """
    # The pages that FastAPI makes of its schema load scripts from elsewhere.
    app = FastAPI(title="dissonance", version="1", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.site = Site(store, settings)
    app.include_router(pages.router)
    app.include_router(api.router)
    app.add_api_route("/healthz", _health, include_in_schema=False)
    app.mount("/static", _StaticFiles(directory=HERE / "static"), name="static")
    app.add_exception_handler(NotSignedInError, _on_not_signed_in)
    app.add_exception_handler(StoreError, _on_store_error)
    app.add_exception_handler(DataError, _on_data_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Guard, loopback_only=not settings.login_required, reply=_error)
    return app


class _StaticFiles(StaticFiles):
    """Files that browsers keep, and ask about before they use them: an upgrade shows at once."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers["Cache-Control"] = "no-cache"
        return response


def _health(site: SiteOf) -> dict[str, str]:
    with site.store.reading() as connection:
        connection.execute(sql("SELECT 1"))
    return {"status": "ok"}


def _error(request: Request, status: int, message: str) -> Response:
    """An error as the asker can read it: JSON for the API, a line for a part of a page, a page else."""
    if _is_api(request):
        return JSONResponse({"detail": message}, status)
    if "hx-request" in request.headers or request.scope["path"].startswith("/static/"):
        return PlainTextResponse(message, status)
    site: Site = request.scope["app"].state.site
    return site.html("error.html", status, status=status, message=message)


def _is_api(request: Request) -> bool:
    path: str = request.scope["path"]
    return path.startswith("/api/") or path == "/healthz"


async def _on_not_signed_in(request: Request, _: Exception) -> Response:
    if _is_api(request):
        reply = _error(request, 401, "sign in, or send `Authorization: Bearer TOKEN` with the token of your link")
        reply.headers["WWW-Authenticate"] = "Bearer"
        return reply
    if "hx-request" in request.headers:
        reply = _error(request, 401, "you are signed out: open your personal link again")
        reply.headers["HX-Redirect"] = "/join"
        return reply
    return RedirectResponse("/join", 303)


async def _on_store_error(request: Request, error: Exception) -> Response:
    _log.error("%s", error)
    site: Site = request.app.state.site
    # Where the store lies is nobody's business but the lead's.
    message = str(error) if site.local else "the label store cannot be used just now: try again, and tell the lead"
    reply = _error(request, 503, message)
    reply.headers["Retry-After"] = str(RETRY_SECONDS)
    return reply


async def _on_data_error(request: Request, error: Exception) -> Response:
    return _error(request, 422, str(error))


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    where = ".".join(str(part) for part in first.get("loc", ())[1:]) or "the request"
    return _error(request, 422, f"{where}: {first.get('msg', 'cannot be used')}")


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    message = "there is no such page" if error.status_code == 404 and error.detail == "Not Found" else error.detail
    reply = _error(request, error.status_code, message)
    reply.headers.update(error.headers or {})
    return reply
