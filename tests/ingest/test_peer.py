"""img2dataset as the engine: the parity oracle, under this corpus' rules."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from infra.cluster import ClusterConfig
from infra.storage import Folder
from ingest.config import FetchConfig, ImageConfig, IngestConfig, PlanConfig
from ingest.peer import PeerWorker, not_kept_to
from ingest.peer_words import verdict
from ingest.plan import plan
from ingest.run import ingest
from ingest.worker import ShardWorker
from pairmill.sample_web.process import SampleWeb
from pairmill.sample_web.rows import write_rows
from shards.layout import Reason, Status
from shards.verify import verify

pytest.importorskip("img2dataset")
KINDS = ["not_found", "noai", "truncated_image", "redirect", "error_once", "too_small", "html"]
ODD_KINDS = [
    "not_found", "gone", "unavailable", "error_once", "html", "hang", "cut_short", "chunks_cut_short", "reset",
    "redirect", "redirect_other_host", "redirect_loop", "noai", "noimageai", "refused", "unknown_host", "wrong_type",
    "cmyk", "grey", "png_16_bit", "palette_alpha", "animated_gif", "webp", "avif", "icc_profile", "truncated_image",
    "zero_bytes", "svg", "header_bomb", "too_small", "wide_banner",
]  # fmt: skip
SCRIPT = """
import resource, sys
from ingest.config import IngestConfig
from ingest.peer import PeerWorker
corpus, config, most_bytes = sys.argv[1:]
if int(most_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(most_bytes), int(most_bytes)))
try:
    PeerWorker(corpus, IngestConfig.model_validate_json(config)).run(0)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def planned(folder: Path, web: SampleWeb, name: str, kinds: list[str], limit: int = 40, shard: int = 40) -> Path:
    web.reset()
    rows = write_rows(folder / f"rows-{name}", web.base_urls, limit=limit, share=0.4 if kinds else 0, kinds=kinds)
    plan(str(folder / name), PlanConfig(urls=str(rows.urls), rows_per_shard=shard))
    return folder / name


