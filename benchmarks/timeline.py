"""What ran when: intervals of a layer's work in lanes, from a profiler's trace or the host's clock, and their picture.

    python benchmarks/timeline.py RECORD.json

Drawn beside the record of benchmarks/ep_overlap.py, as RECORD.svg. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# kinds, and the color of each
KINDS = {
    "exchange": "#f2a65a",
    "grouped products": "#7fb3d5",
    "shared expert": "#8fcf9b",
    "router": "#d7a1d9",
    "sums": "#f7dc6f",
    "rest": "#c9ced6",
}
EXCHANGES, LAYER, SIDE = "exchanges", "layer", "shared expert's stream"  # the lanes, from the top
LANES = (EXCHANGES, LAYER, SIDE)
MARK = "ffmoe|"  # how a mark's name begins in a trace: MARK kind|name
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
# what a kernel is that nothing tells of, by what its name begins with
KERNELS = {
    "nccl": "exchange",
    "grouped_": "grouped products",
    "route": "router",
    "gate_": "router",
    "combine": "sums",
}


class Span(NamedTuple):
    """One piece of work; times in microseconds from the call's start."""

    lane: str
    kind: str
    name: str
    start: float
    end: float


class Mark(NamedTuple):
    """The host was inside it on one thread from ``start`` to ``end``."""

    kind: str
    name: str
    start: float
    end: float


