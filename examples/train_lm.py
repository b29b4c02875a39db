"""Train a small mixture-of-experts language model on text this machine has, and report what it learned.

    python examples/train_lm.py                      # the default text, on a GPU where there is one
    python examples/train_lm.py --text a.txt b.txt   # your own, a domain a file
    python examples/train_lm.py --resume             # go on where Ctrl-C (or a power cut) stopped
    python examples/train_lm.py --dense              # the dense twin, for comparison
    mpirun -n 2 python examples/train_lm.py          # the experts on two processes; a GPU each, or MPI on the CPU

The run's folder (--out) gets checkpoint.pt and report.html. A run is a function of its options and its text:
on a CPU the same command gives the same bits, stopped and resumed or not.
"""

import argparse
import math
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

# The layer's threads and torch's take turns on the same cores, so neither may spin while it waits. OpenMP reads
# this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from ffmoe_core.errors import FFMoEError
from lm.data import TextError, corpus_of, default_corpus
from lm.evaluate import evaluate
from lm.loop import train
from lm.model import ModelConfig
from lm.ranks import Ranks, local_rank, local_size
from lm.report import Sample, write_report
from lm.run import CHECKPOINT, CheckpointError, Run, TrainConfig, read_checkpoint
from lm.sample import as_text, write

HEAD_WIDTH = 32
PROMPT_BYTES, SAMPLE_BYTES = 64, 256
INTERRUPTED = 130  # what a shell expects of a program ended by Ctrl-C

# What a few minutes are enough for: on two CPU cores, and on a data centre's GPU.
SMALL = TrainConfig(
    ModelConfig(width=128, layers=4, heads=4, context=128, experts=8, top_k=2, hidden=128, dense=False),
    steps=1300, batch=6, learning_rate=1e-3, seed=0, text=[],
)  # fmt: skip
LARGE = TrainConfig(
    ModelConfig(width=512, layers=8, heads=16, context=512, experts=16, top_k=2, hidden=512, dense=False),
    steps=1500, batch=32, learning_rate=6e-4, seed=0, text=[],
)  # fmt: skip


class UsageError(Exception):
    """Options that do not fit together or this machine; the message says which."""


def main() -> int:
    args = parse_args()
    try:
        return run(args)
    except (UsageError, TextError, CheckpointError, FFMoEError) as error:
        print(f"train_lm.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_lm.py: interrupted", file=sys.stderr)
        return INTERRUPTED


def run(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    ranks = Ranks(device)
    folder = Path(args.out or ("runs/demo-dense" if args.dense else "runs/demo"))
    if ranks.rank > 0:  # all do the same; only the first is to be seen
        folder = folder / f"rank{ranks.rank}"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if args.resume:
        config, state = read_checkpoint(folder, device, ranks)
        check_same(config, chosen(config, args))
    else:
        config, state = chosen(LARGE if device.type == "cuda" else SMALL, args), None
    if config.batch % ranks.size:
        raise UsageError(f"--batch {config.batch} is not a multiple of the {ranks.size} processes")
    corpus = corpus_of(config.text) if config.text else default_corpus()
    training = Run(config, corpus, device, ranks)
    if state is None:
        prepare(folder)
    else:
        training.restore(state)

    introduce(training)
    if not train(training, folder):
        print(
            f"\nStopped after step {training.step} of {config.steps}. Go on with: "
            f"{resume_command(folder, ranks, args.device)}"
        )
        return INTERRUPTED
    finish(training, folder)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="+", metavar="FILE", help="train on these files, a domain each")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (runs/demo, or runs/demo-dense)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dense", action="store_true", default=None, help="one wide block for K experts")
    for name, meaning in [
        ("steps", "optimizer steps"),
        ("batch", "windows a step"),
        ("context", "bytes a window"),
        ("layers", "transformer blocks"),
        ("width", f"of a token; a multiple of {HEAD_WIDTH}"),
        ("experts", "experts a layer"),
        ("top-k", "experts a token"),
        ("hidden", "width inside an expert"),
    ]:
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=meaning)
    parser.add_argument("--seed", type=seed, metavar="N", help="of the weights and of the text's order")
    parser.add_argument("--learning-rate", type=rate, metavar="X", help="the highest, after the warm-up")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**31 - 1")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a finite number above 0")
    return value


