"""The picture of benchmarks/layer.py's record: time by stage, and every contender's ratio to the bound.

    python benchmarks/layer_plot.py [RECORD.json]

Drawn beside the record, as RECORD.svg, for the balanced routing. The stages' times are in units of the
bound's forward+backward, so that shapes of 1 ms and of 60 ms stand side by side. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from record import RESULTS

# stages drawn as one, from the bottom up; what is in none of them is "rest"
GROUPS = {
    "up": ("up",),
    "down": ("down",),
    "d-activation": ("d-activation",),
    "dW_down": ("dW_down",),
    "dW_up": ("dW_up",),
    "d-input": ("d-input",),
    "combine, both": ("combine", "combine dx"),
    "router": ("gate logits", "route", "route backward", "router dgate"),
    "sort": ("sort",),
}
REST = "rest"
RATIOS = {"forward": "forward", "forward_backward": "forward+backward"}


def grouped(stages: dict[str, dict[str, float]]) -> dict[str, float]:
    """Milliseconds by group."""
    group_of = {stage: group for group, members in GROUPS.items() for stage in members}
    spent = dict.fromkeys((*GROUPS, REST), 0.0)
    for stage, row in stages.items():
        spent[group_of.get(stage, REST)] += row["ms"]
    return spent


def read(path: Path) -> dict[str, Any]:
    """The record in a file; SystemExit where there is none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        ours = all("routing" in row for row in record["shapes"].values())
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise SystemExit(f"{path} is no record of benchmarks/layer.py")
    return record


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the balanced shapes of a record that have what the picture compares: ours and the bound."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            f"no plot: matplotlib is missing (pip install '.[bench]'), then "
            f"python benchmarks/layer_plot.py {path.with_suffix('.json')}"
        ) from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "layer"  # the same record gives the same file
    from matplotlib import pyplot

    balanced = {name: row["routing"].get("balanced") for name, row in record["shapes"].items()}
    shapes = {
        name: result
        for name, result in balanced.items()
        if result and {"ffmoe", "bound"} <= result["contenders"].keys()
    }
    if not shapes:
        raise SystemExit("no plot: no shape in the record has ffmoe and bound under balanced routing")
    figure, (left, *others) = pyplot.subplots(1, 3, figsize=(15, 5), width_ratios=(1.4, 1, 1))
    draw_stages(left, shapes)
    for axes, (key, title) in zip(others, RATIOS.items(), strict=True):
        draw_ratios(axes, shapes, f"{key}_ms")
        axes.set_title(f"{title}, time / bound")
    figure.suptitle(f"One MoE layer, {record['dtype']}, {record['device']}")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_stages(axes: Any, shapes: dict[str, Any]) -> None:
    bottoms = dict.fromkeys(shapes, 0.0)
    for number, group in enumerate((*GROUPS, REST)):
        heights = [
            grouped(result.get("stages", {}))[group] / result["contenders"]["bound"]["forward_backward_ms"]
            for result in shapes.values()
        ]
        axes.bar(list(shapes), heights, bottom=list(bottoms.values()), label=group, color=f"C{number}")
        bottoms = {name: low + high for (name, low), high in zip(bottoms.items(), heights, strict=True)}
    for name, result in shapes.items():
        total = sum(row["ms"] for row in result.get("stages", {}).values())
        axes.annotate(f"{total:.1f} ms", (name, bottoms[name]), ha="center", va="bottom", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_title("ffmoe forward+backward by stage, kernel time / bound")
    axes.set_ylim(0, 1.12 * max(1, *bottoms.values()))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def draw_ratios(axes: Any, shapes: dict[str, Any], key: str) -> None:
    names = list(dict.fromkeys(name for result in shapes.values() for name in result["contenders"]))
    names.remove("bound")
    width, highest = 0.8 / len(names), 1.0
    for number, name in enumerate(names):
        for place, result in enumerate(shapes.values()):
            if name in result["contenders"]:
                ratio = result["contenders"][name][key] / result["contenders"]["bound"][key]
                highest = max(highest, ratio)
                axes.bar(place + (number - (len(names) - 1) / 2) * width, ratio, width, color=f"C{number}")
        axes.bar(0, 0, color=f"C{number}", label=name)
    axes.set_xticks(range(len(shapes)), list(shapes))
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.3 * highest)
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "record", nargs="?", type=Path, default=RESULTS / "layer.json", help="default: %(default)s"
    )
    path = parser.parse_args(arguments).record
    draw(read(path), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
