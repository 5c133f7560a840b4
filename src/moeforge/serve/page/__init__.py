"""The page at ``/``: one file each of HTML, CSS and JavaScript, and nothing from elsewhere."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response

from moeforge.serve.state import State

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
"""Nothing runs that is not a file of ours: what a model writes can only be text."""
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def router(state: State) -> APIRouter:
    """The page's files, and the facts it shows."""
    routes = APIRouter(include_in_schema=False)
    for path, (name, kind) in FILES.items():
        routes.add_api_route(path, _file(name, kind), methods=["GET"])

    @routes.get("/facts")
    async def facts() -> dict[str, Any]:
        """About the model."""
        report = state.engine.report()
        loads = report.tokens_per_expert if state.show_routing else {}
        return {
            **state.facts,
            **{"name": state.engine.name, "context": state.engine.max_len, "chat": state.template is not None},
            **{"show_routing": state.show_routing, "tokens_per_expert": loads},
            **{"running": report.running, "waiting": report.waiting},
        }

    return routes


def _file(name: str, kind: str) -> Any:
    content = (Path(__file__).parent / name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def send() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)

    return send
