"""Device memory a layer holds between forward and backward, with and without recompute_activations.

    python benchmarks/memory_kept.py [--out FILE] [A ... G | T,H,I,E,K ...]

Counted is what torch's allocator holds more after the forward call than before it, so input and weights
are not in it and the output is. bfloat16, dropless; the shapes are those of the layer's benchmarks. Shapes
named alone are merged into a record of the same sources on the same device.
"""

import argparse
import functools
import gc
from pathlib import Path
from typing import Any

import torch

from arguments import Shape, chosen_shape, previous
from ffmoe_core.errors import OutOfMemoryError
from ffmoe_torch import MoELayer
from record import RESULTS, environment, sources_digest, write

SHAPES = {
    "A": (32768, 4096, 1024, 128, 8),
    "B": (32768, 2048, 1024, 64, 8),
    "C": (32768, 2048, 768, 128, 8),
    "D": (24576, 1536, 256, 128, 8),
    "E": (8192, 1024, 2048, 8, 2),
    "F": (16384, 4096, 14336, 8, 2),
    "G": (16384, 7168, 2048, 64, 8),
}


def kept_bytes(shape: Shape, recompute: bool) -> int | None:
    """Bytes held after one forward call that records a graph; None where the layer does not fit."""
    tokens, d_model, intermediate, experts, top_k = shape
    options = {"device": "cuda", "dtype": torch.bfloat16}
    try:
        layer = MoELayer(
            d_model, 2 * intermediate, experts, top_k, recompute_activations=recompute, **options
        )
        x = torch.randn(tokens, d_model, **options, requires_grad=True)
        before = torch.cuda.memory_allocated()
        # the layer's first call: a later one would also let go of what stats() kept of the call before
        output, losses = layer(x)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        del output, losses
    except (OutOfMemoryError, torch.OutOfMemoryError):
        held = None
    return held


def measure(shape: Shape) -> dict[str, Any]:
    """Both ways of one shape."""
    row: dict[str, Any] = dict(zip("THIEK", shape, strict=True))
    row["output_bytes"] = shape[0] * shape[1] * 2
    for name, recompute in (("kept_bytes", False), ("kept_bytes_recompute", True)):
        row[name] = kept_bytes(shape, recompute)
        gc.collect()
        torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "shapes",
        nargs="*",
        type=functools.partial(chosen_shape, known=SHAPES),
        metavar="SHAPE",
        help="A to G or T,H,I,E,K; default: A to G",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "memory_kept.json", help="the record; default: %(default)s"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("memory_kept.py measures a layer on an NVIDIA GPU, and there is none here")

    head = {**environment(), "sources": sources_digest(), "dtype": "bfloat16"}
    rows = previous(arguments.out, head) if arguments.shapes else {}
    for name, sizes in arguments.shapes or SHAPES.items():
        rows[name] = measure(sizes)
        mib = {
            key: "does not fit" if value is None else f"{value / 2**20:.1f} MiB"
            for key, value in rows[name].items()
            if key.startswith("kept")
        }
        print(name, sizes, mib, flush=True)
    write(arguments.out, {**head, "shapes": rows})


if __name__ == "__main__":
    main()
