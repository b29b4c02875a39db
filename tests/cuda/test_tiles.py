"""Which tiles a product gets: from the table, by the rule, and shown."""

import json

import pytest

from ffmoe_core.cuda import tiles
from ffmoe_core.cuda.tiles import HOPPER, PRODUCTS, Gpu, Size, Tiles, choose, only, possible_tiles
from ffmoe_core.errors import ConfigError, MissingDependencyError

CARD = Gpu("Card of these tests", 100, hopper=True)
UNMEASURED = CARD._replace(name="Another card")
POINT = Size(8, 4096, 1024, 512)


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Without the choice of the newest kernels that tests otherwise run under."""
    with only(Tiles):
        yield


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A table of one card: at POINT narrow tiles were fastest, with four times the rows clusters."""

    def points(product):
        few, many = Tiles.NARROW, Tiles.CLUSTER
        return [[*POINT, few.name], [*POINT._replace(rows=4 * POINT.rows), many.name]]

    entry = {
        "multiprocessors": 100,
        "compute_capability": "9.0",
        "points": {product: points(product) for product in PRODUCTS},
    }
    return use_table(tmp_path, monkeypatch, json.dumps({CARD.name: entry}))


@pytest.fixture(autouse=True)
def _shipped_table_after():
    yield
    tiles.table.cache_clear()


def use_table(folder, monkeypatch, text):
    path = folder / "tiles.json"
    path.write_text(text)
    monkeypatch.setenv("FFMOE_TILES", str(path))
    tiles.table.cache_clear()
    return path


def by_rule(product, size, gpu, gathers=False):
    return tiles.rule(product, size, gpu, possible_tiles(product, size, gpu, gathers))


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_nearest_measured_size_decides(card, product):
    assert choose(product, POINT, CARD) is Tiles.NARROW
    assert choose(product, POINT._replace(columns=600), CARD) is Tiles.NARROW
    assert choose(product, POINT._replace(rows=3 * POINT.rows), CARD) is Tiles.CLUSTER
    assert choose(product, POINT._replace(rows=9 * POINT.rows), CARD) is Tiles.CLUSTER


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("hopper", [True, False])
def test_the_rule_decides_far_away_and_on_other_cards(card, product, hopper):
    far = Size(8, 2**20, 8192, 8192)
    for gpu, size in ((CARD, far), (UNMEASURED, POINT)):
        gpu = gpu._replace(hopper=hopper)
        assert choose(product, size, gpu) is by_rule(product, size, gpu)


@pytest.mark.parametrize("product", PRODUCTS)
def test_choices_are_possible_ones(card, product):
    portable = CARD._replace(hopper=False)
    for rows in (1, 16, 4096, 2**18):
        for width in (8, 512, 4096):
            size = Size(16, rows, width, 512)
            assert choose(product, size, CARD) in PRODUCTS[product]
            assert choose(product, size, portable) in PRODUCTS[product] - HOPPER
            for one in possible_tiles(product, size, CARD):
                with only({one}):
                    assert choose(product, size, CARD) is one


@pytest.mark.parametrize("gpu", [CARD, CARD._replace(hopper=False)])
def test_few_rows_have_a_kernel_of_their_own(gpu):
    """By the rule up to four a group, and up to 128 wherever that is asked for; not every product has it."""
    gpu = gpu._replace(name="Another card")
    for product in PRODUCTS:
        has_it = product in ("gemm_nk", "glu")
        for groups, rows in ((8, 2), (8, 32), (256, 128)):
            assert (by_rule(product, Size(groups, rows, 2048, 512), gpu) is Tiles.ROWS) == has_it
        for groups, rows in ((8, 33), (256, 129), (1024, 4096)):
            assert by_rule(product, Size(groups, rows, 2048, 512), gpu) is not Tiles.ROWS
        with only({Tiles.ROWS}):
            assert (choose(product, Size(8, 128, 2048, 512), gpu) is Tiles.ROWS) == has_it
            assert choose(product, Size(8, 129, 2048, 512), gpu) is not Tiles.ROWS
            assert choose(product, Size(8, 8, 2048, 512), gpu, in_chunks=True) is not Tiles.ROWS


