"""Write README's tables of measurements from the records in benchmarks/results/.

    python benchmarks/readme_tables.py [--check]

A table stands between `<!-- NAME: from ... -->` and `<!-- /NAME -->`. With --check nothing is written, and
the exit status is 1 when README and the records differ.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from record import RESULTS, ROOT

README = ROOT / "README.md"
Record = dict[str, Any]


def cpu_layer(record: Record) -> str:
    contenders = ("ffmoe", "expert loop", "grouped_mm", "bmm bound")
    rows = []
    for shape, result in record["shapes"].items():
        times = [result["median_ms"][name] for name in contenders]
        ratios = [result["ratios"][direction] for direction in ("forward", "forward_backward")]
        rows.append(
            (
                shape.replace(",", ", "),
                *(f"{time['forward']:.1f} / {time['forward_backward']:.1f}" for time in times),
                *(" / ".join(f"{ratio[to]:.2f}" for ratio in ratios) for to in ("to_peer", "to_bound")),
            )
        )
    head = ("T, H, I, E, K", *contenders, "ffmoe : faster peer", "ffmoe : bound")
    legend = f"Milliseconds and ratios, forward / forward+backward, on {record['threads']} threads."
    return f"{table(head, rows)}\n\n{legend}"


def host_time(record: Record) -> str:
    bars = {
        "layer forward": record["bars_us"]["forward"],
        "layer forward+backward": record["bars_us"]["forward_backward"],
    }
    rows = [
        (name, f"{median:.0f}", f"{bars[name]:.0f}" if name in bars else "")
        for name, median in record["median_us"].items()
    ]
    return table(("one call", "median, us", "aim, us"), rows)


# the six products and the two gather-and-sums: nearly all of a layer's time
MAIN_STAGES = (
    "up", "down", "combine", "d-activation", "dW_down", "dW_up", "d-input", "combine dx",
)  # fmt: skip


def layer(record: Record) -> str:
    """Times beside the peers' and the bound, the same under skewed routing, and stages beside their floors."""
    peers = ("ffmoe", "sonicmoe", "grouped_mm", "bound")
    portable: list[tuple[str, ...]] = []
    balanced, skewed, stages = [], [], []
    for name, shape in record["shapes"].items():
        sizes = ", ".join(str(shape[size]) for size in "THIEK")
        for routing, result in shape["routing"].items():
            contenders = result["contenders"]
            times = tuple(both_ways(contenders.get(peer)) for peer in peers)
            ratios = both_ways(contenders.get("ffmoe"), contenders.get("bound"))
            if routing == "balanced":
                kept = (
                    mib(contenders[peer]["kept_bytes"]) if peer in contenders else "" for peer in peers[:2]
                )
                balanced.append((name, sizes, *times, ratios, *kept))
                if "ffmoe_portable" in contenders:
                    row = contenders["ffmoe_portable"]
                    portable.append((name, both_ways(row), both_ways(row, contenders.get("bound"))))
                reached = (result.get("stages", {}).get(stage, {}) for stage in MAIN_STAGES)
                stages.append((name, *(f"{row['of_floor']:.0%}" if row else "" for row in reached)))
            else:
                share = f"{result['rows_an_expert']['largest_share']:.1%}"
                skewed.append((name, routing, share, *times[:3], ratios))
    heads = ("ffmoe", "SonicMoE", "grouped_mm", "bound", "ffmoe : bound")
    parts = [table(("", "T, H, I, E, K", *heads, "ffmoe keeps, MiB", "SonicMoE keeps, MiB"), balanced)]
    if skewed:
        parts.append("Skewed routing; the share is that of the expert with the most rows.")
        parts.append(table(("", "routing", "share", *heads[:3], heads[4]), skewed))
    if portable:
        parts.append("The kernels for every architecture, on the same card in the same run.")
        parts.append(table(("", "ffmoe", "ffmoe : bound"), portable))
    parts.append("Fraction of a stage's floor that is reached, balanced routing.")
    parts.append(table(("", *MAIN_STAGES), stages))
    parts.append("![Time by stage, and every contender's ratio to the bound](benchmarks/results/layer.svg)")
    return "\n\n".join(parts)


def few_tokens(record: Record) -> str:
    """Forward calls that mostly read weights, beside the time that reading them takes."""
    rows = []
    for shape in record["shapes"].values():
        T, H, I, E, K = (shape[size] for size in "THIEK")
        times = {
            name: 1e3 * row["forward_no_grad_ms"]
            for name, row in shape["routing"]["balanced"]["contenders"].items()
        }
        used = E * (1 - (1 - K / E) ** T)
        least = used * 3 * H * I * 2 / (shape["ceilings"]["copy_gbps"] * 1e3)
        cells = (times["ffmoe"], times["grouped_mm"], least)
        reached = f"{least / times['ffmoe']:.0%}"
        rows.append((f"{T}, {H}, {I}, {E}, {K}", *(f"{value:.0f}" for value in cells), reached))
    return table(("T, H, I, E, K", "ffmoe", "grouped_mm", "the weights alone", "of that rate"), rows)


