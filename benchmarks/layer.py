"""One layer on a GPU, bfloat16: forward, forward+backward, memory kept and time by stage, beside its peers.

    python benchmarks/layer.py [A ... G | T,H,I,E,K ...] [--routing balanced zipf hot] [--peers ...] [--out FILE]

Every round times each contender (benchmarks/peers.py) once in each direction, in an order drawn anew, so that
a clock that sinks under load falls on all alike. Times are medians, by CUDA events around the call, over
random data; what the L2 cache held is overwritten before each call. Directions:

    forward           the call recording the graph
    forward_no_grad   the call under torch.no_grad()
    forward_backward  with the gradients of the input and of every weight

Routing:

    balanced  random gate weights, so that every expert gets about the same
    zipf      an expert's chance goes as rank^-1.2; a token's experts are distinct, so this is a bit evened
    hot       every token has one expert in common, the most rows one can get: 1/K of all; the rest balanced

Kept is what torch's allocator holds more after forward than before it; the output is in it, the input and
weights are not. A stage's floor is the larger of its operations at the rate of an 8192^3 cuBLAS product and
its bytes, each counted once, at the rate of a copy, both measured just before the shape. The plot
(benchmarks/layer_plot.py) goes beside the record. What is measured of chosen shapes, routings or peers is merged into
a record of the same sources on the same device.
"""

import argparse
import gc
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import layer_plot
from arguments import Shape, chosen_shape, previous
from ffmoe_core import grouped_gemm
from memory_kept import SHAPES
from peers import CONTENDERS, Contender, Problem, UnavailableError, reference, versions
from record import RESULTS, environment, sources_digest, write

ROUTINGS = ("balanced", "zipf", "hot")
DIRECTIONS = ("forward", "forward_no_grad", "forward_backward")
ZIPF_EXPONENT = 1.2
WARM_UP, ROUNDS, PROFILED = 3, 15, 7
L2_BYTES = 256 * 2**20  # more than any GPU's


# --- time ---


class Clock:
    """Times calls on the GPU in milliseconds, with a cold L2 cache."""

    def __init__(self) -> None:
        self.cache = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")

    def start(self, call: Callable[[], object]) -> Callable[[], float]:
        """Queue one call; the function returned waits for it and tells its time."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        before.record()
        call()
        after.record()

        def finish() -> float:
            after.synchronize()
            return float(before.elapsed_time(after))

        return finish

    def median(self, call: Callable[[], object]) -> float:
        for _ in range(WARM_UP):
            call()
        pending = [self.start(call) for _ in range(ROUNDS)]
        return statistics.median(finish() for finish in pending)


def ceilings(clock: Clock) -> dict[str, float]:
    """What the card does today: bfloat16 TFLOP/s of an 8192^3 product by cuBLAS, and by grouped_gemm with one
    group, weights as [N, K] and as [K, N]; GB/s read plus written of a copy."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    offsets = torch.tensor([0, size], dtype=torch.int32, device="cuda")
    out = torch.empty_like(a)
    products = {
        "product_tflops": lambda: torch.mm(a, b.T, out=out),
        "grouped_gemm_nk_tflops": lambda: grouped_gemm(a, b[None], offsets, out=out, validate=False),
        "grouped_gemm_kn_tflops": lambda: grouped_gemm(
            a, b[None], offsets, transpose_b=False, out=out, validate=False
        ),
    }
    rates = {name: round(2 * size**3 / clock.median(product) / 1e9, 1) for name, product in products.items()}
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = clock.median(lambda: target.copy_(source))
    return {**rates, "copy_gbps": round(2 * source.numel() / copy_ms / 1e6, 1)}


def direction_calls(contender: Contender) -> dict[str, Callable[[], object]]:
    @torch.no_grad()
    def forward_no_grad() -> Tensor:
        return contender.forward()

    return dict(zip(DIRECTIONS, (contender.forward, forward_no_grad, contender.gradients), strict=True))


def times(contenders: dict[str, Contender], clock: Clock) -> dict[str, dict[str, float]]:
    """Median milliseconds, by contender and direction."""
    calls = [
        (name, direction, call)
        for name, contender in contenders.items()
        for direction, call in direction_calls(contender).items()
    ]
    for _, _, call in calls:
        for _ in range(WARM_UP):
            call()
    measured: dict[tuple[str, str], list[float]] = {(name, direction): [] for name, direction, _ in calls}
    for _ in range(ROUNDS):
        random.shuffle(calls)
        pending = [((name, direction), clock.start(call)) for name, direction, call in calls]
        for key, finish in pending:
            measured[key].append(finish())
    medians: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for (name, direction), values in measured.items():
        medians[name][f"{direction}_ms"] = round(statistics.median(values), 4)
    return medians