def rows_of(corpus: Path) -> dict[str, dict[str, Any]]:
    paths = sorted((corpus / "raw").glob("*.parquet"))
    return {row["key"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def by_peer(config: IngestConfig) -> IngestConfig:
    return config.model_copy(update={"engine": "img2dataset"})


def test_both_engines_agree_row_by_row(
    tmp_path: Path, web: SampleWeb, config: IngestConfig, local_ray: ClusterConfig
) -> None:
    native, peer = planned(tmp_path, web, "native", KINDS), planned(tmp_path, web, "peer", KINDS)
    ingest(str(native), config, local_ray)
    web.reset()
    totals = ingest(str(peer), by_peer(config), local_ray)
    ours, theirs = rows_of(native), rows_of(peer)
    assert list(ours) == list(theirs)
    assert totals["rows_in"] == len(theirs) == sum(totals["by_status"].values())
    both = [key for key, row in ours.items() if row["status"] == theirs[key]["status"] == "success"]
    assert len(both) > len(ours) / 2
    for key in both:
        for name in ("url", "caption", "sha256", "width", "height", "original_width", "original_height"):
            assert ours[key][name] == theirs[key][name], (key, name)
    # What the peer reads of a cut body it keeps, and the other way round nothing: ours is the stricter.
    assert {ours[key]["reason"] for key in ours if ours[key]["status"] != theirs[key]["status"]} <= {
        "decode_error", "truncated_body", "opt_out", "robots_txt",
    }  # fmt: skip
    assert verify(str(peer / "raw")).faults == []
    tars = [str(path) for path in sorted((peer / "raw").glob("*.tar"))]
    samples = list(wds.WebDataset(tars, shardshuffle=False).decode("pilrgb"))
    assert [one["__key__"] for one in samples] == [key for key, row in theirs.items() if row["status"] == "success"]
    for path in (peer / "raw").glob("*_stats.json"):
        assert json.loads(path.read_text())["engine"] == "img2dataset"


@pytest.mark.parametrize("mode", ["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"])
@pytest.mark.parametrize("only_if_bigger", [False, True])
def test_sizes_and_pixels_are_the_peers(mode: Any, only_if_bigger: bool) -> None:
    from img2dataset.resizer import Resizer

    from ingest.image import Picture, process

    config = ImageConfig(size=100, resize=mode, only_if_bigger=only_if_bigger, phash=False, min_side=8, max_aspect=3.0)
    theirs = Resizer(100, mode, only_if_bigger, min_image_size=8, max_aspect_ratio=3.0)
    rng = np.random.default_rng(5)
    for width, height in ((300, 200), (201, 333), (90, 60), (99, 150), (320, 101), (640, 480), (7, 7), (400, 100)):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        data, wide, high, _, _, error = theirs(io.BytesIO(buffer.getvalue()))
        ours = process(buffer.getvalue(), config)
        assert isinstance(ours, Picture) == (error is None), (width, height, error)
        if isinstance(ours, Picture):
            assert (ours.width, ours.height) == (wide, high)
            first, second = (Image.open(io.BytesIO(one)).convert("RGB") for one in (ours.data, data))
            assert first.size == second.size
            error_2 = np.mean((np.asarray(first, dtype=float) - np.asarray(second, dtype=float)) ** 2)
            # White borders are ours, black ones the peer's; their place is compared by the size.
            assert mode == "border" or 10 * np.log10(255**2 / max(error_2, 1e-9)) > 30


def test_faces_are_blurred_by_both(tmp_path: Path, web: SampleWeb, config: IngestConfig) -> None:
    web.reset()
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=4, share=0)
    table = pq.read_table(rows.urls).slice(0, 4)
    boxes = ["[[0.1, 0.1, 0.9, 0.9]]", "", "no boxes", "[[0.2, 0.2, 0.4, 0.5]]"]
    pq.write_table(table.append_column("faces", [boxes]), tmp_path / "faces.parquet")
    hiding = config.model_copy(update={"image": config.image.model_copy(update={"faces_col": "faces"})})
    reasons = {}
    for name, kind in (("native", ShardWorker), ("peer", PeerWorker)):
        corpus = tmp_path / name
        plan(str(corpus), PlanConfig(urls=str(tmp_path / "faces.parquet")))
        worker = kind(str(corpus), hiding)
        try:
            worker.run(0)
        finally:
            worker.close()
        reasons[name] = {row["faces"]: row["reason"] for row in rows_of(corpus).values()}
    assert reasons["native"] == reasons["peer"] == dict.fromkeys(boxes, "") | {"no boxes": "bad_boxes"}


def test_a_private_address_is_refused(tmp_path: Path, config: IngestConfig) -> None:
    (tmp_path / "rows.txt").write_text("http://127.0.0.1:9/1.jpg\nhttp://localhost:9/2.jpg\n")
    corpus = tmp_path / "corpus"
    plan(str(corpus), PlanConfig(urls=str(tmp_path / "rows.txt")))
    public = config.model_copy(update={"fetch": config.fetch.model_copy(update={"allow_private": False})})
    stats = PeerWorker(str(corpus), public).run(0)
    assert stats["by_reason"] == {"blocked_address": 2}
    assert stats["by_host"] == {"127.0.0.1": {"blocked_address": 1}, "localhost": {"blocked_address": 1}}


def test_every_misbehaviour_ends_by_its_own_name(tmp_path: Path, web: SampleWeb, config: IngestConfig) -> None:
    corpus = planned(tmp_path, web, "corpus", ODD_KINDS, limit=100)
    expected = {row["url"]: row for row in pq.read_table(tmp_path / "rows-corpus" / "expected.parquet").to_pylist()}
    worker = PeerWorker(str(corpus), config)
    parts = len(list((corpus / "plan").glob("part-*")))
    all_stats = [worker.run(part) for part in range(parts)]
    rows = rows_of(corpus)
    assert {expected[row["url"]]["kind"] for row in rows.values()} == {"good", *ODD_KINDS}
    for row in rows.values():
        wanted = expected[row["url"]]
        found = (row["status"], row["reason"])
        # A file that ends early is as little a picture to the peer as one that never was.
        assert found == (wanted["expected_status"], wanted["expected_reason"]), (wanted["kind"], row["detail"])
        assert (row["bytes"] is not None) == (row["sha256"] is not None)
    opted_out = [row["opt_out"] for row in rows.values() if row["reason"] == Reason.OPT_OUT]
    assert set(opted_out) == {"X-Robots-Tag: noai", "X-Robots-Tag: noimageai"}
    assert {row["http_status"] for row in rows.values() if row["reason"] == Reason.HTTP_STATUS} == {404, 410, 503}
    for stats in all_stats:
        assert stats["bytes"] > 0
        assert stats["requests"] >= stats["count"] == sum(stats["by_status"].values())
        assert stats["end_time"] >= stats["start_time"]
    assert verify(str(corpus / "raw")).faults == []


def test_only_what_may_pass_is_asked_again(tmp_path: Path, web: SampleWeb, config: IngestConfig) -> None:
    kinds = {"not_found": 1, "gone": 1, "noai": 1, "noimageai": 1, "redirect_loop": 1, "unavailable": 3}
    corpus = planned(tmp_path, web, "corpus", list(kinds), limit=60, shard=1000)  # all in one shard
    table = pq.read_table(tmp_path / "rows-corpus" / "expected.parquet")
    expected = {row["url"]: row["kind"] for row in table.to_pylist()}
    PeerWorker(str(corpus), config).run(0)
    sent = web.log()["paths"]
    rows = [row for row in rows_of(corpus).values() if expected[row["url"]] in kinds]
    assert {expected[row["url"]] for row in rows} == set(kinds)
    for row in rows:
        kind = expected[row["url"]]
        assert row["attempts"] == kinds[kind], row
        assert kind == "redirect_loop" or sent[urlsplit(row["url"]).path] == kinds[kind], row


def test_two_runs_give_the_same_bytes(tmp_path: Path, web: SampleWeb, config: IngestConfig) -> None:
    tars = []
    for name in ("first", "second"):
        corpus = planned(tmp_path, web, name, KINDS, limit=20)
        PeerWorker(str(corpus), config).run(0)
        tars.append((corpus / "raw" / "00000.tar").read_bytes())
    assert tars[0] == tars[1]


def test_at_the_deadline_the_rest_is_left_for_another_pass(
    tmp_path: Path, web: SampleWeb, config: IngestConfig
) -> None:
    (tmp_path / "rows.txt").write_text("".join(web.url("hang", f"{number}") + "\n" for number in range(6)))
    corpus = tmp_path / "corpus"
    plan(str(corpus), PlanConfig(urls=str(tmp_path / "rows.txt")))
    fetch = config.fetch.model_copy(update={"concurrency": 1, "retries": 0, "first_byte_s": 0.5})
    stats = PeerWorker(str(corpus), config.model_copy(update={"fetch": fetch, "shard_deadline_s": 0.7})).run(0)
    assert stats["by_reason"]["not_attempted"] >= 3
    assert stats["count"] == 6
    late = [row for row in rows_of(corpus).values() if row["reason"] == Reason.NOT_ATTEMPTED]
    assert all(row["transient"] and row["attempts"] == 0 and "deadline of 0.7 s" in row["detail"] for row in late)


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path: Path, web: SampleWeb, config: IngestConfig) -> None:
    """The peer goes on when its writer fails; its shard must not."""
    corpus = planned(tmp_path, web, "corpus", [], limit=40)
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(corpus), config.model_dump_json(), "20000"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "NoSpaceError" in ended.stderr.splitlines()[-1]
    assert list((corpus / "raw").iterdir()) == []


