"""Throws thousands of generated requests at a served policy: `python tests/fuzz.py --url URL`.

Needs requirements/fuzz.txt. Ends with 1, and the request to repeat, where an answer is a 5xx or none comes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serve.requests import REQUESTS


def document() -> dict[str, Any]:
    """OpenAPI of the routes that take a reviewed body, as narrow as the review: most requests get far."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, request in REQUESTS.items():
        schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[request.__name__] = schema
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{request.__name__}"}}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"requestBody": body, "responses": {"200": {"description": "an answer"}}}}
    info = {"title": "policy", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="Where the policy is served.")
    parser.add_argument("--examples", type=int, default=2500, help="Requests generated per route.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed generates the same requests.")
    parser.add_argument("--openapi", help="A document to generate from; unset: the reviewed routes.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "openapi.json"
        path.write_text(Path(given.openapi).read_text() if given.openapi else json.dumps(document()))
        options = {
            "--url": given.url,
            "--checks": "not_a_server_error",
            "--phases": "coverage,fuzzing",
            "--mode": "all",
            "--max-examples": str(given.examples),
            "--seed": str(given.seed),
            "--request-timeout": "30",
            "--workers": "4",
        }
        routes = [argument for route in REQUESTS for argument in ("--include-path", route)]
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(path), *routes]
        command += [argument for option in options.items() for argument in option]
        sys.exit(subprocess.run(command, env=os.environ).returncode)


if __name__ == "__main__":
    main()