def choose_device(name: str | None) -> torch.device:
    if name is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if name in (None, "cuda"):
        # every process finds this out, so that none waits for another
        if local_size() > torch.cuda.device_count() > 0:
            raise UsageError(
                f"{local_size()} processes on this machine need a GPU each, and {torch.cuda.device_count()} can be "
                "used: start no more processes than GPUs, or use --device cpu"
            )
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device {name} is neither cpu nor cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def chosen(base: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    """``base`` with the options given on the command line."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    model = replace(base.model, **{name: given[name] for name in asdict(base.model) if name in given})
    if model.width % HEAD_WIDTH:
        raise UsageError(f"--width {model.width} is not a multiple of {HEAD_WIDTH}, the width of a head")
    model = replace(model, heads=model.width // HEAD_WIDTH)
    own = ("steps", "batch", "learning_rate", "seed", "text")
    return replace(base, model=model, **{name: given[name] for name in own if name in given})


def check_same(saved: TrainConfig, wanted: TrainConfig) -> None:
    """Raise UsageError where an option contradicts the checkpoint: the loss curve could not go on."""
    before, now = flat(saved), flat(wanted)
    differing = [
        f"--{name.replace('_', '-')} is {before[name]} there" for name in now if now[name] != before[name]
    ]
    if differing:
        raise UsageError(f"the run to resume has another configuration: {', '.join(differing)}")


def flat(config: TrainConfig) -> dict[str, object]:
    values = asdict(config)
    return values | values.pop("model")


def prepare(folder: Path) -> None:
    """Make the run's folder; a checkpoint found there is kept under another name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from None
    earlier = folder / CHECKPOINT
    if earlier.exists():
        kept = earlier.with_stem(f"{earlier.stem}-before")
        earlier.replace(kept)
        print(f"The earlier run's checkpoint is now {kept}.")


def introduce(training: Run) -> None:
    config, corpus = training.config, training.corpus
    sizes = ", ".join(f"{domain.name} {len(domain.train) / 1e6:.2f} MB" for domain in corpus.domains)
    total, active = training.model.parameter_counts()
    model = config.model
    kind = "dense twin" if model.dense else f"{model.experts} experts, {model.top_k} a byte"
    print(f"Text: {sizes}; a tenth more is held out")
    print(f"Model: {model.layers} layers, {kind}; {total:,} parameters, {active:,} active")
    print(f"Training on {training.device} from step {training.step} to {config.steps}", flush=True)


def finish(training: Run, folder: Path) -> None:
    """Print what was learned, and write the report."""
    config, corpus, device = training.config, training.corpus, training.device
    context = config.model.context
    evaluation = evaluate(training.model, corpus, context, device)
    before, after = training.history.held_out[0][1], training.history.held_out[-1][1]
    print("\nHeld-out bits a byte      before   after")
    rows = [*zip(corpus.names, before, after, strict=True), ("mean", mean(before), mean(after))]
    for name, first, last in rows:
        print(f"  {name:22} {first:7.3f} {last:7.3f}")

    samples = write_samples(training)
    for sample in samples:
        print(f"\n--- {sample.domain} ---\n{sample.prompt}▸{sample.written}")
    write_report(folder / "report.html", training, evaluation, samples)
    print(f"\nReport: {folder / 'report.html'}   Checkpoint: {folder / CHECKPOINT}")


def write_samples(training: Run) -> list[Sample]:
    """Held-out openings that the model continues, one of each domain."""
    context = training.config.model.context
    openings = torch.stack([windows[0] for windows in training.corpus.held_out(context, 1)])
    prompts = openings[:, : min(PROMPT_BYTES, context)].to(training.device)
    written = write(training.model, prompts, SAMPLE_BYTES, context, training.config.seed)
    return [
        Sample(name, as_text(prompt.tolist()), as_text(text.tolist()))
        for name, prompt, text in zip(training.corpus.names, prompts, written, strict=True)
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def resume_command(folder: Path, ranks: Ranks, device: str | None) -> str:
    launcher = ["mpirun", "-n", str(ranks.size)] if ranks.size > 1 else []
    there = [] if device is None else ["--device", device]
    return shlex.join([*launcher, sys.executable, sys.argv[0], "--resume", "--out", str(folder), *there])


if __name__ == "__main__":
    sys.exit(main())
