"""benchmarks/tune.py: which file it writes, and that it looks at this file first. What it measures needs a GPU."""

import json
import sys
from pathlib import Path

import pytest

from ffmoe_core.cuda import tiles
from ffmoe_core.cuda.tiles import PRODUCTS, Gpu, Tiles, choose, layer_products

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tune

CARD = Gpu("Card of these tests", 100, hopper=False)


@pytest.fixture
def measured(monkeypatch):
    """The shapes that were measured: on a card on which narrow tiles are the fastest everywhere."""
    shapes = []

    def measure(shape, gpu):
        shapes.append(shape)
        products = layer_products(*shape)
        for product, size in products.values():  # the products of a layer have to have tiles
            choose(product, size, gpu)
        return {
            stage: {kind.name: float(kind) for kind in PRODUCTS[product] - tiles.HOPPER}
            for stage, (product, _) in products.items()
        }

    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "gpu_of", lambda device: CARD)
    monkeypatch.setattr(tune, "environment", lambda: {"compute_capability": "8.0"})
    monkeypatch.setattr(tune, "release", lambda: None)
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setenv("FFMOE_TILES", "")  # to have it put back
    yield shapes
    tiles.table.cache_clear()


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["tune.py", "A", "--out", str(folder / "tune.json"), *arguments])
    tune.main()


@pytest.mark.parametrize("named", ["by FFMOE_TILES", "by --table"])
def test_a_new_table(measured, named, tmp_path, monkeypatch):
    path = tmp_path / "own.json"
    if named == "by FFMOE_TILES":
        monkeypatch.setenv("FFMOE_TILES", str(path))
    run(monkeypatch, tmp_path, *(["--table", str(path)] if named == "by --table" else []))
    assert list(json.loads(path.read_text())) == [CARD.name]
    chosen = {point[1] for points in tiles.table()[CARD.name].points.values() for point in points}
    assert chosen == {Tiles.NARROW}


def test_other_cards_stay(measured, tmp_path, monkeypatch):
    path = tmp_path / "own.json"
    other = {
        "multiprocessors": 7,
        "compute_capability": "8.6",
        "points": {product: [] for product in PRODUCTS},
    }
    path.write_text(json.dumps({"Another card": other}))
    run(monkeypatch, tmp_path, "--table", str(path))
    assert json.loads(path.read_text())["Another card"] == other
    assert set(tiles.table()) == {"Another card", CARD.name}


@pytest.mark.parametrize("name", ["no such folder/own.json", "none.json", "."])
def test_a_table_that_cannot_be_written(measured, name, tmp_path, monkeypatch):
    (tmp_path / "none.json").write_text("[1]")
    with pytest.raises(SystemExit, match=r"cannot write a table of tiles to .*"):
        run(monkeypatch, tmp_path, "--table", str(tmp_path / name))
    assert not measured