# --- the layer and its routing ---


def problem(shape: Shape, routing: str, weights: tuple[Tensor, Tensor]) -> Problem:
    """Input and gate weights that make the router choose as `routing` says; see the module's text.

    Feature 0 of every token is 1, so that column 0 of the gate is a bias of the logits.
    """
    T, H, _, E, K = shape
    options = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(T, H, **options) * 0.5
    gate = torch.randn(E, H, **options) * 0.02
    if routing != "balanced":
        x[:, 0] = 1
        gate[:, 0] = 0
    if routing == "hot":
        gate[random.randrange(E), 0] = 6  # many times the deviation of a logit, and not all of the weight
    elif routing == "zipf":
        # The K largest of log(chance) + Gumbel noise are K draws by these chances without putting back;
        # the logits' noise is normal, of the same variance.
        gate[:, 1:] *= math.pi / math.sqrt(6) / (0.02 * 0.5 * math.sqrt(H))
        ranks = torch.randperm(E, device="cuda") + 1
        gate[:, 0] = -ZIPF_EXPONENT * ranks.log()
    return Problem(x.requires_grad_(), gate.requires_grad_(), *weights, torch.randn(T, H, **options) * 0.2, K)


def expert_weights(shape: Shape) -> tuple[Tensor, Tensor]:
    _, H, I, E, _ = shape
    options = {"device": "cuda", "dtype": torch.bfloat16}
    w_up, w_down = torch.randn(E, 2 * I, H, **options), torch.randn(E, H, I, **options)
    return w_up.mul_(0.02).requires_grad_(), w_down.mul_(0.02).requires_grad_()


@torch.no_grad()
def load(given: Problem) -> dict[str, float]:
    """How the routed rows fall on the experts, in rows."""
    logits = given.x.float() @ given.gate.float().T
    counts = torch.bincount(logits.topk(given.top_k).indices.flatten(), minlength=len(given.gate))
    return {
        "most": int(counts.max()),
        "mean": int(counts.sum()) / len(counts),
        "least": int(counts.min()),
        "largest_share": round(float(counts.max() / counts.sum()), 4),
    }


# --- results and memory ---


def errors(contender: Contender, given: Problem, wanted: tuple[Tensor, ...]) -> dict[str, float]:
    """Distance from the reference relative to its norm, for the output and every gradient both have.

    A token whose experts were chosen by rounded logits may have got others: `output_median_token`, the median
    over tokens of a token's own relative distance, does not see the few of those.
    """
    names = ("output", "dx", "dgate", "dw_up", "dw_down")
    output = contender.forward()
    found = [output, *torch.autograd.grad(output, contender.inputs, contender.grad_output)]
    same_layout = [True, *(a is b for a, b in zip(contender.inputs, given.inputs, strict=True))]
    distances = {}
    for name, mine, right, comparable in zip(names, found, wanted, same_layout, strict=True):
        if comparable:
            distances[name] = float(norm(mine.detach() - right) / norm(right))
    each = norm(output.detach() - wanted[0], dim=-1) / norm(wanted[0], dim=-1)
    distances["output_median_token"] = float(each.median())
    return {name: float(f"{value:.2e}") for name, value in distances.items()}


def norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float32)


def kept_bytes(contender: Contender) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = contender.forward()
    held = torch.cuda.memory_allocated() - before
    del output
    return held


# --- time by stage ---

# The stage of a kernel from `route` on, by its name and how often it came before.
STAGE_OF = {
    "sort_count": ("sort",),
    "sort_place": ("sort",),
    "sort_select": ("sort",),
    "route": ("route",),
    "route_few": ("route",),
    "route_plan": ("sort",),
    "grouped_glu": ("up",),
    "grouped_gemm": ("down", "d-input"),
    "combine": ("combine",),
    "grouped_glu_backward": ("d-activation",),
    "grouped_gemm_wgrad": ("dW_down", "dW_up", "router dgate"),
    "sum_parts": ("sums",),
    "route_backward_chosen": ("route backward",),
    "dense_gemm": ("router dgate",),
    "router_dx": ("combine dx",),
    "spread": ("router dgate",),
    "chosen_terms": ("router dgate",),
}
ROUTERS = {"route", "route_few"}  # the first after the logits
OTHER = "other"


