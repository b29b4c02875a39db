"""What the benchmarks of a layer's shapes have in common: their arguments, and the record that a run is merged into."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ffmoe_core import MoEConfig
from ffmoe_core.errors import ConfigError

Shape = tuple[int, int, int, int, int]
NO_NAMES: Mapping[str, Shape] = MappingProxyType({})


def chosen_shape(text: str, known: Mapping[str, Shape] = NO_NAMES) -> tuple[str, Shape]:
    """Name and sizes of a shape: one of those known by name, or T,H,I,E,K, which is then its name."""
    if text in known:
        return text, known[text]
    try:
        T, H, I, E, K = (int(size) for size in text.split(","))
    except ValueError:
        names = f"neither one of {', '.join(known)} nor" if known else "not"
        raise argparse.ArgumentTypeError(f"{text!r} is {names} T,H,I,E,K: five whole numbers") from None
    if T < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: T={T} is below 1")
    try:
        MoEConfig(d_model=H, ffn_dim=2 * I, num_experts=E, top_k=K)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{text!r} as T,H,I,E,K: {error}") from None
    return f"{T},{H},{I},{E},{K}", (T, H, I, E, K)


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def previous(path: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes already recorded at ``path`` with the same ``head``: sources, device and settings.

    Raises SystemExit where there is a record of anything else: what is not measured now would be lost.
    """
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        shapes: dict[str, Any] = record["shapes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(
            f"{path} is no record of shapes to merge these into: name another file with --out"
        ) from None
    differing = [key for key, value in head.items() if key != "date" and record.get(key) != value]
    if differing:
        raise SystemExit(
            f"{path} differs in {', '.join(differing)}, and what is not measured now would be lost: "
            "name another file with --out, or measure every shape"
        )
    return shapes
