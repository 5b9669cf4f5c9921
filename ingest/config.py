"""What the two commands of this stage, `plan` and `ingest`, can be told."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal

from pydantic import Field, field_validator

from infra.config import Config, knob
from ingest.addresses import is_public
from shards.layout import MAX_ROWS_PER_SHARD


class CaptionConfig(Config):
    """Which captions are worth a download."""

    min_characters: int = Field(5, ge=0, description="a shorter caption is dropped, in characters")
    max_characters: int = Field(1000, ge=1, description="a longer caption is dropped, in characters")
    file_names: bool = Field(True, description="drop captions that are file names (`IMG_1234.jpg`)")
    boilerplate: bool = Field(True, description="drop captions that name no picture (`click to enlarge`)")


class PlanConfig(Config):
    """Where the rows come from, and how they are cut into shards."""

    urls: str = Field(
        "", description="file, folder or glob of rows (parquet, csv, tsv, jsonl, txt; .gz), any fsspec URL"
    )
    url_col: str = Field("url", description="name of the column of image URLs")
    caption_col: str | None = Field(
        "caption", description="name of the column of captions; none for rows without captions"
    )
    columns: tuple[str, ...] | None = Field(
        None, description="names of the other columns to carry along; all of them by default"
    )
    rows_per_shard: int = Field(
        MAX_ROWS_PER_SHARD,
        ge=1,
        le=MAX_ROWS_PER_SHARD,
        description="rows in one plan part, hence in one shard",
    )
    seed: int = Field(0, description="seed of the order of rows")
    captions: CaptionConfig = Field(CaptionConfig(), description="which captions are worth a download")
    sort_rows: int = knob(500_000, "rows sorted in memory at a time while planning", ge=1)


class FetchConfig(Config):
    """How the web is asked, and how much of its answer is taken."""

    concurrency: int = knob(
        256, "requests in flight in one worker; those that have waited 2 s for an answer's headers come on top", ge=1
    )
    per_host_in_flight: int = knob(16, "requests in flight at one host, over all workers", ge=1)
    per_host_per_s: float = knob(100.0, "requests a second at one host, over all workers; 0 for no bound", ge=0)
    crawl_delay_cap_s: float = knob(
        30.0, "longest Crawl-delay of a robots.txt that is kept, in seconds; of a longer one, this much", ge=0
    )
    connect_s: float = knob(10.0, "longest wait for a connection, TLS included, in seconds", gt=0)
    first_byte_s: float = knob(
        15.0, "longest wait for an answer's headers, and between two of its chunks, in seconds", gt=0
    )
    total_s: float = knob(60.0, "longest time for one whole attempt, in seconds", gt=0)
    min_bytes_per_s: float = knob(1000.0, "slowest body that is waited for, in bytes a second", ge=0)
    slow_grace_s: float = knob(5.0, "time before `min_bytes_per_s` applies, in seconds", ge=0)
    retries: int = knob(2, "tries after the first for a reset, a timeout, a 429 or a 5xx", ge=0)
    backoff_s: float = knob(0.5, "pause before the first retry, doubled each time, in seconds", ge=0)
    row_s: float = knob(
        90.0,
        "longest time for one row over all its tries and rests, in seconds: none begins after it; a row that would "
        "wait longer for its turn at a host with a Crawl-delay is left for `--retry-failed`",
        gt=0,
    )
    backoff_cap_s: float = knob(10.0, "longest pause before a retry, in seconds", ge=0)
    retry_after_cap_s: float = knob(
        30.0,
        "longest Retry-After that is waited for, in seconds; a host that asks for more is left alone",
        ge=0,
    )
    retry_budget: float = knob(1.0, "retries a shard may spend, as a multiple of its rows", ge=0)
    breaker_failures: int = knob(20, "failures to reach a host in a row after which it rests", ge=1)
    breaker_rest_s: float = knob(
        5.0, "how long such a host and its rows rest at first, doubled each time, in seconds", ge=0
    )
    breaker_rests: int = knob(3, "rests after which the rows of a host that stays away are given up", ge=0)
    max_wire_bytes: int = Field(20 * 2**20, ge=1, description="largest body as sent, in bytes")
    max_body_bytes: int = Field(40 * 2**20, ge=1, description="largest body once decompressed, in bytes")
    max_redirects: int = Field(5, ge=0, description="redirects followed for one URL")
    robots: bool = Field(True, description="ask for robots.txt and keep to it")
    opt_out: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex", "none", "tdm-reservation"),
        description="words of X-Robots-Tag, and `tdm-reservation`, that make a picture not ours to take",
    )
    user_agent: str = Field(
        "Pairmill/0.1", description="what the crawler calls itself; robots.txt rules are looked up under it"
    )
    contact: str | None = knob(None, "address or page of who runs the crawl, sent in the User-Agent")
    allow_private: bool = Field(False, description="also ask private, loopback and link-local addresses")
    allow_networks: tuple[str, ...] = Field(
        (), description="networks that may be asked although they are not public, like 10.1.0.0/16"
    )
    ca_bundle: str | None = knob(None, "file of certificates to trust; the system's by default")
    verify_tls: bool = knob(True, "refuse hosts whose certificate does not verify")
    dns_in_flight: int = knob(64, "name lookups in flight in one worker", ge=1)
    dns_keep_s: float = knob(300.0, "how long a resolved name is remembered, in seconds", ge=0)
    dns_keep_failure_s: float = knob(60.0, "how long a name that did not resolve is remembered, in seconds", ge=0)
    seed: int = knob(0, "seed of the jitter of retries")

    @field_validator("opt_out", mode="before")
    @classmethod
    def _lower(cls, words: object) -> object:
        return tuple(str(word).lower() for word in words) if isinstance(words, list | tuple) else words

    @field_validator("allow_networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks

    def may_ask(self, address: str) -> bool:
        """Tell whether an IP address may be asked: a public one, or one that this configuration allows."""
        if self.allow_private or is_public(address):
            return True
        parsed = ipaddress.ip_address(address.split("%", 1)[0])
        return any(parsed in ipaddress.ip_network(network) for network in self.allow_networks)

    @property
    def agent_token(self) -> str:
        """The word under which robots.txt and X-Robots-Tag address this crawler: `Pairmill/0.1` is `pairmill`."""
        return re.split(r"[/\s]", self.user_agent, maxsplit=1)[0].lower()

    @property
    def agent_header(self) -> str:
        """The User-Agent header as sent."""
        return f"{self.user_agent} (+{self.contact})" if self.contact else self.user_agent


class ImageConfig(Config):
    """What becomes of a body: filters, size, encoding."""

    size: int = Field(256, ge=1, description="side the picture is resized to, in pixels")
    resize: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = Field(
        "keep_ratio",
        description="keep_ratio: shortest side to `size`; keep_ratio_largest: longest side; center_crop: keep_ratio, "
        "then the middle square; border: keep_ratio_largest, then padded to a square; no: as it is",
    )
    only_if_bigger: bool = Field(False, description="leave pictures alone that are not larger than `size`")
    skip_reencode: bool = Field(
        False,
        description="keep the original bytes where format, size, colours and orientation need no change",
    )
    format: Literal["jpg", "webp", "png"] = Field("jpg", description="encoding of the pictures kept")
    quality: int = Field(95, ge=1, le=100, description="quality of jpg and webp, 1 to 100")
    background: str = Field(
        "#ffffff", pattern="^#[0-9a-fA-F]{6}$", description="colour behind transparent pixels and borders"
    )
    min_side: int = Field(16, ge=0, description="a picture with a shorter side is dropped, in pixels")
    max_aspect: float | None = Field(
        5.0,
        ge=1,
        description="a picture whose long side is more than this many times its short one is dropped",
    )
    max_area: int | None = Field(None, ge=1, description="a picture of a larger area is dropped, in pixels")
    faces_col: str | None = Field(
        None,
        description="name of the column with boxes to blur: lists of [left, top, right, bottom], each a share (0 to 1) "
        "of the picture's width or height",
    )
    max_pixels: int = Field(
        64_000_000,
        ge=1,
        le=2 * 89_478_485,  # above it Pillow opens nothing
        description="a picture of more pixels is refused before its memory is taken",
    )
    phash: bool = Field(True, description="take a perceptual hash (PDQ) of every picture kept")

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background as three numbers, 0 to 255."""
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue


