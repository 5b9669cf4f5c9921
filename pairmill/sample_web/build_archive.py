"""Builds `pairs.zip`, the archive of real image-text pairs behind the sample web.

Run `python -m pairmill.sample_web.build_archive` to make it anew. It needs `npm` (the packages are taken with
`npm pack`) and, for OpenMoji's vector drawings, the Python package `resvg-py`; nothing that uses the archive
needs either. The same package versions and the same Pillow give the same archive to the byte.

Inside the archive: `FAMILY/HEXCODE.webp` (RGBA), `pairs.jsonl` (one record an image, see `record`), and
`ATTRIBUTIONS.md`, which is also written beside the archive.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
LIMIT_BYTES = 12_000_000
UNSEEN_CONCEPTS = 100
UNSEEN_SEED = 20210105
GROUPS = {
    0: "smileys and emotion",
    1: "people and body",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
}  # 2 holds bare skin tones and hair, 9 the flags, which look alike in every family


class BuildError(Exception):
    """The archive cannot be built; the message is one line that says what to do."""


@dataclass(frozen=True)
class Family:
    """One emoji family: where its pictures lie in which package, and how they are stored."""

    name: str
    package: str
    version: str
    folder: str
    suffix: str
    licence: str
    side_px: int
    quality: int


# 64 px is all that the two bitmap packages hold. Qualities are about the highest that keep the archive within
# its limit; OpenMoji's flat colours are smaller without loss than with it.
FAMILIES = (
    Family("noto", "emoji-datasource-google", "16.0.0", "img/google/64", ".png", "Apache-2.0", 64, 88),
    Family("twemoji", "emoji-datasource-twitter", "16.0.0", "img/twitter/64", ".png", "CC-BY-4.0", 64, 88),
    Family("openmoji", "openmoji", "17.0.0", "color/svg", ".svg", "CC-BY-SA-4.0", 128, 85),
    Family("fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "assets", ".webp", "MIT", 128, 62),
)
NAMES_PACKAGE = ("emojibase-data", "17.0.0")


def main() -> int:
    """Builds the archive; returns the exit code (0 done, 1 failed)."""
    parser = argparse.ArgumentParser(description="Build the sample web's archive of image-text pairs.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for pairs.zip and ATTRIBUTIONS.md")
    parser.add_argument("--packages", type=Path, help="folder of .tgz files to use, and to keep those fetched")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            build(args.out, args.packages or Path(scratch))
    except BuildError as error:
        print(f"build_archive: {error}", file=sys.stderr)
        return 1
    return 0


def build(out: Path, packages: Path) -> None:
    """Writes `pairs.zip` and `ATTRIBUTIONS.md` into `out`, taking what is missing in `packages` from npm.

    Raises BuildError when a package cannot be had or the archive comes out above its limit.
    """
    names = base_emoji(pack(*NAMES_PACKAGE, packages))
    drawings = {family.name: read_drawings(family, packages) for family in FAMILIES}
    images = {
        family.name: {
            key: encode(family, drawing) for key, drawing in sorted(drawings[family.name].items()) if key in names
        }
        for family in FAMILIES
    }
    unseen = unseen_concepts(images)
    records = [
        record(family, key, names[key], unseen)
        for family in sorted(FAMILIES, key=lambda family: family.name)
        for key in images[family.name]
    ]

    attributions = (HERE / "attributions.template.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        count = sum(pair["family"] == family.name for pair in records)
        attributions = attributions.replace(
            f"{{{family.name}}}", f"{count} pictures, npm {family.package} {family.version}"
        )
    files = {f"{name}/{key}.webp": content for name, found in images.items() for key, content in found.items()}
    write_zip(out / "pairs.zip", records, files, attributions)
    (out / "ATTRIBUTIONS.md").write_text(attributions, encoding="utf-8")
    report(out / "pairs.zip", records)


def unseen_concepts(images: dict[str, dict[str, bytes]]) -> set[str]:
    """The concepts that training never sees, of those that every family draws, and like no other concept.

    Without the second condition a family that draws "family: man, boy" and "family: adult, child" alike would
    show training the very picture that it must not see.
    """
    candidates = set.intersection(*(set(found) for found in images.values()))
    for found in images.values():
        times = Counter(found.values())
        candidates -= {key for key, content in found.items() if times[content] > 1}
    return set(random.Random(UNSEEN_SEED).sample(sorted(candidates), UNSEEN_CONCEPTS))


def pack(package: str, version: str, packages: Path) -> Path:
    """The path of the package's .tgz in `packages`, fetched with `npm pack` if it is not there yet."""
    tarball = packages / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if tarball.exists():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise BuildError(f"npm is needed to fetch {package}; install it or put {tarball.name} into --packages")
    packages.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--silent", f"{package}@{version}"]
    done = subprocess.run(command, cwd=packages, capture_output=True, text=True, check=False)
    if done.returncode or not tarball.exists():
        raise BuildError(f"npm pack {package}@{version} failed: {' '.join(done.stderr.split())[-300:]}")
    return tarball


