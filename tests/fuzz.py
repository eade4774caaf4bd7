"""Throws thousands of generated requests at a served policy: `python tests/fuzz.py --url URL`.

Needs requirements/fuzz.txt. Ends with 1, and the request to repeat, where an answer is a 5xx or none comes.
"""

import argparse
import os
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="Where the policy is served.")
    parser.add_argument("--examples", type=int, default=1000, help="Requests generated per route.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed generates the same requests.")
    parser.add_argument("--token", help="Sent with each; an admin's reaches every route.")
    given = parser.parse_args()
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
    if given.token:
        options["--header"] = f"Authorization: Bearer {given.token}"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{given.url}/openapi.json"]
    command += [argument for option in options.items() for argument in option]
    sys.exit(subprocess.run(command, env=os.environ).returncode)


if __name__ == "__main__":
    main()
