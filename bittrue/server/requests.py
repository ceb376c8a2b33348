"""GET /v1/requests/{request_id}: the answer of an earlier request, once more."""

from starlette.requests import Request
from starlette.responses import Response

from bittrue.engine.journal import KeptResponse
from bittrue.errors import HttpRefused
from bittrue.server.keys import caller_of
from bittrue.server.state import ServerState, state_of
from bittrue.server.submission import GONE, interrupted_body

PATH = "/v1/requests/{request_id:path}"


async def show_request(request: Request) -> Response:
    """Status and body of the answer as a whole, also where it was streamed. By the ``id`` of the answer or
    the X-Request-Id of the request; with ``cache_isolation`` only for the key the request was made with.

    409 while it runs, 410 with what is known where it did not finish, 404 for what is unknown or expired.
    """
    state = state_of(request)
    given = request.path_params["request_id"]
    found = state.client.journal.find(given, caller_of(request).owner)
    if found is None:
        raise HttpRefused(
            f"there is no request {given!r}; answers are kept for {state.config.keep_responses_s:g} s after "
            "they ended (--keep-responses-s)",
            status=404,
            code="request_not_found",
            param="request_id",
        )
    if isinstance(found, KeptResponse):
        return Response(found.body, status_code=found.status, media_type="application/json")
    raise HttpRefused(
        f"the request {given!r} still runs; fetch it again when it has ended",
        status=409,
        code="request_running",
        param="request_id",
    )


def settle_interrupted(state: ServerState) -> None:
    """Responses that an earlier server left unfinished get their answer: 410 with what they had."""
    journal = state.client.journal
    for response in journal.interrupted():
        body = interrupted_body(state.tokenizer, response, "the server ended before it did")
        journal.keep(response.origin.response_id, GONE, body)
