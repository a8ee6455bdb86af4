"""The door: no request passes without the API key, but for /health. It stands before routing, so unknown paths and
routes that are added one day are behind it too."""

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from infir2.serve.errors import ApiError

OPEN_PATHS = frozenset({"/health"})


class KeyGuard:
    """ASGI middleware. The key is compared in constant time; websockets are refused."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        if not api_key:
            raise ValueError("an empty API key would let everybody in")
        self.app, self._expected = app, f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self.app(scope, receive, send)
        else:
            error = ApiError(401, "a valid API key is required: Authorization: Bearer KEY", code="invalid_api_key")
            await error.response()(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
