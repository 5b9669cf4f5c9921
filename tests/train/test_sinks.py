"""Where log lines go: every place gets the same numbers. What a line says of speed and arithmetic."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from infra.errors import UserError
from infra.metrics import TRAINING
from train.config import RunConfig
from train.flops import FlopsBySize, card_peak, flops_a_sample, peak_flops
from train.launch import prepare
from train.loop import fit, resumed
from train.model import create_model
from train.objectives import create_objective
from train.objectives.captioning import CaptioningObjective
from train.sinks.jsonl import JsonLines, last_line, lines
from train.sinks.prometheus import Prometheus
from train.state import build

MakeConfig = Callable[..., RunConfig]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_sink_gets_every_line(tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after step 4 shows each step once; TensorBoard and wandb are read back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    to = {"to": ["tensorboard", "wandb", "prometheus"], "prometheus_port": free_port(), "peak_flops": 1e12}
    config, run = make_config(length="8 steps", log={"every": "1 steps", **to}), tmp_path / "run"
    prepare(config, run, 1)
    state = build(config, run)
    fit(state, run, lambda: state.step == 6)  # its newest checkpoint is lost below, so two steps are taken again
    for path in (run / "checkpoints" / "step-00000006").iterdir():
        path.unlink()
    fit(resumed(build(config, run), run), run, lambda: False)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss", "gradient_norm", "parameter_norm", "samples_per_s_device", "mfu"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-6)
    kept = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert kept
    assert all(path.stat().st_size > 1000 for path in kept)


@pytest.mark.parametrize(
    "damage", [b"[1, 2]", b"7", b'"step"', b"null", b'{"samples": 3}', b'{"step": "3"}', b"{", b"\xff"]
)
def test_a_log_line_that_is_none_is_named(tmp_path: Path, damage: bytes) -> None:
    """Between others: one line with its number. At the end it is what a killed process left."""
    whole = b'{"step": 1, "samples": 4}\n'
    (tmp_path / "log.jsonl").write_bytes(whole + damage + b"\n" + whole)
    with pytest.raises(UserError, match=r"log\.jsonl: line 2 is no JSON object with a whole `step`"):
        JsonLines(tmp_path, 5)
    (tmp_path / "log.jsonl").write_bytes(whole + damage + b"\n")
    assert last_line(tmp_path / "log.jsonl") == {}
    (tmp_path / "log.jsonl").write_bytes(whole + damage)
    assert lines(tmp_path / "log.jsonl") == [last_line(tmp_path / "log.jsonl")] == [{"step": 1, "samples": 4}]
    JsonLines(tmp_path, 5).write({"step": 2})
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [1, 2]


def test_prometheus_scrapes_the_newest_line() -> None:
    port = free_port()
    sink = Prometheus(port)
    try:
        sink.write({"step": 3, "loss": 2.5, "unknown": 1.0})
        sink.write({"step": 4, "loss": 1.25})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        assert "pairmill_train_loss 1.25\n" in text
        assert "pairmill_train_step 4.0\n" in text
        assert "unknown" not in text
        with pytest.raises(UserError, match=f"log.prometheus_port: {port} cannot be served on"):
            Prometheus(port)
    finally:
        sink.close()
    Prometheus(port).close()


def test_every_number_of_a_line_is_exported(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(length="2 steps", log={"peak_flops": 2e9})
    prepare(config, tmp_path, 1)
    state = build(config, tmp_path)
    fit(state, tmp_path, lambda: False)
    line = state.metrics
    assert set(line) <= set(TRAINING)
    assert set(TRAINING) - set(line) == {"device_memory_bytes", "zero_shot"}
    longest = state.data.tokenizer.vocabulary
    every = [
        flops_a_sample(config, longest, 16, length) * line["samples_per_s_device"] / 2e9 for length in range(1, 13)
    ]
    assert any(line["mfu"] == pytest.approx(one) for one in every)


def test_flops_are_those_of_a_real_pass(make_config: MakeConfig) -> None:
    config = make_config()
    model = create_model(config.model, 320)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the processor's own attention is not counted
        features = model(torch.randn(8, 3, 16, 16), torch.ones(8, 12, dtype=torch.int64))
        (features.image.sum() + features.text.sum()).backward()
    assert flops_a_sample(config, 320, 16, 12) == counter.get_total_flops() / 8
    assert flops_a_sample(config, 320, 32, 12) > 2 * flops_a_sample(config, 320, 16, 12)


@pytest.mark.parametrize("name", ["ViT-nano", "SigLIP-nano", "RN10-tiny"])
def test_flops_at_other_lengths_follow_from_three(make_config: MakeConfig, name: str) -> None:
    """Exactly, where texts are cut to their longest one and where they are put back to the context."""
    flops = FlopsBySize(make_config(model={"name": name}), 320)
    expected = {length: flops_a_sample(flops.config, 320, 32, length) for length in range(1, 17)}
    assert {length: flops(32, length) for length in (7, 9, 8, *range(1, 17))} == expected
    assert len(set(expected.values())) == (1 if name == "SigLIP-nano" else 16)


def test_flops_of_captioning_at_other_lengths_follow_too(make_config: MakeConfig) -> None:
    config = make_config(objective={"name": "captioning", "decoder_width": 16, "decoder_heads": 2})
    flops = FlopsBySize(config, 320)
    for length in (12, 4, 11, 2, 3, 8, 10):
        assert flops(16, length) == flops_a_sample(config, 320, 16, length)
    assert flops(32, 12) == flops_a_sample(config, 320, 32, 12)


def test_a_lines_utilisation_is_that_of_all_its_steps(tmp_path: Path, make_config: MakeConfig) -> None:
    """Not of the last batch alone: its side changes on the way."""
    data = {"early_image_size": 8, "early_share": 0.5, "pad_to": "context"}
    config = make_config(length="4 steps", data=data, log={"every": "4 steps", "peak_flops": 2e9})
    prepare(config, tmp_path, 1)
    state = build(config, tmp_path)
    fit(state, tmp_path, lambda: False)
    needed = [flops_a_sample(config, state.data.tokenizer.vocabulary, side, 12) for side in (8, 16)]
    line = state.metrics
    assert line["mfu"] == pytest.approx(line["samples_per_s_device"] * sum(needed) / 2 / 2e9)


def test_flops_of_captioning_are_those_of_a_real_pass(make_config: MakeConfig) -> None:
    """Texts as long as the context: the decoder and its logits count."""
    config = make_config(objective={"name": "captioning", "decoder_width": 16, "decoder_heads": 2})
    model = create_model(config.model, 320)
    objective = create_objective(**config.objective.model_dump())
    assert isinstance(objective, CaptioningObjective)
    objective.build(model)
    tokens = torch.ones(8, 12, dtype=torch.int64)
    tokens[:, -1] = 319
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        features = model(torch.randn(8, 3, 16, 16), tokens, objective.sample_needs)
        loss, _ = objective.of_samples(features, tokens, objective.denominator(tokens))
        (features.image.sum() + features.text.sum() + loss).backward()
    assert flops_a_sample(config, 320, 16, 12) == counter.get_total_flops() / 8


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 836),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_cards_are_told_apart(name: str, teraflops: float, caplog: pytest.LogCaptureFixture) -> None:
    assert card_peak(name, torch.bfloat16) == teraflops * 1e12
    assert 0 < card_peak(name, torch.float32) < teraflops * 1e12
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H20",
        "NVIDIA A100X",
    ],
)
def test_the_peak_of_a_like_card_is_not_taken(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert card_peak(name, torch.bfloat16) == 0.0
    (said,) = caplog.messages
    assert f"no peak of {name} is known" in said


def test_no_peak_is_known_of_a_processor() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == 0.0
    assert peak_flops(torch.device("cpu"), torch.bfloat16, 5e12) == 5e12
