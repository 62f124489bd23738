"""Logs of a server: a line of JSON for each event, without texts of requests."""

import json
import logging
from datetime import datetime, timezone
from typing import Any

log = logging.getLogger("gemma4_compile.serve")


def event(name: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Log an event with what belongs to it, and an error with its traceback."""
    log.log(level, name, extra={"fields": fields}, exc_info=error)


def to_stderr() -> None:
    """Write the server's events, and uvicorn's faults, there."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    log.setLevel(logging.INFO)
    for logger in (log, logging.getLogger("uvicorn.error")):
        logger.addHandler(handler)
        logger.propagate = False


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}))
