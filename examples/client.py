"""Ask the live policy through the openai client, and see which policy version answered.

python examples/client.py [--base_url http://127.0.0.1:8000/v1] [--model policy@v12] [--prompt "the film"]

`policy` is whatever is live; `policy@v12` is that version, where a replica holds it. Every answer says which
version wrote it.
"""

import argparse
import os

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def main() -> None:
    """Ask twice: once for the whole answer, once for a stream of it."""
    options = _parse_options()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    text, version = ask(client, options.model, options.prompt, max_tokens=options.max_tokens)
    print(f"version {version}: {options.prompt}{text}")
    version = stream(client, options.model, options.prompt, max_tokens=options.max_tokens)
    print(f" (version {version}, streamed)")


def ask(client: OpenAI, model: str, prompt: str, *, max_tokens: int) -> tuple[str, int]:
    """The answer, and the policy version that wrote its last token."""
    answer = client.chat.completions.create(model=model, messages=_as_messages(prompt), max_tokens=max_tokens)
    # A field that OpenAI's own answers do not have; `policy_version_spans` has it token by token.
    version = (answer.model_extra or {})["policy_version"]
    return answer.choices[0].message.content or "", version


def stream(client: OpenAI, model: str, prompt: str, *, max_tokens: int) -> int | None:
    """Print the answer as it comes; the policy version of its last token, which the last chunk names."""
    version = None
    for chunk in client.chat.completions.create(
        model=model, messages=_as_messages(prompt), max_tokens=max_tokens, stream=True
    ):
        print("".join(choice.delta.content or "" for choice in chunk.choices), end="", flush=True)
        version = (chunk.model_extra or {}).get("policy_version", version)
    return version


def _as_messages(prompt: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": prompt}]


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base_url", default="http://127.0.0.1:8000/v1", help="where the policy answers (%(default)s)"
    )
    parser.add_argument("--model", default="policy", help="policy, policy@live or policy@v12 (%(default)s)")
    parser.add_argument(
        "--api_key",
        default=os.environ.get("OPENAI_API_KEY", "none"),  # The client wants one, a local policy does not.
        help="token, where the run has tokens (unset: OPENAI_API_KEY)",
    )
    parser.add_argument("--prompt", default="the film", help="what to ask (%(default)r)")
    parser.add_argument("--max_tokens", type=int, default=32, help="longest answer, in tokens (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
