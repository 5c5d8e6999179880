"""How the server writes its log: one line a record, as text or JSON, whatever callers put into it."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Mapping
from typing import Literal

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

FIELDS = "fields"
"""Name in `extra` of a record's own names and values."""

_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\u2027\u202f-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_PLAIN = re.compile(r"[\w.:/@+%-]+", re.ASCII)
_TRACE_MARK = "  | "
# Made once: `json.dumps` makes one each time when it is told what to do with other types.
_to_json = json.JSONEncoder(default=str, allow_nan=False).encode


class TextFormatter(logging.Formatter):
    """For people: time, level, logger, message, then name=value.

    Control characters are escaped and lines of tracebacks marked, so that no line can be made to look like
    another record.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, and marked ones for a traceback."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        message = _printable(record.getMessage())
        line = f"{stamp},{record.msecs:03.0f} {record.levelname} {record.name}: {message}"
        for name, value in _fields(record).items():
            line += f" {name}={_word(value)}"
        return "\n".join(
            [line, *(_TRACE_MARK + _printable(part) for part in _trace(self, record).splitlines())]
        )


class JsonFormatter(logging.Formatter):
    """For machines: one object a line, in ASCII; null stands for a number that is not finite."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if trace := _trace(self, record):
            entry["traceback"] = trace
        try:
            return _to_json(entry)
        except ValueError:
            return _to_json(_finite(entry))


def configure(style: LogFormat, level: LogLevel = "info") -> None:
    """Sends the log of this process to stderr in this style, from this level on."""
    # Nothing of this is written, and each line of a busy server would pay for it.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("grpc._cython.cygrpc", "aiohttp.server"):
        logging.getLogger(name).addFilter(_is_no_callers_doing)


def _is_no_callers_doing(record: logging.LogRecord) -> bool:
    """False for tracebacks of what callers do, which is no fault of ours.

    One has left when gRPC answers it, which has its line, or does not speak HTTP, which aiohttp tells it.
    """
    kind = record.exc_info[0] if record.exc_info else None
    names = {base.__name__ for base in kind.__mro__} if kind is not None else set()
    return not names & {"ExecuteBatchError", "HttpProcessingError", "RequestPayloadError"}


def write(logger: logging.Logger, message: str, fields: Mapping[str, object]) -> None:
    """One record of level INFO; half as dear as `logger.info`, which looks for the code it came from."""
    if logger.isEnabledFor(logging.INFO):
        extra = {FIELDS: fields}
        logger.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, message, (), None, extra=extra))


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, FIELDS, {})
    return fields


def _finite(value: object) -> object:
    """The same with None for what JSON has no number for."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: _finite(one) for name, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
    return value


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    parts += [formatter.formatStack(record.stack_info)] if record.stack_info else []
    return "\n".join(parts)


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _word(value: object) -> str:
    """A value that cannot be taken for two, nor for the next name."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
