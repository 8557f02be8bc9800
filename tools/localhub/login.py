"""Keyless login: a job's id token, exchanged for an access token of one repo (RFC 8693)."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from localhub.errors import HubError
from localhub.routing import hub_of, json_body

LIFETIME = 3600  # seconds, as the Hub says; here a token lasts as long as the Hub
_EXCHANGE = {
    "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
    "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
}


def routes() -> list[BaseRoute]:
    """All of them."""
    return [Route("/oauth/token", exchange, methods=["POST"])]


async def exchange(request: Request) -> Response:
    """Give a trusted publisher a token for its repo."""
    body = await json_body(request)
    if _EXCHANGE.items() - body.items():
        raise HubError(400, "unsupported_grant_type")
    tokens = hub_of(request).tokens
    token = tokens.exchange(str(body.get("subject_token")), str(body.get("resource")))
    return JSONResponse(
        {"access_token": token.value, "token_type": "bearer", "expires_in": LIFETIME}
    )