def test_the_rule():
    """Many wide tiles, a contraction too short for them, too few of them or not full; pace for long contractions.

    And turns for those that are not very long, unless there are too few tiles to keep pace with.
    """
    old = CARD._replace(hopper=False)
    for product in ("gemm_nk", "gemm_kn", "glu"):
        assert by_rule(product, Size(8, 32768, 2048, 4096), old) is Tiles.WIDE
        assert by_rule(product, Size(8, 32768, 1024, 4096), old) is Tiles.NARROW
        assert by_rule(product, Size(8, 1024, 2048, 512), old) is Tiles.NARROW
        assert by_rule(product, Size(512, 32768, 2048, 4096), old) is Tiles.NARROW
    assert by_rule("glu_backward", Size(8, 32768, 2048, 4096), old) is Tiles.NARROW
    assert by_rule("wgrad", Size(8, 32768, 1024, 4096), old) is Tiles.WIDE
    assert by_rule("wgrad", Size(128, 32768, 1024, 4096), old) is Tiles.NARROW
    assert by_rule("glu", Size(8, 32768, 1024, 4096), CARD) is Tiles.PACED
    assert by_rule("glu", Size(8, 32768, 768, 4096), CARD) is Tiles.CLUSTER
    assert by_rule("wgrad", Size(8, 32768, 4096, 4096), CARD) is Tiles.CLUSTER
    for product in ("gemm_nk", "gemm_kn"):
        assert by_rule(product, Size(8, 32768, 768, 4096), CARD) is Tiles.TURNS
        assert by_rule(product, Size(8, 32768, 2048, 4096), CARD) is Tiles.PACED_TURNS
        assert by_rule(product, Size(8, 32768, 4096, 4096), CARD) is Tiles.PACED
        assert by_rule(product, Size(8, 256, 2048, 4096), CARD) is Tiles.CLUSTER
        assert by_rule(product, Size(8, 32768, 2048, 4096), CARD, gathers=True) is Tiles.PACED


@pytest.mark.parametrize("product", ["gemm_nk", "gemm_kn"])
def test_gathered_rows_get_no_turns(tmp_path, monkeypatch, product):
    """Not by the rule, not by the table, and not where nothing else is wanted."""
    size = POINT._replace(width=512)
    assert choose(product, size, UNMEASURED, gathers=True) is Tiles.CLUSTER
    with only({Tiles.TURNS}):
        assert choose(product, size, UNMEASURED) is Tiles.TURNS
        assert choose(product, size, UNMEASURED, gathers=True) is Tiles.CLUSTER
    entry = {
        "multiprocessors": 100,
        "compute_capability": "9.0",
        "points": {
            product: [[*size, Tiles.TURNS.name], [*size._replace(rows=1), Tiles.WIDE.name]]
            for product in PRODUCTS
        },
    }
    use_table(tmp_path, monkeypatch, json.dumps({CARD.name: entry}))
    assert choose(product, size, CARD) is Tiles.TURNS
    assert choose(product, size, CARD, gathers=True) is Tiles.CLUSTER


@pytest.mark.parametrize("text", ["", "[]", '{"Card": {}}', '{"Card": {"multiprocessors": 1}}'])
def test_a_table_that_is_none_is_refused(tmp_path, monkeypatch, text):
    path = use_table(tmp_path, monkeypatch, text)
    with pytest.raises(ConfigError, match=r"FFMOE_TILES=.*tune\.py") as error:
        choose("glu", POINT, CARD)
    assert str(path) in str(error.value)


def test_a_missing_table_is_refused(tmp_path, monkeypatch):
    use_table(tmp_path, monkeypatch, "{}").unlink()
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        choose("glu", POINT, CARD)


def test_choices_are_shown(card, capsys):
    tiles.main(["2048,1024,512,8,2", "--gpu", CARD.name])
    shown = capsys.readouterr().out
    assert shown.startswith(f"{CARD.name}, measured\n")
    products = {line.split()[0]: line for line in shown.splitlines()[1:]}
    assert list(products) == ["up", "down", "d-activation", "dW_down", "dW_up", "d-input"]
    assert products["up"].split()[1] == "NARROW"
    assert products["up"].endswith(tiles.DESCRIPTIONS[Tiles.NARROW])
    assert set(tiles.DESCRIPTIONS) == set(Tiles)


def test_without_a_gpu_to_ask_one_is_to_be_named(card, capsys, monkeypatch):
    def no_gpu():
        raise MissingDependencyError("no CuPy")

    monkeypatch.setattr(tiles, "import_cupy", no_gpu)
    with pytest.raises(SystemExit):
        tiles.main(["2048,1024,512,8,2"])
    assert f"no CuPy); name a measured one with --gpu: {CARD.name}" in capsys.readouterr().err


def test_the_shipped_table_is_read():
    for name, measured in tiles.table().items():
        assert measured.gpu.name == name
        assert all(measured.points.values())