class IngestConfig(Config):
    """The whole stage: plan parts to raw shards."""

    fetch: FetchConfig = Field(FetchConfig(), description="how the web is asked")
    image: ImageConfig = Field(ImageConfig(), description="what becomes of a body")
    engine: Literal["native", "img2dataset"] = Field(
        "native", description="what fetches and resizes: native, or img2dataset's own downloader (extra `img2dataset`)"
    )
    workers: int | None = knob(None, "worker processes; one a core of the cluster by default", ge=1)
    decoders: int = knob(1, "processes that decode pictures for one worker", ge=1)
    decode_s: float = knob(30.0, "longest time for one picture in a decoder, in seconds", gt=0)
    decoder_bytes: int = knob(2 * 2**30, "memory one decoder may take for its data, in bytes", ge=256 * 2**20)
    shards_at_once: int = knob(
        2, "shards one worker has in hand; the second fills the gaps the first one's slow hosts leave", ge=1
    )
    buffer_bytes: int = knob(
        128 * 2**20,
        "bodies waiting to be decoded in one worker, in bytes; beyond it no request is sent",
        ge=1,
    )
    shard_deadline_s: float = knob(
        4 * 3600.0,  # twice what 10,000 rows take if each is tried three times for `total_s`, 256 at a time
        "longest time for one shard, in seconds; rows that are left then end as `not_attempted`, which "
        "`--retry-failed` takes up; 0 for no bound",
        ge=0,
    )
    failed_parts: int = knob(8, "parts that may fail one after another before the stage stops and says why", ge=1)
