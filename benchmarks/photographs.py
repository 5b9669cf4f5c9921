"""Real photographs to measure on, and a server of them over HTTP and HTTPS. Same seed, same bytes.

Crops of the photographs that come with scikit-image, of log-normal size around 800 pixels, JPEG of about 150 KB
in the mean, 30% progressive: much like what the web holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import ipaddress
import random
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import certifi
import numpy as np
import skimage
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

SOURCES = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg",
    "motorcycle_left.png", "motorcycle_right.png", "ihc.png",
)  # fmt: skip
SEED = 0
MEDIAN_SIDE_PX, SPREAD = 800, 0.35
PROGRESSIVE = 0.3
QUALITY = 87


def photographs(folder: Path, count: int) -> list[Path]:
    """Write `count` photographs into `folder`, those that are not there; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    there = Path(skimage.__file__).parent / "data"
    sources = [Image.open(there / name).convert("RGB") for name in SOURCES]
    paths = []
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        if not path.exists():
            path.write_bytes(_photograph(sources, random.Random(f"{SEED}/{number}")))
        paths.append(path)
    return paths


def _photograph(sources: list[Image.Image], rng: random.Random) -> bytes:
    source = rng.choice(sources)
    share = rng.uniform(0.5, 1.0)
    wide, high = int(source.width * share), int(source.height * rng.uniform(0.8, 1.0) * share)
    left, top = rng.randrange(source.width - wide + 1), rng.randrange(source.height - high + 1)
    shorter = max(300, min(2400, MEDIAN_SIDE_PX * float(np.exp(rng.gauss(0, SPREAD)))))
    scale = shorter / min(wide, high)
    size = (round(wide * scale), round(high * scale))
    picture = source.crop((left, top, left + wide, top + high)).resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, progressive=rng.random() < PROGRESSIVE)
    return buffer.getvalue()


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1; return it with its key, and a bundle of the system's size that trusts it."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    public = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain, bundle = folder / "server.pem", folder / "bundle.pem"
    chain.write_bytes(private + public)
    system = Path(ssl.get_default_verify_paths().cafile or certifi.where())
    bundle.write_bytes(system.read_bytes() + public)
    return chain, bundle


@contextlib.contextmanager
def served(folder: Path, chain: Path | None = None) -> Iterator[str]:
    """Serve a folder's files from a process of its own while the block runs; yields the base URL."""
    with serving([__file__, str(folder), *([str(chain)] if chain else [])]) as base:
        yield base


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[str]:
    """Run a Python script that prints its base URL and serves, while the block runs; yields the URL."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


async def _serve(folder: Path, chain: Path | None) -> None:
    bodies = {path.name: path.read_bytes() for path in folder.glob("*.jpg")}

    async def answer(request: web.Request) -> web.Response:
        body = bodies.get(request.match_info["name"])
        return web.Response(body=body, content_type="image/jpeg") if body else web.Response(status=404)

    application = web.Application()
    application.router.add_get("/{name}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    context = None
    if chain is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(chain)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context, backlog=1024)
    await site.start()
    port = runner.addresses[0][1]
    print(f"{'https' if chain else 'http'}://127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
