"""API keys: who may call, who is calling, and what separates one caller from another."""

import hashlib
import hmac
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Scope

from bittrue.config.run import RunConfig

_SCOPE = "bittrue.caller"
_ADMIN = "/admin/"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent an HTTP request. ``owner``: digest of the API key where callers are kept apart
    (``cache_isolation``), else ""."""

    request_id: str
    owner: str

    def cache_salt(self, asked: str | None) -> str:
        """The salt of cached prefixes: the client's own, with the owner mixed in where there is one."""
        if not self.owner:
            return asked or ""
        return hashlib.blake2b(
            f"{self.owner}/{asked or ''}".encode("utf-8", "surrogatepass"),
            digest_size=16,
            person=b"bittrue-salt",
        ).hexdigest()


class Keys:
    """The keys of ``api_key``, by comma; none = everybody may call. ``admin_key``, if given, is what /admin
    takes instead."""

    def __init__(self, config: RunConfig) -> None:
        self._clients = _digests(config.api_key)
        self._admins = _digests(config.admin_key) or self._clients
        self._is_isolating = config.cache_isolation

    def owner_of(self, authorization: bytes, path: str) -> str | None:
        """The owner a header stands for, "" where owners are not told apart; None: the key is missing or
        not one for ``path``. Every key is compared, in constant time."""
        keys = self._admins if path.startswith(_ADMIN) else self._clients
        if not keys:
            return ""
        scheme, _, given = authorization.partition(b" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, known) for known in keys]
        if scheme.lower() != b"bearer" or not any(matches):
            return None
        return digest if self._is_isolating else ""


def _digests(keys: str) -> list[str]:
    names = (key.strip() for key in keys.split(","))
    return [_digest(key.encode()) for key in names if key]


def _digest(key: bytes) -> str:
    return hashlib.blake2b(key, digest_size=16, person=b"bittrue-key").hexdigest()


def set_caller(scope: Scope, caller: Caller) -> None:
    scope[_SCOPE] = caller


def caller_of(request: Request) -> Caller:
    """Who sent ``request``; the gate has found out."""
    caller: Caller = request.scope[_SCOPE]
    return caller