def test_killed_in_the_midst_nothing_is_visible_and_a_second_run_is_whole(
    tmp_path: Path, web: SampleWeb, config: IngestConfig
) -> None:
    corpus = planned(tmp_path, web, "corpus", ["hang"], limit=20)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    patient = config.model_copy(update={"fetch": config.fetch.model_copy(update={"first_byte_s": 60, "total_s": 60})})
    worker = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(corpus), patient.model_dump_json(), "0"],
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    try:
        end = time.monotonic() + 60
        while web.log()["kinds"].get("images", 0) < 20 and time.monotonic() < end:
            assert worker.poll() is None
            time.sleep(0.05)
    finally:
        worker.kill()
    assert worker.wait() == -signal.SIGKILL
    assert all(path.name.startswith(".tmp-") for path in (corpus / "raw").iterdir())
    assert all("wandb" in path.name for path in temporary.iterdir())  # made whenever the peer is imported
    Folder(corpus / "raw").sweep_temporary()
    web.reset()
    assert PeerWorker(str(corpus), config).run(0)["successes"] == 20
    assert sorted(path.name for path in (corpus / "raw").iterdir()) == [
        "00000.parquet",
        "00000.tar",
        "00000_stats.json",
    ]


def test_a_blurred_picture_is_never_the_original_one(tmp_path: Path, web: SampleWeb, config: IngestConfig) -> None:
    """Left alone the peer keeps the original bytes of a picture that it blurs and does not resize."""
    rows = write_rows(tmp_path / "rows", web.base_urls, limit=1, share=0)
    table = pq.read_table(rows.urls).slice(0, 1)
    pq.write_table(table.append_column("faces", [["[[0.1, 0.1, 0.9, 0.9]]"]]), tmp_path / "faces.parquet")
    image = ImageConfig(resize="no", skip_reencode=True, faces_col="faces", format="webp")
    kept = []
    for name, settings in (("plain", image.model_copy(update={"faces_col": None})), ("blurred", image)):
        plan(str(tmp_path / name), PlanConfig(urls=str(tmp_path / "faces.parquet")))
        PeerWorker(str(tmp_path / name), config.model_copy(update={"image": settings})).run(0)
        (row,) = rows_of(tmp_path / name).values()
        with (tmp_path / name / "raw" / "00000.tar").open("rb") as tar:
            tar.seek(row["image_offset"])
            kept.append(np.asarray(Image.open(io.BytesIO(tar.read(row["image_bytes"]))).convert("L"), dtype=float))
    middle = np.s_[32:96, 32:96]
    assert np.var(np.diff(kept[1][middle])) < np.var(np.diff(kept[0][middle])) / 3


