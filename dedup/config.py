"""What `pairmill dedup` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dedup.detail import ANY
from infra.config import Config, knob

Keep = Literal["resolution", "caption", "first", "source"]
Unit = Literal["image", "pair"]


class SemanticConfig(Config):
    """Which samples show the same thing by their embeddings."""

    embeddings: str | None = Field(
        None,
        description="folder or URL of what `pairmill embed` wrote of raw/ or final/, or one such parquet file; samples "
        "with close embeddings are found with it, and not without",
    )
    threshold: float = Field(0.95, ge=0, le=1, description="least cosine of two embeddings of one thing, 0 to 1")
    clusters: int = Field(0, ge=0, description="clusters of k-means; 0: the square root of the number of embeddings")
    neighbours: int = Field(
        6,
        ge=0,
        description="nearest clusters that an embedding is compared with, beside its own; more miss fewer pairs",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of k-means, and of who is drawn for `sheet`")
    block: int = knob(2048, "embeddings compared with as many others at a time", ge=1, le=65_536)
    scratch: str | None = knob(
        None,
        "folder of this machine, on a fast disk, where embeddings lie that memory is too small for: 2 bytes a number; "
        "by default memory holds them",
        min_length=1,
    )


class TextConfig(Config):
    """How many samples may have captions that say nearly the same."""

    cap: int = Field(
        0, ge=0, description="samples that stay of those whose captions say nearly the same, the best ones; 0: all"
    )
    similarity: float = Field(
        0.9,
        gt=0,
        le=1,
        description="least Jaccard similarity of the words, and pairs of words, of two such captions, estimated by "
        "MinHash; all digits are alike",
    )


class DecontaminateConfig(Config):
    """Which samples show a picture that models are measured on; they go, whatever else they are like."""

    suites: tuple[str, ...] = Field(
        (),
        description="folders or URLs of test pictures: CLIP_benchmark's webdatasets, or plain picture files, in "
        "folders below too",
    )
    distance: int = Field(
        31, ge=0, le=64, description="largest Hamming distance of a sample's hash and a test picture's, in bits"
    )
    confirm: bool = Field(
        True, description="compare the pictures themselves wherever hashes are close (see `confirm_difference`)"
    )
    embeddings: tuple[str, ...] = Field(
        (),
        description="for each of `suites`, in their order, the folder or file of what `pairmill embed` wrote of it; "
        "none: hashes alone tell",
    )
    corpus_embeddings: str | None = Field(
        None, description="the samples' embeddings by the same model; those of `semantic.embeddings` by default"
    )
    threshold: float = Field(
        0.95, ge=0, le=1, description="least cosine of a sample's embedding and a test picture's, 0 to 1"
    )

    @field_validator("suites")
    @classmethod
    def _without_slashes_at_the_end(cls, suites: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one.rstrip("/") or one for one in suites)

    @model_validator(mode="after")
    def _go_together(self) -> DecontaminateConfig:
        places = [one if "://" in one else Path(one).absolute() for one in self.suites]
        for number, place in enumerate(places):
            if place in places[:number]:
                raise ValueError(f"decontaminate.suites names '{self.suites[number]}' twice; name each suite once")
        if self.embeddings and len(self.embeddings) != len(self.suites):
            raise ValueError(
                f"decontaminate.embeddings are {len(self.embeddings)} for {len(self.suites)} suites; give one for "
                "each, in their order, or none"
            )
        return self


class DedupConfig(Config):
    """Which samples count as the same picture, and which of them stays.

    The defaults were chosen on 10,000 distinct pictures and copies of them (see `confirm.py`).
    """

    exact: bool = Field(True, description="find samples whose bodies are equal to the byte")
    perceptual: bool = Field(True, description="find samples whose perceptual hashes (PDQ) are close")
    distance: int = Field(
        31,
        ge=0,
        le=96,
        description="largest Hamming distance of two 256-bit hashes of one picture, in bits; beyond 31, which finds "
        "copies of other size, format and colour, it costs much: see the guide",
    )
    min_quality: int = Field(
        50,
        ge=0,
        le=100,
        description="hashes of a lower PDQ quality (flat pictures) are joined with nothing, 0 to 100",
    )
    confirm: bool = Field(
        True, description="compare the pictures themselves wherever hashes are close, before one is removed"
    )
    confirm_difference: float = Field(
        13.0,
        ge=0,
        le=255,
        description="largest difference of two 32x32 thumbnails where they differ most (mean of the worst "
        "1% of pixels, 0 to 255) that still is the same picture",
    )
    confirm_detail: float = Field(
        0.23,
        ge=0,
        le=ANY,
        description="most that may differ in the worst block of two pictures of 256 pixels a side, in shares of its "
        "contrast, that still are the same picture; other writing makes 0.2 to 0.8; 2: anything may differ",
    )
    keep: Keep = Field(
        "resolution",
        description="which sample of several stays: the one of highest original `resolution`, of longest "
        "`caption`, the `first` key, or that of the chosen `source`; ties go to the first three in that order",
    )
    unit: Unit = Field(
        "image",
        description="what makes a duplicate: the same `image`, whatever its caption, or the same `pair` of an image "
        "and a caption (but for case, spaces and the forms of characters)",
    )
    source_column: str | None = Field(
        None, description="passed-through column that says where a row comes from, for `keep` = `source`"
    )
    sources: tuple[str, ...] = Field(
        (), description="values of that column in the order of preference; all others come after them"
    )
    semantic: SemanticConfig = Field(SemanticConfig(), description="samples with close embeddings")
    sheet: int = knob(
        2000,
        "samples drawn and compared with all, so that the report can show pairs at the thresholds and just beyond "
        "them; 0: none",
        ge=0,
        le=100_000,
    )
    text: TextConfig = Field(TextConfig(), description="captions that say nearly the same under many pictures")
    decontaminate: DecontaminateConfig = Field(DecontaminateConfig(), description="samples that show a test picture")

    @model_validator(mode="after")
    def _go_together(self) -> DedupConfig:
        if (self.keep == "source") != bool(self.source_column and self.sources):
            raise ValueError("keep 'source' needs source_column and sources, and they need it; give all three or none")
        if self.unit == "pair" and self.semantic.embeddings:
            raise ValueError("semantic.embeddings tells images from images: give it with unit 'image' alone")
        if self.decontaminate.embeddings and not (self.decontaminate.corpus_embeddings or self.semantic.embeddings):
            raise ValueError(
                "decontaminate.embeddings are compared with those of the samples: give "
                "decontaminate.corpus_embeddings, or semantic.embeddings"
            )
        return self
