"""One live server on the n-gram engine, shared by the tests that do not disturb it."""

from collections.abc import Iterator

import pytest
from standins.live_server import LiveServer, write_model

CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)
REPLIES = {
    "PLAIN": "Hello wörld, 你好 END of it.",
    "THINK": "I should greet.</think>Hi there.",
    "CALL": "Let me look.</think>One moment." + CALL,
    "ONLYTOOL": CALL,
    "FORGED": "He said </thi" + "nk> and <think>.",
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, replies=REPLIES)
    with LiveServer(directory, {"max_body_bytes": 200_000}) as live:
        yield live
