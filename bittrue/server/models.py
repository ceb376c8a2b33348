"""GET /v1/models, and the check that a request names a model this server has."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.errors import HttpRefused
from bittrue.server.answers import json_response
from bittrue.server.state import ServerState, state_of


class ModelCard(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    weight_version: str
    object: str = "model"
    owned_by: str = "bittrue"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


def check_model(state: ServerState, name: str | None) -> None:
    """Raises HttpRefused (404) for a name this server does not serve."""
    names = state.config.names
    if name is not None and name not in names:
        raise HttpRefused(
            f"the model {name!r} is not here; this server has {', '.join(map(repr, names))}",
            status=404,
            code="model_not_found",
            param="model",
        )


async def list_models(request: Request) -> Response:
    state = state_of(request)
    return json_response(ModelList([_card(state, name) for name in state.config.names]))


async def show_model(request: Request) -> Response:
    state = state_of(request)
    name = request.path_params["name"]
    check_model(state, name)
    return json_response(_card(state, name))


def _card(state: ServerState, name: str) -> ModelCard:
    return ModelCard(name, state.created, state.max_context, state.weight_version)
