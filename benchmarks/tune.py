"""Finds the fastest kernel and tiles of each grouped product on this machine's GPU, and writes the table of them.

    python benchmarks/tune.py [A ... G | T,H,I,E,K ...] [--table FILE] [--out FILE]

At each shape a layer runs forward and backward once with every choice of ffmoe_core/cuda/tiles.py, bfloat16, balanced
routing; a product's time is the median of its kernel's. The fastest gets into the table, but for the choice that the
rule would make where that is within 2% of it. In a source tree the table is the one that is shipped; this GPU's part of
it is replaced. Where ffmoe is installed, write another with --table and name it in FFMOE_TILES. All times go to --out.
"""

import argparse
import json
import os
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arguments import Shape, chosen_shape
from ffmoe_core.cuda.tiles import (
    PRODUCTS,
    Gpu,
    Size,
    gpu_of,
    layer_products,
    only,
    possible_tiles,
    rule,
    table,
    table_path,
)
from ffmoe_core.errors import ConfigError
from layer import expert_weights, problem, release, stage_times
from memory_kept import SHAPES
from peers import ffmoe
from record import RESULTS, environment, sources_digest, write

FEW_TOKENS = (1, 8, 64, 512, 4096)  # of a batch that is decoded, or a small one that is trained on
GEOMETRIES = "ACDFG"
CLOSE = 1.02  # times the fastest: no reason to differ from the rule

Times = dict[str, dict[str, float]]  # milliseconds by stage and tiles


def default_shapes() -> dict[str, Shape]:
    few = {
        f"{name} with T={tokens}": (tokens, *SHAPES[name][1:]) for name in GEOMETRIES for tokens in FEW_TOKENS
    }
    return {**SHAPES, **few}


def measure(shape: Shape, gpu: Gpu) -> Times:
    """How long each grouped product of a layer takes with each of the tiles that it can have."""
    given = problem(shape, "balanced", expert_weights(shape))
    call = ffmoe(given).gradients
    products = layer_products(*shape)
    times: Times = {stage: {} for stage in products}
    possible = {stage: possible_tiles(product, size, gpu) for stage, (product, size) in products.items()}
    for tiles in sorted(frozenset().union(*possible.values())):
        with only({tiles}):
            call()
            call()
            stages = stage_times(call, {})
        for stage in products:
            if tiles in possible[stage]:
                times[stage][tiles.name] = stages[stage]["ms"]
    return times


def fastest(product: str, size: Size, gpu: Gpu, times: dict[str, float]) -> str:
    by_rule = rule(product, size, gpu, possible_tiles(product, size, gpu)).name
    best = min(times, key=lambda tiles: times[tiles])
    return by_rule if times[by_rule] <= CLOSE * times[best] else best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "shapes",
        nargs="*",
        type=partial(chosen_shape, known=SHAPES),
        metavar="SHAPE",
        help=f"A to G or T,H,I,E,K; default: A to G, and {GEOMETRIES} with fewer tokens",
    )
    parser.add_argument("--table", type=Path, default=table_path(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS / "tune.json", help="default: %(default)s")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune.py measures kernels on an NVIDIA GPU, and there is none here")
    random.seed(0)
    torch.manual_seed(0)
    kept = opened(arguments.table)
    gpu, head = gpu_of(0), environment()
    points: dict[str, list[list[Any]]] = {product: [] for product in PRODUCTS}
    measured: dict[str, Times] = {}
    for name, shape in dict(arguments.shapes).items() or default_shapes().items():
        measured[name] = measure(shape, gpu)
        release()
        print(name, shape)
        for stage, (product, size) in layer_products(*shape).items():
            choice = fastest(product, size, gpu, measured[name][stage])
            points[product].append([*size, choice])
            print(f"    {stage:14} {choice:8}", *(f"{t} {ms:.4f}" for t, ms in measured[name][stage].items()))
    kept[gpu.name] = {
        "multiprocessors": gpu.multiprocessors,
        "compute_capability": head["compute_capability"],
        "points": points,
    }
    arguments.table.write_text(compact(kept))
    table.cache_clear()
    table()  # raises if it cannot be read
    write(arguments.out, {**head, "sources": sources_digest(), "gpu": gpu._asdict(), "median_ms": measured})


def opened(path: Path) -> dict[str, Any]:
    """The table as it is, made if there is none: what is wrong with it is found out before anything is measured."""
    os.environ["FFMOE_TILES"] = str(path)  # whatever it was: this is the table to be used
    table.cache_clear()
    try:
        with path.open("a") as file:
            if not file.tell():
                file.write("{}\n")
        table()
    except (OSError, ConfigError) as error:
        raise SystemExit(f"cannot write a table of tiles to {path}: {error}") from None
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def compact(kept: dict[str, Any]) -> str:
    """JSON with a line for each point."""
    text = json.dumps(kept, indent=1, sort_keys=True)
    return re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda point: f"[{' '.join(point[1].split())}]", text) + "\n"


if __name__ == "__main__":
    main()
