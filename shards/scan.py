"""Where a shard's samples lie, found with no index: by its sidecar, or by its tar's headers."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from infra.logs import log
from infra.storage import Folder
from shards.placeholder import removed_key
from shards.sample import split_name
from shards.tar import END, scan


def scan_ends(folder: Folder, name: str) -> npt.NDArray[np.int64]:
    """Return where each sample of a tar ends, from its headers. Raises UserError for a damaged tar."""
    return np.fromiter((end for _, end in scan_samples(folder, name)), dtype=np.int64)


def scan_samples(folder: Folder, name: str) -> Iterator[tuple[str, int]]:
    """Yield the key of each sample of a tar and where it ends, from the headers alone; one taken down has its place.

    Raises:
        UserError: the tar is missing or damaged; the message names it and the byte.
    """
    last, end = "", 0
    tar = f"{name}.tar"
    try:
        with folder.open(tar) as stream:
            for member, _ in scan(stream):
                gone = removed_key(member.name)
                split = split_name(member.name) if gone is None else (gone, "")
                if split is None:
                    continue
                if split[0] != last and last:
                    yield last, end
                last, end = split[0], member.end
    except FileNotFoundError:
        raise UserError(f"{folder.path(tar)}: this shard is missing; make or fetch it again") from None
    except ValueError as error:
        raise UserError(f"{folder.path(tar)}: damaged tar ({error}); make or fetch it again") from None
    if last:
        yield last, end


def file_digest(folder: Folder, name: str) -> str:
    """Return the SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with folder.open(name) as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sidecar_ends(folder: Folder, name: str, tar_bytes: int) -> npt.NDArray[np.int64] | None:
    """Return where samples end by the sidecar; None where it does not tell or cannot be right."""
    sidecar = f"{name}.parquet"
    try:
        file = pq.ParquetFile(io.BytesIO(folder.read(sidecar)))
        if not {"offset", "size"} <= set(file.schema_arrow.names):
            return None
        table = file.read(columns=["offset", "size"]).drop_null()
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        log.warning("%s: cannot be read (%s); its tar is scanned", folder.path(sidecar), " ".join(str(error).split()))
        return None
    starts: npt.NDArray[np.int64] = table.column("offset").to_numpy().astype(np.int64)
    ends: npt.NDArray[np.int64] = starts + table.column("size").to_numpy()
    are_runs = np.array_equal(starts, np.concatenate([[0], ends])[:-1])
    if are_runs and (int(ends[-1]) if len(ends) else 0) + len(END) == tar_bytes:
        return ends
    log.warning("%s: its addresses cannot be right; its tar is scanned, see `pairmill verify`", folder.path(sidecar))
    return None