class ProfileError(Exception):
    """What the profiler saw are not the kernels of so many calls of a layer."""


def stages_of(kernels: list[str]) -> list[str]:
    """The stage of each kernel of one forward+backward, in the order they ran."""
    routed = next(i for i, kernel in enumerate(kernels) if kernel in ROUTERS)
    stages = ["gate logits"] * routed
    seen: Counter[str] = Counter()
    for kernel in kernels[routed:]:
        possible = STAGE_OF.get(kernel, (OTHER,))
        stages.append(possible[min(seen[kernel], len(possible) - 1)])
        seen[kernel] += 1
    return stages


def floors(shape: Shape, measured: dict[str, float]) -> dict[str, float]:
    """Least milliseconds of each stage that has to be."""
    T, H, I, E, K = shape
    R = T * K
    product = R * H * I
    logits, choice = 4 * T * E, 4 * R
    w_up, w_down = 4 * E * I * H, 2 * E * H * I
    used = 1 - (1 - K / E) ** T  # of the experts, by few tokens
    token, row, inside = 2 * T * H, 2 * R * H, 2 * R * I  # x or dO; y or dx by row; a, of which z has two
    gate = 2 * E * H
    # operations, bytes
    work = {
        "gate logits": (2 * T * H * E, token + gate + logits),
        "route": (0, logits + 2 * choice),
        "sort": (0, 5 * choice),
        "up": (4 * product, token + used * w_up + 3 * inside),
        "down": (2 * product, inside + used * w_down + row),
        "combine": (0, row + token),
        "d-activation": (2 * product, token + used * w_down + 5 * inside),
        "dW_down": (2 * product, token + inside + w_down),
        "dW_up": (4 * product, token + 2 * inside + w_up),
        "d-input": (4 * product, 2 * inside + used * w_up + row),
        "route backward": (0, 5 * choice),
        "combine dx": (2 * R * H, row + 2 * choice + gate + token),
        "router dgate": (2 * T * H * E, 2 * choice + token + gate),
    }
    rate, bandwidth = measured["product_tflops"] * 1e9, measured["copy_gbps"] * 1e6  # a millisecond
    return {name: max(flops / rate, size / bandwidth) for name, (flops, size) in work.items()}


def stage_times(call: Callable[[], object], floor: dict[str, float]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each stage in one forward+backward, and the fraction of its floor reached.

    A kernel's blocks come while the one before it ends: its time counts from there.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    events = sorted(
        (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA),
        key=lambda event: event.time_range.start,
    )
    each, rest = divmod(len(events), PROFILED)
    names = [event.name for event in events[:each]]
    if rest or "route_backward_chosen" not in names or not ROUTERS & set(names):
        raise ProfileError(f"{len(events)} kernels in {PROFILED} equal calls, the first ones {names[:30]}")
    calls = [events[at : at + each] for at in range(0, len(events), each)]
    found: dict[str, list[float]] = {}
    for number, stage in enumerate(stages_of(names)):
        spent = found.setdefault(stage, [0.0] * PROFILED)
        for index, kernels in enumerate(calls):
            own = kernels[number].time_range
            start = max(own.start, kernels[number - 1].time_range.end) if number else own.start
            spent[index] += (own.end - start) / 1e3
    stages = {}
    for stage, spent in found.items():
        stages[stage] = {"ms": round(statistics.median(spent), 4)}
        if stage in floor:
            stages[stage]["floor_ms"] = round(floor[stage], 4)
            stages[stage]["of_floor"] = round(floor[stage] / statistics.median(spent), 3)
    return stages


# --- one shape ---


