"""ServeConfig: how a server treats its clients. What the engine does is EngineConfig's."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ServeConfig:
    """How a server treats its clients.

    model             the name that clients ask for
    host, port        where it listens; port 0: any that is free
    api_key           what clients must send as a bearer token; None: nothing
    max_waiting       sequences that may wait beyond those that the engine runs at a time; more are refused with 429
    drain_seconds     how long running requests may go on after SIGTERM
    max_body_bytes    of a request
    request_seconds   how long a client may take to send one: its head, and then its body
    cors_origins      origins whose pages may call it from a browser; "*" for all
    chat_template     Jinja text, instead of the checkpoint's own
    access_log        write a line of JSON for each request to stderr, without its texts

    Raises ValueError for a value out of range.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_waiting: int = 1024
    drain_seconds: float = 30.0
    max_body_bytes: int = 4 * 2**20
    request_seconds: float = 30.0
    cors_origins: tuple[str, ...] = ()
    chat_template: str | None = None
    access_log: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0 to 65535, got {self.port}; use 8000")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise ValueError("api_key must be ASCII text that is not empty, got another; leave it out to ask for none")
        least = {"max_waiting": 0, "drain_seconds": 0, "max_body_bytes": 1024, "request_seconds": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in least and not value >= least[field.name]:
                raise ValueError(f"{field.name} must be at least {least[field.name]}, got {value}; see ServeConfig")