def from_trace(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    """What the device did, from the ``traceEvents`` of torch.profiler.

    A kernel is of the innermost mark that the host was in when it launched it, or else what its name says. A lane is
    a stream: of the exchanges, of the shared expert, and of the layer, which is that of all others. Events that lack
    what they need, or are of another sort, are left out.
    """
    marks: dict[Any, list[Mark]] = {}
    launches: dict[Any, tuple[Any, float]] = {}
    work = []
    for event in events:
        try:
            kind, name = event.get("cat"), event["name"]
            start = float(event["ts"])
            end = start + float(event["dur"])
            arguments = event.get("args", {})
            if kind == "user_annotation" and name.startswith(MARK):
                of, _, what = name.removeprefix(MARK).partition("|")
                marks.setdefault(event["tid"], []).append(Mark(of, what, start, end))
            elif kind in LAUNCHES:
                launches[arguments["correlation"]] = event["tid"], start
            elif kind in ON_DEVICE:
                stream = arguments.get("stream", event.get("tid"))
                work.append((stream, name, arguments.get("correlation"), start, end))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    if not work:
        return []
    first = min(start for *_, start, _ in work)
    every = [mark for own in marks.values() for mark in own]
    found: dict[Any, tuple[Any, str, str, float, float]] = {}
    for stream, name, correlation, start, end in sorted(work, key=lambda piece: piece[3]):
        around: list[Mark] = []
        if correlation in launches:
            thread, launched = launches[correlation]
            near = marks.get(thread, every)  # threads may be numbered otherwise among the launches
            around = [mark for mark in near if mark.start <= launched <= mark.end]
        inner = min(around, key=lambda mark: mark.end - mark.start, default=None)
        kind = inner.kind if inner else _kind(name)
        # the kernels of one exchange are one piece of work
        key = (stream, inner) if inner and kind == "exchange" else len(found)
        start = found[key][3] + first if key in found else start
        found[key] = stream, kind, inner.name if inner else name, start - first, end - first
    lanes = _lanes([(stream, kind) for stream, kind, *_ in found.values()])
    return [Span(lanes[stream], *rest) for stream, *rest in found.values()]


def _kind(kernel: str) -> str:
    return next((kind for begin, kind in KERNELS.items() if kernel.startswith(begin)), "rest")


def _lanes(work: list[tuple[Any, str]]) -> dict[Any, str]:
    """The lane of each stream, by the kinds on it."""
    kinds: dict[Any, set[str]] = {}
    for stream, kind in work:
        kinds.setdefault(stream, set()).add(kind)
    return {stream: _lane(of) for stream, of in kinds.items()}


def _lane(kinds: set[str]) -> str:
    if "exchange" in kinds:
        return EXCHANGES
    return SIDE if kinds <= {"shared expert", "rest"} and "shared expert" in kinds else LAYER


def overlapped(spans: Iterable[Span]) -> float:
    """Microseconds in which an exchange is under way and something else runs."""
    edges = []
    for span in spans:
        crossing = span.lane == EXCHANGES
        edges += [(span.start, crossing, 1), (span.end, crossing, -1)]
    open_now, before, total = {True: 0, False: 0}, 0.0, 0.0
    for time, crossing, step in sorted(edges):
        if open_now[True] and open_now[False]:
            total += time - before
        open_now[crossing] += step
        before = time
    return total


def rows_of(spans: list[Span], least: float) -> list[tuple[int, Span]]:
    """Each span with a row of its lane, so that none stands on another; it takes ``least`` for each of its letters."""
    ends: list[float] = []
    placed = []
    for span in sorted(spans, key=lambda span: span.start):
        end = max(span.end, span.start + least * len(span.name))
        row = next((row for row, free in enumerate(ends) if free <= span.start), len(ends))
        ends[row : row + 1] = [end]
        placed.append((row, span))
    return placed


def read(path: Path) -> dict[str, Any]:
    """The record in a file; SystemExit where there is none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        ours = all(len(Span(*span)) for spans in record["timelines"].values() for span in spans)
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise SystemExit(f"{path} is no record of benchmarks/ep_overlap.py")
    return record


WIDTH = 12.0  # inches
LETTER = 0.0052  # a letter's width, of the picture's


def draw(record: dict[str, Any], path: Path) -> None:
    """A panel for each timeline of a record; all have the same scale of time."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            f"no plot: matplotlib is missing (pip install '.[bench]'), then "
            f"python benchmarks/timeline.py {path.with_suffix('.json')}"
        ) from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "timeline"  # the same record gives the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels = {title: [Span(*span) for span in spans] for title, spans in record["timelines"].items()}
    if not any(panels.values()):
        raise SystemExit("no plot: the record's timelines are empty")
    last = max(span.end for spans in panels.values() for span in spans)
    placed = {title: _placed(spans, LETTER * last) for title, spans in panels.items()}
    heights = [sum(lanes.values()) for lanes, _ in placed.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(WIDTH, 1.4 + 0.27 * sum(heights) + 0.4 * len(panels)),
        height_ratios=heights, sharex=True, squeeze=False,
    )  # fmt: skip
    for axis, (title, (lanes, spans)) in zip(axes[:, 0], placed.items(), strict=True):
        _draw_panel(axis, lanes, spans, LETTER * last)
        beside = overlapped(panels[title]) / 1e3
        axis.set_title(f"{title}: {beside:.1f} ms with work beside an exchange", fontsize=10, loc="left")
        axis.set_xlim(0, 1.01 * last / 1e3)
    axes[-1, 0].set_xlabel("milliseconds")
    used = {span.kind for spans in panels.values() for span in spans}
    patches = [Patch(color=color, label=kind) for kind, color in KINDS.items() if kind in used]
    figure.suptitle(record["title"], fontsize=11)
    figure.legend(handles=patches, ncols=len(patches), loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _placed(spans: list[Span], letter: float) -> tuple[dict[str, int], list[tuple[int, Span]]]:
    """How many rows each lane has, and the row of each span, from the top."""
    lanes: dict[str, int] = {}
    placed = []
    for lane in LANES:
        own = [span for span in spans if span.lane == lane]
        rows = rows_of(own, letter) if lane == EXCHANGES else [(0, span) for span in own]
        if rows:
            first = sum(lanes.values())
            lanes[lane] = 1 + max(row for row, _ in rows)
            placed += [(first + row, span) for row, span in rows]
    return lanes, placed


def _draw_panel(axis: Any, lanes: dict[str, int], spans: list[tuple[int, Span]], letter: float) -> None:
    for kind, color in KINDS.items():
        own = [(row, span) for row, span in spans if span.kind == kind]
        for row in sorted({row for row, _ in own}):
            bars = [(span.start / 1e3, (span.end - span.start) / 1e3) for at, span in own if at == row]
            axis.broken_barh(bars, (row + 0.1, 0.8), facecolors=color, edgecolors="white", linewidth=0.3)
    for row, span in spans:
        if span.lane == EXCHANGES or span.end - span.start > letter * (len(span.name) + 1):
            axis.text(span.start / 1e3, row + 0.52, f" {span.name}", fontsize=6.5, va="center", clip_on=True)
    middles, first = [], 0
    for rows in lanes.values():
        axis.axhline(first, color="#dddddd", linewidth=0.6)
        middles.append(first + rows / 2)
        first += rows
    axis.set_yticks(middles, list(lanes), fontsize=8)
    axis.set_ylim(first, 0)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8, labelbottom=True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path, metavar="RECORD.json")
    path = parser.parse_args(arguments).record
    draw(read(path), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