def measure(shape: Shape, routings: list[str], names: list[str], clock: Clock) -> dict[str, Any]:
    """Everything about one shape, by routing."""
    measured = ceilings(clock)
    print(f"  {measured}", flush=True)
    weights = expert_weights(shape)
    results: dict[str, Any] = {}
    for routing in routings:
        given = problem(shape, routing, weights)
        contenders, missing, distances = prepared(given, names)
        medians = times(contenders, clock)
        rows = {
            name: {**medians[name], "kept_bytes": kept_bytes(contender), "errors": distances.get(name)}
            for name, contender in contenders.items()
        }
        result = {"rows_an_expert": load(given), "contenders": rows, "missing": missing}
        if "ffmoe" in contenders:
            try:
                result["stages"] = stage_times(contenders["ffmoe"].gradients, floors(shape, measured))
            except ProfileError as error:
                missing["stages"] = str(error)
        show(routing, result)
        results[routing] = result
        del contenders, given
        release()
    torch.compiler.reset()  # it compiles anew for each shape, and would stop doing so after a few
    return {**dict(zip("THIEK", shape, strict=True)), "ceilings": measured, "routing": results}


def prepared(
    given: Problem, names: list[str]
) -> tuple[dict[str, Contender], dict[str, str], dict[str, dict[str, float]]]:
    """The contenders that run here, why the others don't, and how far each result is from the reference."""
    base = reference(given)
    output = base.forward()
    wanted = (output.detach(), *torch.autograd.grad(output, base.inputs, base.grad_output))
    del output
    contenders, missing, distances = {}, {}, {}
    for name in names:
        try:
            contender = CONTENDERS[name](given)
            for call in direction_calls(contender).values():
                call()
            if name != "bound":
                distances[name] = errors(contender, given, wanted)
            contenders[name] = contender
        except UnavailableError as reason:
            missing[name] = str(reason)
        except Exception as error:
            if name.startswith("ffmoe"):
                raise
            # a peer's failure is its result
            missing[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        release()
    return contenders, missing, distances


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def show(routing: str, result: dict[str, Any]) -> None:
    """Print what was measured under one routing."""
    contenders = result["contenders"]
    bound = contenders.get("bound")
    print(f"  {routing}: rows an expert {result['rows_an_expert']}")
    for name, row in contenders.items():
        line = f"    {name:16}"
        for direction in DIRECTIONS:
            ms = row[f"{direction}_ms"]
            line += f" {ms:8.3f} ms" + (f" {ms / bound[f'{direction}_ms']:5.2f}x" if bound else "")
        print(f"{line}   kept {row['kept_bytes'] / 2**20:8.1f} MiB")
        if row["errors"]:
            print(f"    {'':16} off by {row['errors']}")
    for name, reason in result["missing"].items():
        print(f"    {name:16} missing: {reason}")
    for stage, row in result.get("stages", {}).items():
        reached = f"  {row['of_floor']:6.1%} of its floor" if "of_floor" in row else ""
        print(f"      {stage:14} {row['ms']:8.3f} ms{reached}")
    sys.stdout.flush()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "shapes",
        nargs="*",
        type=partial(chosen_shape, known=SHAPES),
        metavar="SHAPE",
        help="A to G or T,H,I,E,K; default: A to G",
    )
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument(
        "--peers", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "layer.json", help="the plot goes beside it")
    return parser.parse_args()


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A shape's record with what was not measured now as it was before."""
    routing = before.get("routing", {}) | now["routing"]
    for name, result in now["routing"].items():
        contenders = before.get("routing", {}).get(name, {}).get("contenders", {}) | result["contenders"]
        routing[name] = result | {"contenders": contenders}
    return now | {"routing": routing}


def main() -> None:
    arguments = parsed()
    if not torch.cuda.is_available():
        raise SystemExit("layer.py measures a layer on an NVIDIA GPU, and there is none here")
    random.seed(0)
    torch.manual_seed(0)
    clock = Clock()
    head = {**environment(), "sources": sources_digest(), "dtype": "bfloat16", "rounds": ROUNDS}
    head["versions"] |= versions()
    print(head["device"], head["versions"], flush=True)
    everything = (
        not arguments.shapes and arguments.routing == list(ROUTINGS) and arguments.peers == list(CONTENDERS)
    )
    shapes = {} if everything else previous(arguments.out, head)
    for name, shape in arguments.shapes or SHAPES.items():
        print(name, shape, flush=True)
        shapes[name] = merged(shapes.get(name, {}), measure(shape, arguments.routing, arguments.peers, clock))
        release()
        # after each shape, so that a run cut short leaves what it had
        write(arguments.out, {**head, "shapes": dict(sorted(shapes.items()))})
    layer_plot.main([str(arguments.out)])


if __name__ == "__main__":
    main()
