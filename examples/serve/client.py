"""Ask a vLLM server with MAC, by OpenAI's client: each way of asking once, with the time it took.

    python examples/serve/client.py --base-url http://localhost:8000/v1 "Why is the sky blue?"

The last way is MAC's: what `vllm_xargs` holds is for the one request that it comes with.
"""

import argparse
import time

from openai import OpenAI, OpenAIError

OFF = {"mac": "off"}  # this request is decoded exactly


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="Tell me about attention in language models.")
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="default: %(default)s")
    parser.add_argument("--api-key", default="none", help="what the server was given as --api-key, if anything")
    parser.add_argument("--model", help="a served model's name (default: the first that the server has)")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer (default: %(default)s)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    common = {"model": args.model or client.models.list().data[0].id, "max_tokens": args.tokens, "temperature": 0}
    messages = [{"role": "user", "content": args.prompt}]

    def completion(**more) -> str:
        return client.completions.create(prompt=args.prompt, **common, **more).choices[0].text

    def chat(**more) -> str:
        return client.chat.completions.create(messages=messages, **common, **more).choices[0].message.content or ""

    def streamed() -> str:
        chunks = client.chat.completions.create(messages=messages, stream=True, **common)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    for name, ask in (
        ("completion", completion),
        ("chat", chat),
        ("streamed", streamed),
        ("MAC off", lambda: chat(extra_body={"vllm_xargs": OFF})),
    ):
        start = time.perf_counter()
        text = ask()
        print(f"{name:10} {time.perf_counter() - start:6.2f} s  {text!r}")


if __name__ == "__main__":
    args = options()
    try:
        main(args)
    except OpenAIError as error:
        raise SystemExit(f"{args.base_url}: {error}") from None
