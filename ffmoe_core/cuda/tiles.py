"""Which kernel and tiles a grouped product of 16-bit matrices gets on a GPU.

``tiles.json`` holds, for every GPU that was measured, what was fastest at some sizes; benchmarks/tune.py writes it. A
product gets what was fastest at the nearest of them. Where none is near, or the GPU was not measured, a rule decides.
So the choice follows from the GPU and the sizes alone. To see it:

    python -m ffmoe_core.cuda.tiles T,H,I,E,K [--gpu NAME]

``FFMOE_TILES`` in the environment names another file of that form to be used instead, such as one tuned for a GPU of
one's own.
"""

import argparse
import json
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from .compile import import_cupy


class Tiles(IntEnum):
    """Kernels, and the tiles they work in; the numbers are those of grouped_gemm.pyx."""

    NARROW = 1
    WIDE = 2
    CLUSTER = 3
    PACED = 4
    TURNS = 5
    PACED_TURNS = 6
    ROWS = 7


DESCRIPTIONS = {
    Tiles.NARROW: "mma.sync, tiles of 128x128, two blocks on a multiprocessor",
    Tiles.WIDE: "mma.sync, tiles of 128x256",
    Tiles.CLUSTER: "wgmma, tiles of 128x256, two blocks that share an operand",
    Tiles.PACED: "as CLUSTER, and all blocks begin their n-th tile together",
    Tiles.TURNS: "wgmma, tiles of 128x192, shared likewise; a block's two warpgroups take turns with whole tiles",
    Tiles.PACED_TURNS: "as TURNS, and all blocks begin their n-th tile together",
    Tiles.ROWS: "mma.sync, 8 rows by 16 columns a warp, at the rate of reading the weights",
}
TURNS = frozenset({Tiles.TURNS, Tiles.PACED_TURNS})
HOPPER = frozenset({Tiles.CLUSTER, Tiles.PACED}) | TURNS
_EVERYWHERE = frozenset(Tiles) - TURNS - {Tiles.ROWS}  # for every product
PRODUCTS = {
    "gemm_nk": frozenset(Tiles),  # weights as [N, K]
    "gemm_kn": frozenset(Tiles) - {Tiles.ROWS},  # and as [K, N]
    "glu": _EVERYWHERE | {Tiles.ROWS},
    "glu_backward": _EVERYWHERE - {Tiles.WIDE},  # two blocks hide each other's long epilogue
    "wgrad": _EVERYWHERE - {Tiles.PACED},  # its tiles are equally long anyway
}
# A shorter contraction does not hide the start and end of a wide tile.
WIDE_DEPTH = 2048
WIDE_WGRAD_DEPTH = 512
TILE_ROWS = 128
TURNS_DEPTH = 2048  # longer contractions gain more by wide tiles than by tile ends that cost nothing
PACED_DEPTH = 1024  # the operands of a shorter one stay in the second-level cache without pace, too
# Of Tiles.ROWS, which read the weights once for every 8 rows of a group, and they may be all of one. (grouped_gemm.pyx
# asks for rows in octaves.)
MOST_ROWS = 128
ROWS_OF_A_GROUP = 4  # on average: more are worth tiles that keep them in shared memory
NEAR_OCTAVES = 4.0  # a factor of 2 in one size is an octave


class Size(NamedTuple):
    """Sizes of a product."""

    groups: int
    rows: int  # of all groups
    width: int  # of a row, which is the contraction; of wgrad of the first operand's rows
    columns: int  # of the result; of glu and glu_backward I


class Gpu(NamedTuple):
    """What a choice depends on beside the sizes."""

    name: str
    multiprocessors: int
    hopper: bool  # the wgmma kernels run on it


Points = dict[str, list[tuple[Size, Tiles]]]  # by product


class Measured(NamedTuple):
    """One GPU's part of the table."""

    gpu: Gpu
    points: Points


def rule(product: str, size: Size, gpu: Gpu, possible: frozenset[Tiles]) -> Tiles:
    """The choice where nothing was measured. It may be none of the possible ones where those were narrowed by hand."""
    rows, columns = size.rows, size.columns
    if Tiles.ROWS in possible and rows <= ROWS_OF_A_GROUP * size.groups:
        return Tiles.ROWS
    if gpu.hopper:
        across = -(-columns // (128 if product == "glu" else 256))
        paced = size.width >= PACED_DEPTH and rows // 256 * across >= gpu.multiprocessors
        in_turns = paced or size.width < PACED_DEPTH
        if in_turns and size.width <= TURNS_DEPTH and possible >= TURNS:
            return Tiles.PACED_TURNS if paced else Tiles.TURNS
        return Tiles.PACED if paced and product != "wgrad" else Tiles.CLUSTER
    if product == "wgrad":
        down, deep = size.groups * -(-size.width // TILE_ROWS), rows >= size.groups * WIDE_WGRAD_DEPTH
    else:
        # tiles that are not full have little to do but fetch weights
        down, deep = rows // TILE_ROWS, size.width >= WIDE_DEPTH and rows >= size.groups * TILE_ROWS
    across = (2 * columns if product == "glu" else columns) // 256
    # wide tiles move fewer bytes, but a multiprocessor holds one only
    wide = product != "glu_backward" and deep and down * across >= gpu.multiprocessors
    return Tiles.WIDE if wide else Tiles.NARROW


def octaves_apart(a: Size, b: Size) -> float:
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))