@pytest.mark.parametrize(
    ("message", "reason", "passes"),
    [
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", Reason.DNS, True),
        ("<urlopen error [Errno -2] Name or service not known>", Reason.DNS, False),
        ("HTTP Error 302: The HTTP server returned a redirect error that would lead", Reason.TOO_MANY_REDIRECTS, False),
        ("HTTP Error 403: Forbidden", Reason.HTTP_STATUS, False),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", Reason.TLS, False),
        ("<urlopen error _ssl.c:989: The handshake operation timed out>", Reason.TIMEOUT, True),
        ("IncompleteRead(12 bytes read, 88 more expected)", Reason.TRUNCATED_BODY, True),
        ("<urlopen error unknown url type: ftp>", Reason.BAD_URL, False),
        ("'ascii' codec can't encode character", Reason.BAD_URL, False),
        ("Remote end closed connection without response", Reason.CONNECTION_RESET, True),
        ("words nobody thought of", Reason.CONNECTION_RESET, True),
    ],
)
def test_its_words_for_what_failed_are_understood(message: str, reason: Reason, passes: bool) -> None:
    assert verdict("failed_to_download", message) == (Status.FAILED_TO_DOWNLOAD, reason, message, passes)


def test_what_it_does_not_keep_to_is_told_in_one_line() -> None:
    plain = not_kept_to(IngestConfig())
    assert "robots.txt" in plain
    assert "without effect" not in plain
    set_by_user = IngestConfig(
        fetch=FetchConfig(per_host_per_s=5, robots=False, retries=1, max_wire_bytes=10), image=ImageConfig(max_pixels=9)
    )
    told = not_kept_to(set_by_user)
    assert told.endswith("; set and without effect: fetch.per_host_per_s, fetch.max_wire_bytes, image.max_pixels")
    assert "\n" not in told


@pytest.mark.parametrize(
    "start", ["from pairmill.cli import main; main(sys.argv[1:])", "from ingest.peer import PeerWorker; made()"]
)
def test_without_the_package_one_line_says_so(tmp_path: Path, web: SampleWeb, start: str) -> None:
    corpus = planned(tmp_path, web, "corpus", [], limit=5)
    script = f"""
import sys
sys.modules["img2dataset"] = None
from infra.errors import UserError
from ingest.config import IngestConfig
def made():
    try:
        PeerWorker(sys.argv[2], IngestConfig())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
{start}
"""
    command = [sys.executable, "-c", script, "ingest", str(corpus), "--engine", "img2dataset"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "extra" in ended.stderr


def test_it_is_not_imported_unless_asked(tmp_path: Path, web: SampleWeb) -> None:
    script = "import sys, ingest.run, pairmill.cli; print([name for name in sys.modules if 'img2dataset' in name])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.strip() == "[]"
