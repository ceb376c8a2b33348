import asyncio
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from standins.live_server import MODEL, LiveServer

from bittrue.text.messages import parse_messages

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


def user(content: str) -> Any:
    return [{"role": "user", "content": content}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("PLAIN"))
    assert answer.choices[0].message.content == "Hello wörld, 你好 END of it."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.system_fingerprint == "standin-1"


def test_streaming_with_usage(client: openai.OpenAI) -> None:
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model=MODEL, messages=user("PLAIN"), stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == "Hello wörld, 你好 END of it."
    assert usage is not None
    assert usage.completion_tokens > 5


def test_reasoning_content_arrives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("THINK"), reasoning_effort="high")
    message = answer.choices[0].message
    assert message.model_extra == {"reasoning_content": "I should greet."}
    assert message.content == "Hi there."
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens


def test_tools_whole_streamed_and_echoed_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=user("ONLYTOOL"), tools=[WEATHER], tool_choice="required"
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls or []
    assert call.type == "function"
    assert call.function.arguments == '{"city": "Paris", "days": 3}'
    with client.chat.completions.stream(model=MODEL, messages=user("ONLYTOOL"), tools=[WEATHER]) as stream:
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    history = [
        *user("ONLYTOOL"),
        message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "sun"},
    ]
    assert parse_messages(history)[1].tool_calls[0].name == "get_weather"
    after = client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], max_tokens=4)
    assert after.choices[0].finish_reason == "length"


def test_log_probabilities_n_stop_and_seed(client: openai.OpenAI) -> None:
    def create(**fields: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL, messages=user("some words"), max_tokens=12, **fields
        )

    several = create(n=3, seed=7, logprobs=True, top_logprobs=4)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in several.choices}) == 3
    assert all(len(choice.logprobs.content) == 12 for choice in several.choices)
    assert all(len(entry.top_logprobs) == 4 for entry in several.choices[0].logprobs.content)
    assert create(seed=7).choices[0].message.content == several.choices[0].message.content
    stopped = client.chat.completions.create(model=MODEL, messages=user("PLAIN"), stop=["END", "never"])
    assert stopped.choices[0].message.content == "Hello wörld, 你好 "


def test_completions_with_echo_and_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="hello", echo=True, logprobs=2, max_tokens=4, seed=1
    )
    choice = answer.choices[0]
    assert choice.text.startswith("hello")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert answer.usage is not None
    assert len(choice.logprobs.tokens) == answer.usage.total_tokens
    ids = client.completions.create(model=MODEL, prompt=[[70, 71], [72]], max_tokens=2, seed=1)
    assert len(ids.choices) == 2


def test_closing_a_stream_aborts_it(client: openai.OpenAI, server: LiveServer) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=user("x"), stream=True, max_tokens=7000)
    next(iter(stream))
    stream.close()
    assert server.is_idle_and_conserved()


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=user("x"), temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="8192 tokens"):
        client.completions.create(model=MODEL, prompt=[5] * 9000)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=user("x"))
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=MODEL, prompt="a" * 300_000)
    assert large.value.status_code == 413


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_64_concurrent_streams_each_equal_their_solo_run(server: LiveServer) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=user(f"number {number}"), seed=number, max_tokens=40, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> tuple[list[str], list[str], float]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=30) as client:
            solo = [await one(client, number) for number in range(64)]
            started_s = time.monotonic()
            together = await asyncio.gather(*(one(client, number) for number in range(64)))
            return solo, list(together), time.monotonic() - started_s

    solo, together, seconds = asyncio.run(main())
    assert together == solo
    assert len(set(solo)) == 64
    assert seconds < 20
    assert server.is_idle_and_conserved()