def both_ways(row: Record | None, unit: Record | None = None) -> str:
    """Milliseconds forward / forward+backward, or as ratios to another's."""
    keys = ("forward_ms", "forward_backward_ms")
    if not row:
        return ""
    if unit:
        return " / ".join(f"{row[key] / unit[key]:.2f}" for key in keys)
    return " / ".join(f"{row[key]:.2f}" for key in keys)


def expert_parallel(record: Record) -> str:
    """Layers on every rank, and the bytes on the wire."""
    names = {
        "ffmoe": "ffmoe",
        "peer": "grouped_mm",
        "alone": "one GPU, the same rows",
        "+ shared": "with a shared expert",
        "shared alone": "shared expert alone",
    }
    for chunks in ("2 chunks", "4 chunks"):
        if all(chunks in layer["forward"] for layer in record["layers"]):
            names[chunks] = chunks
    rows = []
    for layer in record["layers"]:
        times = [(layer["forward"][name], layer["forward_backward"][name]) for name in names]
        ratios = [[ours / theirs for ours, theirs in zip(times[0], times[i], strict=True)] for i in (1, 2)]
        cells = [" / ".join(f"{value:.2f}" for value in pair) for pair in (*times[:3], *ratios, *times[3:])]
        rows.append((", ".join(map(str, layer["shape"])), *cells))
    wanted = list(names.values())
    head = ("T, H, I, E, K a rank", *wanted[:3], "ffmoe : grouped_mm", "ffmoe : one GPU", *wanted[3:])
    legend = f"Milliseconds and ratios, forward / forward+backward, on {record['ranks']} GPUs."
    wire = [(f"{row['mib']} MiB", *(f"{row[name]:.0f}" for name in WIRE)) for row in record["wire"]]
    wire_legend = "All-to-all: GB/s that a rank sends to others, by what it exchanges."
    return "\n\n".join((table(head, rows), legend, table(("", *WIRE), wire), wire_legend))


def memory_kept(record: Record) -> str:
    rows = [
        (
            name,
            ", ".join(str(row[size]) for size in "THIEK"),
            mib(row["kept_bytes"]),
            mib(row["kept_bytes_recompute"]),
            mib(row["output_bytes"]),
        )
        for name, row in record["shapes"].items()
    ]
    return table(("", "T, H, I, E, K", "kept, MiB", "recomputed, MiB", "of it the output, MiB"), rows)


def gpu_tests(record: Record) -> str:
    rows = []
    for name, step in record["steps"].items():
        counts = ", ".join(f"{step[key]} {key}" for key in ("passed", "failed", "skipped") if key in step)
        outcome = counts or step.get("summary") or ("done" if step["ok"] else step["ended"])
        rows.append((name, "ok" if step["ok"] else "**failed**", outcome))
    return table(("step", "", "outcome"), rows)


WIRE = ("ffmoe", "all_to_all_single")

TABLES: dict[str, Callable[[Record], str]] = {
    "cpu_layer": cpu_layer,
    "expert_parallel": expert_parallel,
    "few_tokens": few_tokens,
    "gpu_tests": gpu_tests,
    "host_time": host_time,
    "layer": layer,
    "memory_kept": memory_kept,
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = (head, tuple("---" for _ in head), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def mib(size: int | None) -> str:
    return "does not fit" if size is None else f"{size / 2**20:,.1f}"


def origin(record: Record) -> str:
    """One line: where and when a record was taken."""
    where = record.get("device") or f"{record['processor']}, {record['cores']} cores"
    driver = f", driver {record['driver']}" if "driver" in record else ""
    shown = ("python", "torch", "cupy-cuda12x", "cupy-cuda13x")
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in shown if name in record["versions"])
    return f"{where}{driver}; {versions}; {record['date']}; sources {record['sources'][:12]}."


def rendered(name: str) -> str:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    record = json.loads(path.read_text())
    return f"{TABLES[name](record)}\n\n{origin(record)}"


def with_tables(text: str) -> str:
    """README with every table as the records have it."""
    for name in TABLES:
        section = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = section.subn(lambda match, name=name: f"{match[1]}{rendered(name)}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"README.md has {found} sections <!-- {name}: ... -->, not 1")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether README is up to date")
    check = parser.parse_args().check
    text = README.read_text()
    wanted = with_tables(text)
    if check and wanted != text:
        print("README.md's tables are not those of benchmarks/results/: run make tables", file=sys.stderr)
        return 1
    if not check:
        README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
