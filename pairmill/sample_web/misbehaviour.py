"""The catalogue of what the sample web does wrong, or rarely, and what a pipeline should make of each."""

from __future__ import annotations

from dataclasses import dataclass

SUCCESS = "success"
DOWNLOAD = "failed_to_download"
RESIZE = "failed_to_resize"
FILTERED = "filtered"


@dataclass(frozen=True)
class Misbehaviour:
    """One way in which a URL misbehaves.

    `status` and `reason` are what the pipeline's sidecar should say; None where several answers are right.
    `rows` is how many rows of it a full URL list has. `elsewhere` is a URL for the kinds that no server can
    act out; it may hold `{host}` (the bare host of the sample web) and `{key}`.
    """

    kind: str
    meaning: str
    status: str | None
    reason: str | None
    rows: int = 8
    extension: str = "jpg"
    elsewhere: str = ""

    @property
    def succeeds(self) -> bool:
        """Whether a patient client ends with a sound picture."""
        return self.status == SUCCESS


CATALOGUE: tuple[Misbehaviour, ...] = (
    # Answers that are not a picture.
    Misbehaviour("not_found", "404", DOWNLOAD, "http_status", rows=40),
    Misbehaviour("gone", "410", DOWNLOAD, "http_status", rows=16),
    Misbehaviour("unavailable", "503, always", DOWNLOAD, "http_status"),
    Misbehaviour("error_once", "500 the first time, then 200", SUCCESS, "", rows=16),
    Misbehaviour("too_many_requests", "429 with Retry-After, then 200", SUCCESS, ""),
    Misbehaviour("html", "an HTML page with status 200 under .jpg", RESIZE, "not_an_image", rows=16),
    # Time.
    Misbehaviour("hang", "accepts the request and never answers", DOWNLOAD, "timeout", rows=3),
    Misbehaviour("drip", "one byte a second", DOWNLOAD, None, rows=3),
    # Framing.
    Misbehaviour("cut_short", "closes before the announced length", DOWNLOAD, "truncated_body"),
    Misbehaviour("chunks_cut_short", "closes before the last chunk", DOWNLOAD, "truncated_body"),
    # Some clients keep the announced half, others refuse the whole answer.
    Misbehaviour("longer_than_announced", "announces half of the picture, sends all", None, None),
    Misbehaviour("never_ending", "a body without end", DOWNLOAD, "too_large", rows=3),
    Misbehaviour("gzip_bomb", "300 KB of gzip that hold 256 MB", DOWNLOAD, "too_large", rows=3),
    Misbehaviour("reset", "resets the connection", DOWNLOAD, "connection_reset"),
    # Redirects.
    Misbehaviour("redirect", "to a good picture on the same host", SUCCESS, "", rows=16),
    Misbehaviour("redirect_other_host", "to a good picture on the next host", SUCCESS, "", rows=16),
    Misbehaviour("redirect_loop", "to itself, for ever", DOWNLOAD, "too_many_redirects"),
    # Wishes of the site.
    Misbehaviour("noai", "X-Robots-Tag: noai", FILTERED, "opt_out", rows=16),
    Misbehaviour("noimageai", "X-Robots-Tag: noimageai", FILTERED, "opt_out"),
    Misbehaviour("private", "in a folder that robots.txt disallows", FILTERED, "robots_txt", rows=16),
    # Names and addresses: no server answers these.
    Misbehaviour(
        "refused",
        "a port where nobody listens",
        DOWNLOAD,
        "connect",
        4,
        elsewhere="http://{host}:9/{key}.jpg",
    ),
    Misbehaviour("unknown_host", "no such name", DOWNLOAD, "dns", 4, elsewhere="http://pictures.invalid/{key}.jpg"),
    Misbehaviour("bad_url", "no host in the URL", None, "bad_url", 4, elsewhere="http:///{key}.jpg"),
    # Images of every kind.
    Misbehaviour("wrong_type", "a right JPEG called text/plain", SUCCESS, ""),
    Misbehaviour("progressive", "progressive JPEG", SUCCESS, ""),
    Misbehaviour("cmyk", "CMYK JPEG", SUCCESS, ""),
    Misbehaviour("grey", "JPEG of one channel", SUCCESS, ""),
    Misbehaviour("png_16_bit", "PNG of 16 bits a channel", SUCCESS, "", extension="png"),
    Misbehaviour("palette_alpha", "PNG with a palette that has alpha", SUCCESS, "", extension="png"),
    Misbehaviour("animated_gif", "GIF of three frames", SUCCESS, "", extension="gif"),
    Misbehaviour("webp", "WebP with alpha", SUCCESS, "", extension="webp"),
    Misbehaviour("avif", "AVIF", SUCCESS, "", extension="avif"),
    Misbehaviour("exif_rotated", "JPEG stored turned, upright by its EXIF orientation", SUCCESS, ""),
    Misbehaviour("icc_profile", "JPEG in Adobe RGB colours", SUCCESS, ""),
    Misbehaviour("truncated_image", "a JPEG file that ends too early", RESIZE, "decode_error"),
    Misbehaviour("zero_bytes", "an empty body with status 200", RESIZE, "not_an_image"),
    Misbehaviour("svg", "a vector drawing", RESIZE, "not_an_image", extension="svg"),
    Misbehaviour("header_bomb", "a PNG header of 60,000 x 60,000 pixels", RESIZE, "too_many_pixels", 4, "png"),
    Misbehaviour("too_small", "8 x 8 pixels", FILTERED, "too_small", extension="png"),
    Misbehaviour("wide_banner", "640 x 64 pixels", FILTERED, "aspect"),
)

BY_KIND = {misbehaviour.kind: misbehaviour for misbehaviour in CATALOGUE}


def path(kind: str, key: str) -> str:
    """The path under which the server acts the kind out on a picture. Raises KeyError for an unknown kind."""
    folder = "/private" if kind == "private" else f"/m/{kind}"
    return f"{folder}/{key}.{BY_KIND[kind].extension}"


def url(kind: str, key: str, base_url: str) -> str:
    """The whole URL; `base_url` is like `http://127.0.0.1:8080`. Raises KeyError for an unknown kind."""
    host = base_url.partition("://")[2].rpartition(":")[0]
    elsewhere = BY_KIND[kind].elsewhere.format(host=host, key=key)
    return elsewhere or base_url + path(kind, key)
