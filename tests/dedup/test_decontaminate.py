"""Test pictures planted in a corpus: found by body, hash and embedding, gone before all else, and nothing else goes."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedup import decontaminate, matches
from dedup.config import DecontaminateConfig, DedupConfig
from dedup.overlap import report_overlap
from dedup.run import dedup
from dedup.signature import SignatureWriter
from dedup.takedown import remove
from infra.cluster import session
from infra.errors import UserError
from infra.storage import Folder
from pairmill.cli import main
from pairmill.report import build
from shards.layout import DEDUP, FINAL, RAW, REMOVED, sample_key
from shards.manifest import Manifest
from shards.repack import RepackConfig, repack
from shards.suite import NSHARDS, pictures
from shards.tar import END, header, padded
from shards.writer import committed
from tests.dedup.corpora import LOCAL, Row, encoded, picture, removed, row_of, write_corpus

FOX, PIG, BEAR, CAT = "noto-1f98a", "noto-1f437", "noto-1f43b", "noto-1f431"


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One local Ray for all tests here: the stage uses the connection it finds."""
    with session(LOCAL):
        yield


def write_files(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def write_tars(folder: Path, *tars: dict[str, bytes]) -> str:
    """A suite as CLIP_benchmark lays it out."""
    suite = Folder(folder)
    for number, members in enumerate(tars):
        with suite.create(f"test/{number}.tar") as tar:
            for name, data in members.items():
                tar.write(header(name, len(data)) + data + bytes(padded(len(data)) - len(data)))
            tar.write(END)
    suite.write(NSHARDS, f"{len(tars)}\n".encode())
    return suite.url


def write_embeddings(file: Path, keys: Sequence[str], vectors: Any, **columns: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": list(keys), "embedding": np.asarray(vectors, np.float32).tolist()}), file)
    return str(file)


def asked(*suites: str, **more: Any) -> DedupConfig:
    outer = {name: more.pop(name) for name in list(more) if name not in DecontaminateConfig.model_fields}
    return DedupConfig(decontaminate=DecontaminateConfig(suites=suites, **more), **outer)


def planted() -> list[Row]:
    """A fox in four encodings and sizes, the best of them larger; a pig twice; a bear; a cat."""
    fox, pig = picture(FOX), picture(PIG)
    return [
        row_of(encoded(picture(FOX, 192), "JPEG", quality=85), "fox, larger"),
        row_of(encoded(fox, "JPEG", quality=50), "fox"),
        row_of(encoded(fox.resize((96, 96)), "WEBP", quality=70), "fox, smaller"),
        row_of(encoded(fox), "fox, the same bytes"),
        row_of(encoded(pig), "pig"),
        row_of(encoded(pig, "JPEG", quality=70), "pig, again"),
        row_of(encoded(picture(BEAR)), "bear"),
        row_of(encoded(picture(CAT)), "cat"),
    ]


def test_every_copy_of_a_test_picture_goes_and_nothing_else(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    cat = {"s1.webp": encoded(picture(CAT), "WEBP")}
    animals = write_tars(tmp_path / "animals", {"s0.png": encoded(picture(FOX)), "s0.cls": b"0"}, cat)
    files = {"dogs/one.JPG": encoded(picture("noto-1f436"), "JPEG"), "._one.jpg": b"", "read me.txt": b""}
    totals = dedup(corpus, asked(animals, write_files(tmp_path / "plain", files)), LOCAL)
    gone = removed(corpus)
    shown = {key: (row["test_set"], row["test_image"]) for key, row in gone.items() if row["method"] == "test_image"}
    foxes = [sample_key(0, 0), sample_key(0, 1), sample_key(0, 2), sample_key(1, 0)]
    assert shown == dict.fromkeys(foxes, (animals, "s0")) | {sample_key(2, 1): (animals, "s1")}
    assert all(gone[key]["kept_key"] is None and gone[key]["cosine"] is None for key in shown)
    assert gone[sample_key(1, 0)]["distance"] == 0
    assert all(gone[key]["distance"] <= 31 for key in shown)
    assert gone.keys() - shown.keys() == {sample_key(1, 1)}  # the pig's copy, as ever
    assert list(gone) == sorted(gone)
    assert totals["by_reason"] == {"duplicate_perceptual": 1, "test_image": 5}
    assert totals["rows_in"] == 8 == totals["kept"] + totals["removed"]
    first, second = totals["test_sets"]
    assert first == {
        "suite": animals, "pictures": 2, "broken": 0, "unhashed": 0, "with_copy": 2, "with_copy_by_hash": 2,
        "with_copy_by_embedding": 0, "samples": 5, "samples_by_hash": 5, "samples_by_embedding": 0,
    }  # fmt: skip
    assert (second["pictures"], second["with_copy"], second["samples"]) == (1, 0, 0)


def test_final_shards_hold_no_test_picture_and_the_sums_hold(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    suite = write_files(tmp_path / "suite", {"fox.png": encoded(picture(FOX))})
    dedup(corpus, asked(suite), LOCAL)
    totals = repack(corpus, RepackConfig(samples_per_shard=4), LOCAL)
    assert totals["by_reason"] == {"duplicate_perceptual": 1, "test_image": 4}
    captions = [
        caption
        for shard in committed(Folder(corpus) / FINAL)
        for caption in pq.read_table(tmp_path / "corpus" / FINAL / f"{shard}.parquet")["caption"].to_pylist()
    ]
    assert sorted(captions) == ["bear", "cat", "pig, again"]


def test_the_next_best_copy_stays_where_the_best_has_a_test_pictures_bytes(tmp_path: Path) -> None:
    rows = [row_of(encoded(picture(FOX, side), "JPEG", quality=60)) for side in (192, 160, 128)]
    assert len({row["phash"] for row in rows}) == 3
    suite = write_files(tmp_path / "suite", {"fox.jpg": rows[0]["image"]})
    corpus = write_corpus(tmp_path / "corpus", rows, 2)
    dedup(corpus, asked(suite, distance=0).model_copy(update={"confirm": False}), LOCAL)
    gone = {key: (row["method"], row["kept_key"]) for key, row in removed(corpus).items()}
    assert gone == {sample_key(0, 0): ("test_image", None), sample_key(1, 0): ("perceptual", sample_key(0, 1))}


def test_the_next_best_copy_stays_where_the_best_shows_a_test_picture(tmp_path: Path) -> None:
    """By embeddings: A shows the test picture, B and C are its copies by look alone, and B is kept for C."""
    rows = [row_of(encoded(picture(FOX, side)), f"fox {side}") for side in (192, 160, 128)]
    corpus = write_corpus(tmp_path / "corpus", rows, 2)
    keys = [sample_key(0, 0), sample_key(0, 1), sample_key(1, 0)]
    of_corpus = write_embeddings(tmp_path / "e" / "corpus.parquet", keys, [[1, 0], [0, 1], [0, 1]])
    suite = write_files(tmp_path / "suite", {"pig.png": encoded(picture(PIG))})
    of_suite = write_embeddings(tmp_path / "s" / "suite.parquet", ["pig.png"], [[2, 0.1]])
    config = asked(suite, embeddings=(of_suite,), corpus_embeddings=of_corpus)
    totals = dedup(corpus, config, LOCAL)
    gone = removed(corpus)
    first = gone.pop(keys[0])
    assert (first["method"], first["test_image"], first["kept_key"]) == ("test_image", "pig.png", None)
    assert first["cosine"] == pytest.approx(0.99875, abs=1e-3)
    assert {key: row["kept_key"] for key, row in gone.items()} == {keys[2]: keys[1]}
    assert totals["test_sets"][0]["samples_by_embedding"] == 1
    assert totals["test_sets"][0]["samples_by_hash"] == 0


def test_a_byte_copy_of_what_was_found_by_its_embedding_goes_for_nobody_that_goes(tmp_path: Path) -> None:
    """The copy has no embedding, so it is not found itself; its double goes, so that it has to stay."""
    rows = [row_of(encoded(picture(FOX)), caption) for caption in ("fox", "the same bytes")]
    corpus = write_corpus(tmp_path / "corpus", rows, 2)
    keys = [sample_key(0, 0), sample_key(0, 1)]
    of_corpus = write_embeddings(tmp_path / "e" / "corpus.parquet", keys[:1], [[1, 0]])
    suite = write_files(tmp_path / "suite", {"pig.png": encoded(picture(PIG))})
    of_suite = write_embeddings(tmp_path / "s" / "suite.parquet", ["pig.png"], [[1, 0]])
    config = asked(suite, embeddings=(of_suite,), corpus_embeddings=of_corpus, keep="first")
    totals = dedup(corpus, config, LOCAL)
    assert {key: row["method"] for key, row in removed(corpus).items()} == {keys[0]: "test_image"}
    assert totals["kept"] == 1


def test_the_cap_on_captions_counts_no_sample_that_has_gone(tmp_path: Path) -> None:
    rows = [row_of(encoded(picture(key, side)), "a picture to buy") for key, side in ((FOX, 192), (PIG, 128))]
    suite = write_files(tmp_path / "suite", {"fox.png": encoded(picture(FOX))})
    corpus = write_corpus(tmp_path / "corpus", rows, 2)
    dedup(corpus, asked(suite, text={"cap": 1}), LOCAL)
    assert {key: row["method"] for key, row in removed(corpus).items()} == {sample_key(0, 0): "test_image"}


def test_flat_pictures_match_by_their_bytes_alone(tmp_path: Path) -> None:
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("#888888", "#898989")]
    corpus = write_corpus(tmp_path / "corpus", [row_of(encoded(image)) for image in flat], 8)
    files = {"grey.png": encoded(flat[1]), "light.png": encoded(Image.new("RGB", (64, 64), "#eeeeee")), "torn.png": b""}
    suite = write_files(tmp_path / "suite", files | {"fox.png": encoded(picture(FOX))})
    (told,) = dedup(corpus, asked(suite), LOCAL)["test_sets"]
    assert list(removed(corpus)) == [sample_key(0, 1)]
    assert (told["pictures"], told["broken"], told["unhashed"], told["with_copy"]) == (4, 1, 2, 1)
    assert report_overlap(corpus, asked(suite, min_quality=0), LOCAL)["test_sets"][0]["unhashed"] == 0


def test_the_second_look_keeps_what_only_hashes_alike(tmp_path: Path) -> None:
    """Two hearts of one shape and other colours."""
    corpus = write_corpus(tmp_path / "corpus", [row_of(encoded(picture("noto-1f49b")))], 8)
    suite = write_files(tmp_path / "suite", {"heart.png": encoded(picture("noto-1f9e1"))})
    told = [
        report_overlap(corpus, asked(suite, confirm=confirm, min_quality=0), LOCAL)["test_sets"][0]["samples"]
        for confirm in (True, False)
    ]
    assert told == [0, 1]


@pytest.mark.parametrize("resize", ["center_crop", "border"])
def test_a_test_picture_is_framed_as_ingest_frames(tmp_path: Path, resize: str) -> None:
    """A wide picture with a clear ground: the corpus has its middle square, or it on a square, on black."""
    wide = Image.new("RGBA", (256, 128), (0, 0, 0, 0))
    for left, key in ((0, BEAR), (64, FOX), (128, PIG)):
        wide.paste(picture(key), (left, 0))
    seen = Image.new("RGB", wide.size, "#000000")
    seen.paste(wide, mask=wide.getchannel("A"))
    framed = seen.crop((64, 0, 192, 128))
    if resize == "border":
        framed = Image.new("RGB", (256, 256), "#000000")
        framed.paste(seen, (0, 64))
    corpus = write_corpus(tmp_path / "corpus", [row_of(encoded(framed, "JPEG", quality=90))], 8)
    manifest = Folder(corpus).read_json("corpus.json")
    manifest["stages"]["raw"]["config"] = {"image": {"resize": resize, "background": "#000000"}}
    Folder(corpus).write_json("corpus.json", manifest)
    suite = write_files(tmp_path / "suite", {"wide.png": encoded(wide)})
    assert dedup(corpus, asked(suite), LOCAL)["by_reason"] == {"test_image": 1}


def test_an_upright_picture_is_compared_whatever_its_orientation_tag(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(FOX).rotate(90), "JPEG", exif=exif)
    corpus = write_corpus(tmp_path / "corpus", [row_of(encoded(picture(FOX)))], 8)
    suite = write_files(tmp_path / "suite", {"fox.jpg": turned})
    assert dedup(corpus, asked(suite), LOCAL)["removed"] == 1


def test_a_broken_test_picture_is_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fox = encoded(picture(FOX))
    files = {"a.png": fox[:80], "b/c.jpg": b"<html>", "fox.png": fox}
    tars = write_tars(tmp_path / "tars", {"x.png": fox[:-900], "y.cls": b"1", "z.png": fox})
    write_files(tmp_path / "files", files)
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    with caplog.at_level(logging.WARNING):
        totals = dedup(corpus, asked(str(tmp_path / "files"), tars), LOCAL)
    assert [(one["pictures"], one["broken"], one["with_copy"]) for one in totals["test_sets"]] == [(3, 2, 1), (3, 2, 1)]
    for name in ("files: a.png", "files: b/c.jpg", "tars: x", "tars: y"):
        assert f"{name} is no sound picture" in caplog.text
    assert "its sample has none" in caplog.text
    assert "BytesIO" not in caplog.text


def test_a_suite_that_is_none_is_said_before_anything_is_done(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    (tmp_path / "empty").mkdir()
    fox = encoded(picture(FOX))
    whole = write_tars(tmp_path / "whole", {"fox.png": fox})
    climbs = Path(write_tars(tmp_path / "climbs", {"fox.png": fox}))
    tar = (climbs / "test" / "0.tar").read_bytes()
    (climbs / "test" / "0.tar").write_bytes(header_of("../fox.png", len(fox)) + tar[512:])
    lost = Path(write_tars(tmp_path / "lost", {"fox.png": fox}))
    (lost / NSHARDS).write_text("2")
    broken = Path(write_files(tmp_path / "broken", {"a.png": b"no picture", "b.jpg": b""}))
    for suite, words in (
        (tmp_path / "nowhere", "nowhere: no such suite folder; give one"),
        (tmp_path / "empty", "empty: holds no pictures; give a folder"),
        (Path(whole) / "test", "holds no pictures.*which the folder above has"),
        (climbs, "0.tar: not a sound tar.*leaves its folder"),
        (lost, "1.tar: missing; test/nshards.txt counts it"),
        (broken, "broken: none of its 2 pictures can be decoded"),
    ):
        for run in (dedup, report_overlap):
            with pytest.raises(UserError, match=words):
                run(corpus, asked(str(suite)), LOCAL)
        if suite != broken:  # which only decoding tells
            assert not (tmp_path / "corpus" / DEDUP).exists()
            assert "dedup" not in Folder(corpus).read_json("corpus.json")["stages"]


def test_a_mistake_in_a_suite_is_told_before_raw_is_read(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    for sidecar in (tmp_path / "corpus" / RAW).glob("*.parquet"):
        sidecar.write_bytes(b"not read")
    for run in (dedup, report_overlap):
        with pytest.raises(UserError, match="no such suite folder"):
            run(corpus, asked(str(tmp_path / "nowhere")), LOCAL)


def test_a_slash_at_the_end_makes_no_other_suite(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    suite = write_files(tmp_path / "suite", {"fox.png": encoded(picture(FOX))})
    totals = dedup(corpus, asked(f"{suite}/"), LOCAL)
    assert totals["test_sets"][0]["suite"] == suite
    assert dedup(corpus, asked(suite), LOCAL) == totals


def header_of(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def test_folders_that_link_to_each_other_are_gone_through_once(tmp_path: Path) -> None:
    suite = Path(write_files(tmp_path / "suite", {"a/fox.png": encoded(picture(FOX))}))
    for name in ("one", "two"):
        (suite / "a" / name).symlink_to(suite)
    assert [one.key for one in pictures(Folder(suite))] == ["a/fox.png"]


def test_embeddings_of_suites_are_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted()[:2], 3)
    suite = write_files(tmp_path / "suite", {"fox.png": encoded(picture(FOX)), "pig.png": encoded(picture(PIG))})
    of_corpus = write_embeddings(tmp_path / "c" / "e.parquet", [sample_key(0, 0), sample_key(0, 1)], [[1, 0], [0, 1]])
    keys = ["fox.png", "pig.png"]
    for name, rows, vectors, words in (
        ("wide", keys, [[1, 0, 0], [0, 1, 0]], "embeddings of 3 numbers, those of the corpus have 2; embed both"),
        ("nan", keys, [[1, 0], [np.nan, 1]], "the embedding of pig.png is not finite"),
        ("strange", ["a", "b"], [[1, 0], [0, 1]], f"no embedding of any of the 2 pictures of {suite}; embed {suite}"),
    ):
        of_suite = write_embeddings(tmp_path / name / "e.parquet", rows, vectors)
        with pytest.raises(UserError, match=words):
            report_overlap(corpus, asked(suite, embeddings=(of_suite,), corpus_embeddings=of_corpus), LOCAL)
    half = write_embeddings(tmp_path / "half" / "e.parquet", ["pig.png"], [[0, 1]])
    with caplog.at_level(logging.WARNING):
        told = report_overlap(corpus, asked(suite, embeddings=(half,), corpus_embeddings=of_corpus), LOCAL)
    assert "1 of 2 pictures of" in caplog.text
    assert told["test_sets"][0]["with_copy_by_embedding"] == 1
    for path, weights in ((half, "a" * 16), (of_corpus, "b" * 16)):
        (Path(path).parent / "embeddings.json").write_text(json.dumps({"weights_sha256": weights}))
    with pytest.raises(UserError, match=r"by the model aaaaaaaaaaaaaaaa, those at .* embed both with one"):
        report_overlap(corpus, asked(suite, embeddings=(half,), corpus_embeddings=of_corpus), LOCAL)


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for options, words in (
        (
            {"suites": ("a", "b"), "embeddings": ("e",), "corpus_embeddings": "c"},
            "are 1 for 2 suites; give one for each",
        ),
        ({"suites": ("a",), "embeddings": ("e",)}, "give decontaminate.corpus_embeddings, or semantic.embeddings"),
        ({"suites": ("a", "a/")}, "names 'a' twice; name each suite once"),
        ({"suites": ("a", "b", "./b")}, r"names '\./b' twice"),
        ({"suites": ("s3://a/b/", "s3://a/b")}, "names 's3://a/b' twice"),
    ):
        with pytest.raises(ValueError, match=words):
            DedupConfig(decontaminate=options)


def test_a_stage_that_is_done_takes_no_other_suites_and_one_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    suite = write_files(tmp_path / "suite", {"fox.png": encoded(picture(FOX))})
    whole = write_corpus(tmp_path / "whole", planted(), 3)
    totals = dedup(whole, asked(suite), LOCAL)
    corpus = write_corpus(tmp_path / "parts", planted(), 3)
    Manifest.existing(Folder(corpus)).begin(DEDUP, asked(suite))
    SignatureWriter(corpus).run(committed(Folder(corpus) / RAW)[0])
    assert dedup(corpus, asked(suite), LOCAL) == totals
    assert (Folder(corpus) / DEDUP).read(REMOVED) == (Folder(whole) / DEDUP).read(REMOVED)
    with pytest.raises(UserError, match=r"decontaminate\.suites"):
        dedup(corpus, DedupConfig(), LOCAL)


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_report_only_writes_nothing_at_any_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    suite = write_files(
        tmp_path / "suite", {"fox.png": encoded(picture(FOX)), "dog.png": encoded(picture("noto-1f436"))}
    )
    table = {"suite": suite, "pictures": 2, "broken": 0, "with_copy": 1, "samples": 4}

    def run(*options: str, code: int = 0) -> None:
        with pytest.raises(SystemExit) as end:
            main(["dedup", corpus, *options])
        assert end.value.code == code

    def told() -> dict[str, Any]:
        before = files_of(tmp_path / "corpus")
        run("--decontaminate.suites", suite, "--report-only", "--json")
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert files_of(tmp_path / "corpus") == before
        (one,) = found["test_sets"]
        assert table.items() <= one.items()
        return found

    assert "left" not in told()
    dedup(corpus, DedupConfig(), LOCAL)
    one = told()["test_sets"][0]
    assert (one["with_copy_left"], one["samples_left"]) == (1, 1)
    repack(corpus, RepackConfig(), LOCAL)
    told()
    shutil.rmtree(tmp_path / "corpus" / RAW)
    table["samples"] = 1
    assert told()["samples"] == 4
    run("--decontaminate.suites", suite, "--report-only")
    assert "50.00%" in capsys.readouterr().out
    (tmp_path / "suite" / "torn.png").write_bytes(b"")
    run("--decontaminate.suites", suite, "--report-only")
    assert "50.00%" in capsys.readouterr().out  # of those that are sound
    run(*("--decontaminate.suites", suite, "--decontaminate.suites", f"{suite}/"), "--report-only", code=2)
    assert "twice; name each suite once" in capsys.readouterr().err
    run("--report-only", code=2)
    assert "--decontaminate.suites" in capsys.readouterr().err


def test_a_take_down_of_what_shows_a_test_picture_keeps_the_sums(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    suite = write_files(tmp_path / "suite", {"fox.png": encoded(picture(FOX))})
    dedup(corpus, asked(suite), LOCAL)
    (tmp_path / "list").write_text(f"key {sample_key(0, 1)}\nkey {sample_key(2, 0)}\n")
    assert remove(corpus, str(tmp_path / "list"), LOCAL)["samples"] == 2
    totals = Manifest.existing(Folder(corpus)).totals(DEDUP)
    assert totals["by_reason"] == {"duplicate_perceptual": 1, "test_image": 3}
    assert totals["rows_in"] == 6 == totals["kept"] + totals["removed"]
    assert removed(corpus).keys() == {sample_key(0, 0), sample_key(0, 2), sample_key(1, 0), sample_key(1, 1)}
    assert repack(corpus, RepackConfig(), LOCAL)["by_reason"] == totals["by_reason"]


def test_a_list_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Without the two columns, and `kept_key` null nowhere."""
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    dedup(corpus, DedupConfig(), LOCAL)
    place = Folder(corpus) / DEDUP
    table = pq.read_table(io.BytesIO(place.read(REMOVED))).drop_columns(["test_set", "test_image"])
    table = table.cast(table.schema.set(1, table.schema.field("kept_key").with_nullable(False)))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    place.write(REMOVED, buffer.getvalue())
    page = Path(build(corpus, None, str(tmp_path / "report.html"))).read_text()
    assert "were left out for" in page
    assert repack(corpus, RepackConfig(), LOCAL)["by_reason"] == {"duplicate_perceptual": 4}
    (tmp_path / "list").write_text(f"key {sample_key(0, 0)}\n")
    assert remove(corpus, str(tmp_path / "list"), LOCAL)["samples"] == 4


def test_the_report_shows_the_overlap(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    hostile = "<script>alert(1)</script>"
    suite = write_files(tmp_path / hostile.replace("/", "-"), {"fox.png": encoded(picture(FOX))})
    dedup(corpus, asked(suite), LOCAL)
    page = Path(build(corpus, None, str(tmp_path / "report.html"))).read_text()
    assert "Test pictures" in page
    assert "100%" in page
    assert "<script" not in page
    assert "shows a picture that models are measured on" in page


def test_blocks_and_parts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus", planted(), 3)
    suite = write_files(tmp_path / "suite", {f"{at}.png": encoded(picture(FOX, 120 + at)) for at in range(5)})
    keys = [sample_key(shard, row) for shard in range(3) for row in range(3)][:8]
    vectors = np.random.default_rng(0).normal(size=(13, 3))
    of_corpus = write_embeddings(tmp_path / "c.parquet", keys, vectors[:8])
    of_suite = write_embeddings(tmp_path / "s.parquet", [f"{at}.png" for at in range(5)], vectors[8:])
    config = asked(suite, embeddings=(of_suite,), corpus_embeddings=of_corpus, threshold=0.5)
    whole = report_overlap(corpus, config, LOCAL)
    for name in ("_HASHES_AT_ONCE", "_DIGESTS_AT_ONCE", "_LOOKS_AT_ONCE", "_EMBEDDINGS_AT_ONCE"):
        monkeypatch.setattr(decontaminate, name, 3)
    monkeypatch.setattr(matches, "_FEWEST_HELD", 2)
    assert report_overlap(corpus, config, LOCAL) == whole
    assert whole["test_sets"][0]["samples_by_embedding"] > 0