def base_emoji(tarball: Path) -> dict[str, dict[str, Any]]:
    """Names and tags by key, without flags, components, regional indicators and skin tones."""
    data = json.loads(dict(members(tarball, "package/en/", ".json"))["data"])
    found = {
        emoji_key(item["hexcode"]): item
        for item in data
        if item.get("group") in GROUPS and "flag" not in item["label"].split()
    }
    labels = [item["label"] for item in found.values()]
    if len(set(labels)) != len(labels):
        raise BuildError("two emoji carry one name; a class must have a name of its own")
    return found


def emoji_key(hexcode: str) -> str:
    """The code points in lower case, without FE0F: it asks for colour, and only some families write it."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_drawings(family: Family, packages: Path) -> dict[str, bytes]:
    """The family's image files by key, as its package holds them."""
    tarball = pack(family.package, family.version, packages)
    files = members(tarball, f"package/{family.folder}/", family.suffix)
    return {emoji_key(stem): content for stem, content in sorted(files)}


def members(tarball: Path, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yields (stem, content) of the files directly in `folder` whose names end with `suffix`."""
    wanted = re.compile(f"{re.escape(folder)}([^/]+){re.escape(suffix)}")
    with tarfile.open(tarball) as archive:
        for member in archive:
            match = wanted.fullmatch(member.name)
            content = archive.extractfile(member) if match else None
            if match and content:
                yield match[1], content.read()


def record(family: Family, key: str, emoji: dict[str, Any], unseen: set[str]) -> dict[str, Any]:
    """One line of `pairs.jsonl`. `unseen` marks the concepts that no family may show to training."""
    return {
        "path": f"{family.name}/{key}.webp",
        "family": family.name,
        "hexcode": key,
        "emoji": emoji["emoji"],
        "name": emoji["label"],
        "tags": sorted(set(emoji.get("tags", []))),
        "group": GROUPS[emoji["group"]],
        "license": family.licence,
        "unseen": key in unseen,
    }


def encode(family: Family, drawing: bytes) -> bytes:
    """The drawing as WebP with alpha: at the family's quality, or without loss where that is smaller."""
    image = rasterise(drawing, family.side_px) if family.suffix == ".svg" else Image.open(io.BytesIO(drawing))
    image = image.convert("RGBA")
    if max(image.size) > family.side_px:
        image.thumbnail((family.side_px, family.side_px), Image.Resampling.LANCZOS)
    lossy, lossless = io.BytesIO(), io.BytesIO()
    image.save(lossy, "WEBP", quality=family.quality, alpha_quality=family.quality, method=6)
    image.save(lossless, "WEBP", lossless=True, quality=90, method=4)
    return min(lossy.getvalue(), lossless.getvalue(), key=len)


def rasterise(drawing: bytes, side_px: int) -> Image.Image:
    """The vector drawing as a bitmap of `side_px` pixels a side."""
    try:
        render = importlib.import_module("resvg_py").svg_to_bytes
    except ImportError:
        raise BuildError("OpenMoji's drawings are SVG; pip install resvg-py to turn them into bitmaps") from None
    png = bytes(render(svg_string=drawing.decode(), width=side_px, height=side_px))
    return Image.open(io.BytesIO(png))


def write_zip(path: Path, records: list[dict[str, Any]], images: dict[str, bytes], attributions: str) -> None:
    """Writes the archive, every time the same: images stored (they are small already), texts deflated."""
    lines = "".join(json.dumps(pair, ensure_ascii=False, sort_keys=True) + "\n" for pair in records)
    texts = {"ATTRIBUTIONS.md": attributions, "pairs.jsonl": lines}
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for name, text in sorted(texts.items()):
            archive.writestr(zip_entry(name, zipfile.ZIP_DEFLATED), text.encode(), compresslevel=9)
        for name, content in sorted(images.items()):
            archive.writestr(zip_entry(name, zipfile.ZIP_STORED), content)
    if partial.stat().st_size > LIMIT_BYTES:
        raise BuildError(f"{partial} has {partial.stat().st_size} bytes, the limit is {LIMIT_BYTES}; lower a quality")
    partial.replace(path)


def zip_entry(name: str, compression: int) -> zipfile.ZipInfo:
    """An entry with the earliest time a zip can hold and plain permissions."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = compression
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry


def report(path: Path, records: list[dict[str, Any]]) -> None:
    """Prints what the archive holds."""
    print(f"{path.name}: {path.stat().st_size:,} bytes, {len(records)} pictures")
    for family in FAMILIES:
        mine = [pair for pair in records if pair["family"] == family.name]
        unseen = sum(pair["unseen"] for pair in mine)
        print(f"  {family.name}: {len(mine)} pictures, {unseen} of unseen concepts")


if __name__ == "__main__":
    sys.exit(main())
