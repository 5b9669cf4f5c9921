"""A training run's configuration, read from RUN.toml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from infra.config import Config, knob
from shards.cache import CACHE_BYTES
from train.augment import AugmentConfig
from train.length import Length, RunLength
from train.model import ModelConfig
from train.optim import OptimConfig
from train.parallel import ParallelConfig
from train.tokenizer import TokenizerConfig


class DataConfig(Config):
    """What is trained on, and how it becomes batches."""

    folder: str = Field(default="", description="shard folder, any fsspec URL")
    global_batch_size: int = Field(default=256, ge=2, description="samples of a step, over all ranks")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the order, of crops and colours, and of the first weights"
    )
    image_size: int = Field(default=64, ge=8, description="side of the pictures trained on, pixels")
    early_image_size: int = Field(
        default=0, ge=0, description="a smaller side for the first part of the run, pixels; 0: none"
    )
    early_share: float = Field(default=0.5, ge=0, le=1, description="share of the run that `early_image_size` is for")
    shuffle_captions: bool = Field(
        default=False,
        description="control experiment: every picture gets the caption of another, so nothing is learned",
    )
    caption_limit: int = Field(default=1_000_000, ge=1, description="captions read to train a vocabulary")
    cache_bytes: int = knob(256 * 2**20, "decoded pictures kept in memory on each rank, bytes", ge=0)
    stream_cache: str = knob(
        "", "local folder that keeps what was read of `folder`, for all ranks of a node; empty: none"
    )
    stream_cache_bytes: int = knob(CACHE_BYTES, "bound of that folder, bytes", ge=0)
    decoder: Literal["pillow", "turbo"] = Field(
        default="pillow",
        description="what decodes and resizes: Pillow (bicubic), or libjpeg-turbo and OpenCV where a picture is a "
        "plain JPEG, in a third of the time",
    )
    pad_to: Literal["longest", "context"] = knob(
        "longest",
        "length of a batch's texts: its longest one, which saves arithmetic and changes no feature, or the whole "
        "context, which compiled blocks prefer",
    )
    workers: int = knob(0, "loader processes of each rank; 0: `threads` in the rank's own process", ge=0)
    threads: int = knob(2, "threads that decode and crop, on each rank without loader processes", ge=1)
    prefetch: int = knob(3, "batches prepared ahead, on each rank", ge=1)


class ObjectiveConfig(Config):
    """What is minimised."""

    name: str = Field(default="clip", description="objective, by name")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="target weight spread evenly over a row's pairs; clip, captioning"
    )
    same_text: Literal["negative", "positive"] = Field(
        default="negative",
        description="pictures of one caption in a batch: negatives, as in CLIP, or positives "
        "(clip, captioning: they share the target)",
    )
    image_weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="weight of finding an image's text; the rest: a text's image; clip, captioning",
    )
    caption_weight: float = Field(
        default=2.0, gt=0, description="weight of the captions' loss beside that of the pairs; captioning"
    )
    decoder_layers: int = Field(default=1, ge=1, description="blocks of the text decoder; captioning")
    decoder_width: int = Field(default=512, ge=2, description="channels of the text decoder; captioning")
    decoder_heads: int = Field(
        default=8, ge=1, description="attention heads of the text decoder, a divisor of its width; captioning"
    )
    tile: Annotated[int, Field(ge=0)] | Literal["auto"] = knob(
        "auto",
        "side of a tile of the logits, samples; 0: the whole matrix at once; "
        "auto: tiles where the matrix of a rank is larger than 64 MiB",
    )


class CheckpointConfig(Config):
    """When the run's state is written down."""

    every: Length = knob("10%", "distance between checkpoints, a length")
    every_s: float = knob(0.0, "seconds between checkpoints, whichever comes first; 0: by length alone", ge=0)
    keep: int = knob(2, "newest checkpoints kept", ge=1)
    keep_every: Length | None = knob(
        None, "the first checkpoint at or after each multiple of this length is kept for ever; without: none is"
    )
    folder: str = knob("", "where they are kept, any fsspec URL of this run's own; empty: RUN/checkpoints")
    asynchronous: bool = knob(True, "write while training goes on, from a copy in memory")


class LogConfig(Config):
    """What is written down of a run, and where."""

    every: Length = knob("10 steps", "distance between log lines, a length")
    to: tuple[Literal["tensorboard", "wandb", "prometheus"], ...] = knob((), "where lines go besides log.jsonl")
    project: str = knob("pairmill", "project in Weights & Biases")
    prometheus_port: int = knob(9464, "port on which rank 0 serves its metrics", ge=1, le=65535)
    peak_flops: float = knob(0.0, "what a device can do, FLOP/s, for `mfu`; 0: from a table of cards", ge=0)
    stall_s: float = knob(
        20.0, "seconds without a step after which the ranks that are behind are named; 0: nobody watches", ge=0
    )


class EvaluateConfig(Config):
    """Measurements while training: zero-shot, and retrieval where the suite has captions."""

    suite: str = knob("", "suite folder measured during training; empty: none")
    every: Length = knob("20%", "distance between measurements, a length")


class RunConfig(Config):
    """One training run."""

    length: RunLength = Field(default="32 epochs", description="length of the run: samples, steps or epochs")
    data: DataConfig = Field(default=DataConfig(), description="corpus and batches")
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="vocabulary")
    model: ModelConfig = Field(default=ModelConfig(), description="both towers")
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random changes to pictures")
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), description="loss")
    optim: OptimConfig = Field(default=OptimConfig(), description="optimiser and schedule")
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="processes and arithmetic")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="checkpoints")
    log: LogConfig = Field(default=LogConfig(), description="log lines")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="measurements while training")


def written_down(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as JSON that reads back as the same run: all options, but of the model what was set.

    A model's name has defaults of its own, which no other option's default may be taken to overrule.
    """
    return config.model_dump(mode="json") | {"model": config.model.model_dump(mode="json", exclude_unset=True)}
