import inspect

import pytest

from bittrue import errors
from bittrue.engine.types import (
    Abort,
    EngineStats,
    MemoryReport,
    PrefillProgress,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from bittrue.engine.wire import (
    HEADER_BYTES,
    Flush,
    Flushed,
    Hello,
    Ping,
    Pong,
    Ready,
    Refused,
    Shutdown,
    StepDone,
    TensorPiece,
    Updated,
    UpdatePart,
    body_bytes,
    decode_from_engine,
    decode_to_engine,
    error_of,
    frame,
    refusal,
)

PARAMS = SamplingParams(stop=("a", "b"), logit_bias={5: 1.5}, grammar_after=(3, 4), logprobs=2)
TO_ENGINE = [
    Hello(factory="a:b", run_config="{}", verified="ab12"),
    Request(request_id="r", prompt=(1, 2), params=PARAMS, resume=(3,), priority=-1, cache_salt="s"),
    Abort(request_id="r"),
    Ping(ping_id=4),
    Flush(flush_id=6),
    UpdatePart(
        update_id=7,
        index=1,
        is_last=True,
        version="v2",
        base="v1",
        running="in_place",
        pieces=[TensorPiece("t", "d1", "torch.bfloat16", (2, 3), True, 12, 4, memoryview(b"\0\xff345678"))],
    ),
    Shutdown(),
]
FROM_ENGINE = [
    Ready(
        max_context=5,
        vocab_size=6,
        fingerprint={"a": 1, "b": "c"},
        stats=EngineStats(pages_total=3),
        memory=MemoryReport(ledger={"weights": 2**40, "process": 7}, page_bytes=8, slot_bytes=9),
        verified="ab12",
    ),
    StepDone(
        events=[
            TokenEvent(
                request_id="r",
                token_ids=(1, 2),
                logprobs=(TokenLogprob(1, -0.5, ((2, -1.0),)),),
                prompt_logprobs=(None, TokenLogprob(7, -2.0)),
                finish_reason="stop",
                stop_match="a",
            )
        ],
        stats=EngineStats(prefills=(PrefillProgress("r", 3, 2**20),)),
    ),
    Pong(ping_id=4, stats=EngineStats(num_running=1)),
    Flushed(flush_id=6, dropped={"pages": 3, "disk": 2**40}, error="a page is held"),
    Refused(request_id=None, kind="ConfigError", message="m", fields={"field": "port"}),
    Updated(
        update_id=7,
        is_changed=False,
        stats=EngineStats(weight_version="v1"),
        refusal=Refused(request_id=None, kind="PublicationRefused", message="m", fields={"tensor": "t"}),
    ),
]


@pytest.mark.parametrize("message", TO_ENGINE + FROM_ENGINE, ids=lambda message: type(message).__name__)
def test_messages_cross_unchanged(message: object) -> None:
    framed = frame(message)  # type: ignore[arg-type]
    header, body = framed[:HEADER_BYTES], framed[HEADER_BYTES:]
    assert body_bytes(header) == len(body)
    decode = decode_to_engine if message in TO_ENGINE else decode_from_engine
    assert decode(body) == message


def test_a_kind_of_str_in_the_fingerprint_crosses_as_str() -> None:
    class Version(str):
        __slots__ = ()

    ready = Ready(
        max_context=1,
        vocab_size=1,
        fingerprint={"v": Version("2.1")},
        stats=EngineStats(),
        memory=MemoryReport(),
    )
    crossed = decode_from_engine(frame(ready)[HEADER_BYTES:])
    assert isinstance(crossed, Ready)
    assert crossed.fingerprint == {"v": "2.1"}


MADE = [
    errors.InvalidRequest("bad field", param="messages[0]", code="unknown_field"),
    errors.PromptTooLong(num_tokens=9, limit=8),
    errors.ConfigError("bad knob", field="port"),
    errors.UnsupportedModel("other model", field="model_type"),
    errors.CheckpointError("broken", file="a.safetensors", tensor="t"),
    errors.BackendUnavailable("no compiler"),
    errors.QueueFull("full", retry_after_s=7),
    errors.Draining("closing"),
    errors.HttpRefused("too large", status=413, code="body_too_large"),
    errors.KVCorrupted("a row is not what was stored"),
    errors.RequestFailed("no token fits"),
    errors.PoisonRequest("died of it"),
    errors.NotFlushed("a page is held"),
    errors.EngineDied("died"),
    errors.VerifierUnavailable("no sandbox"),
    errors.TrainingFailed("the loss of step 3 is nan", step=3, term="main"),
    errors.RolloutInvalid("9 log-probabilities for 8 tokens", prompt_key="p"),
    errors.ParityBroken("differs", sequence=2, token=5),
    errors.CertificateInvalid("another file", field="files.run.json"),
    errors.PublicationRefused("other bytes", tensor="head.weight"),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_errors_keep_class_text_and_attributes(error: errors.BittrueError) -> None:
    crossed = decode_from_engine(frame(refusal("r", error))[HEADER_BYTES:])
    assert isinstance(crossed, Refused)
    again = error_of(crossed)
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
    assert (again.status, again.code, again.exit_code) == (error.status, error.code, error.exit_code)


def test_every_error_class_is_tried_above() -> None:
    known = {c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.BittrueError)}
    assert known - {errors.BittrueError, errors.UsageError} == {type(error) for error in MADE}


@pytest.mark.parametrize("kind", ["NoSuchError", "BittrueErrors", "Exception"])
def test_unknown_error_becomes_engine_died(kind: str) -> None:
    assert type(error_of(Refused(request_id="r", kind=kind, message="m"))) is errors.EngineDied
