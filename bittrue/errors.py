"""Every failure a caller can meet, as one tree: a class per boundary a failure can cross.

BittrueError
├── UsageError                asked for something that cannot be            -> HTTP 400, exit 2
│   ├── InvalidRequest        a field has a wrong name, type or value       -> HTTP 400, names the field
│   ├── PromptTooLong         prompt (plus output) exceeds the context      -> HTTP 400, both numbers
│   └── ConfigError           a knob or a config.json field is unknown or out of range
│       └── UnsupportedModel  config.json describes a model this program does not run
├── CheckpointError           a file is missing, corrupt or does not match  -> exit 2
├── BackendUnavailable        the chosen backend cannot run here            -> exit 2
├── QueueFull                 too many requests wait                        -> HTTP 429
├── Draining                  the server is shutting down                   -> HTTP 503
├── KVCorrupted               cached rows are not what was stored           -> HTTP 500, exit 4
├── HttpRefused               key, path, method, time or size of a request  -> HTTP 401, 404, 405, 408, 413
├── RequestFailed             the engine could not finish this request      -> HTTP 500
│   └── PoisonRequest         the engine process dies of this request       -> HTTP 500, do not retry
├── TrainingFailed            a loss or a gradient is no number             -> exit 2
├── RolloutInvalid            a rollout's record does not fit together      -> exit 4
├── ParityBroken              the trainer computes other log-probabilities  -> exit 4
├── CertificateInvalid        a run is not what its certificate says        -> exit 4
├── VerifierUnavailable       a checker of answers cannot run here          -> exit 2
├── NotFlushed                cached prefixes may still be there            -> HTTP 500
└── EngineDied                there is no engine process                    -> HTTP 503
"""


class BittrueError(Exception):
    """Base of everything raised on purpose. ``str(error)`` states the fact and the remedy."""

    status: int = 500
    exit_code: int = 2
    code: str = "internal_error"


class UsageError(BittrueError):
    """The caller asked for something that cannot be done."""

    status = 400
    code = "invalid_request"


class InvalidRequest(UsageError):
    """A request field has a wrong name, type or value. ``param`` is the field's path, e.g.
    ``messages[0].role``."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLong(UsageError):
    """The prompt does not fit the context. Raised before anything waits or is allocated."""

    code = "context_length_exceeded"

    def __init__(self, *, num_tokens: int, limit: int, knob: str = "--max-context") -> None:
        super().__init__(
            f"the prompt has {num_tokens} tokens, but the context of this server is {limit} tokens; "
            f"shorten the prompt or start the server with a larger {knob}"
        )
        self.num_tokens = num_tokens
        self.limit = limit
        self.param = "messages"


class ConfigError(UsageError):
    """A run knob or a config field is unknown, mistyped or out of range. ``field`` names it."""

    code = "config_error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnsupportedModel(ConfigError):
    """config.json describes a model this program does not run."""

    code = "unsupported_model"


class CheckpointError(BittrueError):
    """A checkpoint is missing, corrupt or does not match its config. Names the file and the tensor."""

    code = "checkpoint_error"

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor


class BackendUnavailable(BittrueError):
    """The chosen backend cannot run here. Lists what is missing and why."""

    code = "backend_unavailable"


class QueueFull(BittrueError):
    """Too many requests wait. ``retry_after_s`` is a hint in seconds."""

    status = 429
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(BittrueError):
    """The server is shutting down and takes no new request."""

    status = 503
    code = "draining"


class HttpRefused(BittrueError):
    """Refused at the HTTP boundary, before the request means anything: ``status`` says how."""

    def __init__(self, message: str, *, status: int, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class RequestFailed(BittrueError):
    """The engine could not finish this request; others go on."""

    code = "request_failed"


class PoisonRequest(RequestFailed):
    """The engine process died each time it ran this request, at the end of this one alone. Not to be sent
    again."""

    code = "poison_request"


class TrainingFailed(BittrueError):
    """A loss or a gradient is no number any more. Names the step and the term; checkpoints are kept."""

    code = "training_failed"

    def __init__(self, message: str, *, step: int, term: str) -> None:
        super().__init__(message)
        self.step = step
        self.term = term


class RolloutInvalid(BittrueError):
    """What was recorded of a rollout does not fit together: a length, a type or a value is wrong."""

    exit_code = 4
    code = "rollout_invalid"

    def __init__(self, message: str, *, prompt_key: str = "") -> None:
        super().__init__(message)
        self.prompt_key = prompt_key


class ParityBroken(BittrueError):
    """The trainer does not compute what the engine sampled from, or a record does not belong to its
    tokens. Names the first place: a sequence of the batch and a token of it, -1 where it is all of them."""

    exit_code = 4
    code = "parity_broken"

    def __init__(self, message: str, *, sequence: int = -1, token: int = -1) -> None:
        super().__init__(message)
        self.sequence = sequence
        self.token = token


class CertificateInvalid(BittrueError):
    """A certificate was changed, or what it was made from. Names the first field that differs."""

    exit_code = 4
    code = "certificate_invalid"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class VerifierUnavailable(BittrueError):
    """A checker of answers cannot run here: a library or a sandbox is missing. Says what to install or
    allow."""

    code = "verifier_unavailable"


class PublicationRefused(BittrueError):
    """New weights are not what was sent, or do not fit those in memory, which stay. Names the tensor."""

    exit_code = 4
    code = "publication_refused"

    def __init__(self, message: str, *, tensor: str = "") -> None:
        super().__init__(message)
        self.tensor = tensor


class NotFlushed(BittrueError):
    """Cached prefixes were not dropped, or not all; what is cached may still be used."""

    code = "not_flushed"


class EngineDied(BittrueError):
    """There is no engine process: it ended and could not be restarted, or not yet."""

    status = 503
    code = "engine_died"


class KVCorrupted(BittrueError):
    """Cached rows or states are not what was stored, or belong to another sequence. Names the place."""

    exit_code = 4
    code = "kv_corrupted"
