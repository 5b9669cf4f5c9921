"""The process that decodes: bodies in at standard input, pictures and facts out at standard output.

Image libraries are C code that reads hostile bytes. Here a native fault, a hang or a hunger for memory ends
this process and costs one row; the worker starts another.
"""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import struct
import sys
import warnings
from typing import IO, Any

import cv2

from ingest.blur import BadBoxesError, parse_boxes
from ingest.config import IngestConfig
from ingest.geometry import STATUS_OF
from ingest.image import Picture, process
from shards.layout import Reason, Status

FRAME = struct.Struct("<IQ")
"""Ahead of every message both ways: the length of its JSON, and of the bytes after it."""


def main() -> None:
    """Answer one message after another until standard input ends. The first one is the configuration."""
    taken, given = sys.stdin.buffer, sys.stdout.buffer
    warnings.filterwarnings("ignore", module="PIL")  # damaged pictures are counted, not told one by one
    told, _ = receive(taken)
    config = IngestConfig.model_validate(told)
    cv2.setNumThreads(1)  # there is a decoder a core already
    _bound_memory(config.decoder_bytes)
    send(given, {"ready": True})
    # Should the worker be gone, nobody else would end a hang. The worker's own clock is a little faster.
    patience_s = int(config.decode_s) + 5
    while True:
        try:
            boxes, body = receive(taken)
        except EOFError:
            return
        signal.alarm(patience_s)
        facts, picture = examined(body, boxes, config)
        signal.alarm(0)
        send(given, facts, picture or b"")


def examined(body: bytes, boxes: Any, config: IngestConfig) -> tuple[dict[str, Any], bytes | None]:
    """Return what the sidecar says of a body, and the picture made of it if there is one.

    `boxes` is the content of the row's `image.faces_col`, as `ingest.blur.parse_boxes` takes it.
    """
    try:
        result = process(body, config.image, parse_boxes(boxes))
    except BadBoxesError as error:
        # Without its boxes a face would stay as it is: such a picture is not taken.
        return _failure(Status.FAILED_TO_RESIZE, Reason.BAD_BOXES, str(error)) | _of_body(body), None
    sizes = {"original_width": result.original_width, "original_height": result.original_height}
    if not isinstance(result, Picture):
        facts = sizes | _failure(result.status, result.reason, result.detail)
        # A refusal by size may come before the body is whole: its digest would depend on the network.
        return facts if result.reason in STATUS_OF else facts | _of_body(body), None
    facts = sizes | _of_body(body)
    facts |= {"status": Status.SUCCESS, "reason": Reason.NONE, "width": result.width, "height": result.height}
    return facts | {"phash": result.phash, "phash_quality": result.phash_quality}, result.data


def send(stream: IO[bytes], message: Any, data: bytes = b"") -> None:
    """Write one message: a JSON value, and bytes that follow it."""
    text = json.dumps(message).encode()
    stream.write(FRAME.pack(len(text), len(data)) + text)
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Any, bytes]:
    """Read one message. Raises EOFError when the other side has ended."""
    text_bytes, data_bytes = FRAME.unpack(_exactly(stream, FRAME.size))
    return json.loads(_exactly(stream, text_bytes)), _exactly(stream, data_bytes)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _failure(status: Status, reason: Reason, detail: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "detail": detail}


def _of_body(body: bytes) -> dict[str, Any]:
    return {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def _bound_memory(limit_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))


if __name__ == "__main__":
    main()
