"""bench.py: all columns, with and without transformers, and floors that are floors."""

import json

import pytest
import torch

import bench
from common import UserError
from model import ModelConfig

SMALL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_ffn=48, n_image=6, image_vocab=40)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench.GEOMETRIES, "tiny", SMALL)


def run(capsys, *more):
    bench.main(["--images", "12", "--rounds", "1", "--json", *more])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_row_has_its_peers_and_its_floor(small, capsys):
    report = run(capsys)
    assert report["images"] == 12 and report["running"] == "eager"
    for row in ("rollout", "score", "update"):
        for name in (row, f"{row}, guided"):
            figures = report[name]
            assert figures["ms"] > 0 and figures["over_floor"] > 1
            assert figures["images_per_s"] == pytest.approx(12000 / figures["ms"])
            assert ("official" in figures) == ("guided" in name)
            assert ("transformers" in figures) == (name == "rollout, guided")


def test_without_transformers_the_columns_are_empty(small, capsys, monkeypatch):
    from extras import peers

    def missing(cfg, device):
        raise UserError("no transformers here: pip install transformers")

    monkeypatch.setattr(peers, "transformers_janus", missing)
    report = run(capsys, "--compile", "off")
    assert set(report["update, guided"]) == {"ms", "images_per_s", "over_floor"}


def test_all_take_turns_and_the_first_round_does_not_count():
    order = []
    times = bench.medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")},
                          torch.device("cpu"), 2)
    assert order == ["a", "b"] * 3 and set(times) == {"a", "b"}


def test_no_images_are_refused():
    with pytest.raises(UserError, match="should be positive"):
        bench.main(["--images", "0"])