def possible_tiles(
    product: str, size: Size, gpu: Gpu, gathers: bool = False, in_chunks: bool = False
) -> frozenset[Tiles]:
    """gathers: an index names rows of an operand. in_chunks: a call computes a part of each group's rows."""
    possible = PRODUCTS[product]
    if in_chunks or size.rows > MOST_ROWS:
        possible -= {Tiles.ROWS}
    if not gpu.hopper:
        return possible - HOPPER
    return possible - TURNS if gathers else possible


def choose(product: str, size: Size, gpu: Gpu, gathers: bool = False, in_chunks: bool = False) -> Tiles:
    """The same for the same arguments, which are those of possible_tiles."""
    possible = possible_tiles(product, size, gpu, gathers, in_chunks)
    if _only is not None and possible & _only:
        possible &= _only
    known = table().get(gpu.name)
    points = [] if known is None else [p for p in known.points.get(product, []) if p[1] in possible]
    nearest = min(points, key=lambda point: octaves_apart(point[0], size), default=None)
    if nearest is not None and octaves_apart(nearest[0], size) <= NEAR_OCTAVES:
        return nearest[1]
    by_rule = rule(product, size, gpu, possible)
    return by_rule if by_rule in possible else min(possible)


# --- the table ---


def table_path() -> Path:
    return Path(os.environ.get("FFMOE_TILES") or Path(__file__).with_name("tiles.json"))


@lru_cache(maxsize=1)
def table() -> dict[str, Measured]:
    """By the GPU's name. Raises ConfigError where the file is none of a tuner's."""
    path = table_path()
    try:
        return {name: _measured(name, entry) for name, entry in json.loads(path.read_text()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"FFMOE_TILES={str(path)!r} cannot be used as a table of tiles ({type(error).__name__}: {error}); "
            "benchmarks/tune.py writes one"
        ) from error


def _measured(name: str, entry: dict[str, Any]) -> Measured:
    gpu = Gpu(name, int(entry["multiprocessors"]), entry["compute_capability"] == "9.0")
    points = {
        product: [(Size(*map(int, sizes)), Tiles[tiles]) for *sizes, tiles in entry["points"][product]]
        for product in PRODUCTS
    }
    return Measured(gpu, points)


# --- one kernel after the other: for the tuner and for tests ---

_only: frozenset[Tiles] | None = None


@contextmanager
def only(tiles: Collection[Tiles]) -> Iterator[None]:
    """Within it every product gets one of these, where there is one for it."""
    global _only
    before, _only = _only, frozenset(tiles)
    choices.clear()
    try:
        yield
    finally:
        _only = before
        choices.clear()


choices: dict[
    tuple[object, ...], Tiles
] = {}  # by device and sizes: what grouped_gemm.pyx has asked for so far


# --- showing ---


def layer_products(T: int, H: int, I: int, E: int, K: int) -> dict[str, tuple[str, Size]]:
    """The grouped products of a layer's forward and backward, in their order."""
    R = T * K
    return {
        "up": ("glu", Size(E, R, H, I)),
        "down": ("gemm_nk", Size(E, R, I, H)),
        "d-activation": ("glu_backward", Size(E, R, H, I)),
        "dW_down": ("wgrad", Size(E, R, H, I)),
        "dW_up": ("wgrad", Size(E, R, 2 * I, H)),
        "d-input": ("gemm_kn", Size(E, R, 2 * I, H)),
    }


def gpu_of(device_id: int) -> Gpu:
    """A GPU of this machine."""
    cupy = import_cupy()
    properties = cupy.cuda.runtime.getDeviceProperties(device_id)
    hopper = (properties["major"], properties["minor"]) == (
        9,
        0,
    ) and "FFMOE_PORTABLE_KERNELS" not in os.environ
    return Gpu(properties["name"].decode(), properties["multiProcessorCount"], hopper)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 5 or min(sizes) < 1:
        raise ValueError
    return sizes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ffmoe_core.cuda.tiles",
        description="The kernel and tiles of each grouped product of a layer, for 16-bit matrices.",
    )
    parser.add_argument("shape", type=_sizes, metavar="T,H,I,E,K")
    parser.add_argument("--gpu", choices=sorted(table()), help="default: this machine's first")
    args = parser.parse_args(arguments)
    try:
        gpu = table()[args.gpu].gpu if args.gpu else gpu_of(0)
    except Exception as error:  # whatever a missing CuPy, driver or GPU raises
        parser.error(
            f"no GPU can be asked here ({error}); name a measured one with --gpu: {', '.join(sorted(table()))}"
        )
    print(f"{gpu.name}, {'measured' if gpu.name in table() else 'by rule'}")
    for name, (product, size) in layer_products(*args.shape).items():
        tiles = choose(product, size, gpu)
        print(f"{name:14} {tiles.name:12} {DESCRIPTIONS[tiles]}")


if __name__ == "__main__":
    main()
