"""A training run: its state, one step of it, and the checkpoint that lets it go on as if never stopped."""

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffmoe_torch import full_state_dict

from .data import Corpus
from .model import VOCABULARY, ByteModel, ModelConfig
from .ranks import Ranks

CHECKPOINT = "checkpoint.pt"
STATE = {  # what a checkpoint holds
    "config": dict,
    "text_digest": str,
    "ranks": int,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "history": dict,
}
WARMUP = 0.05  # of all steps
COOLDOWN = 0.5
CLIP_NORM = 1.0


class CheckpointError(Exception):
    """A checkpoint cannot be read, or belongs to another run; the message says which."""


@dataclass(frozen=True)
class TrainConfig:
    """What a run is, besides its text: the model's sizes, and how it is trained."""

    model: ModelConfig
    steps: int
    batch: int
    learning_rate: float
    seed: int
    text: list[str]  # the user's files; none: the default text

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        return cls(**{**values, "model": ModelConfig(**values["model"])})


@dataclass
class History:
    """What the report plots. Everything is in bits a byte; ``held_out`` has a value for each domain."""

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, list[float]]] = field(default_factory=list)
    seconds: float = 0.0


class Run:
    """A model in training. Batches and learning rate follow from the step, so the state is small."""

    def __init__(self, config: TrainConfig, corpus: Corpus, device: torch.device, ranks: Ranks) -> None:
        corpus.check_context(config.model.context)
        torch.manual_seed(config.seed)
        self.config = config
        self.corpus = corpus
        self.device = device
        self.ranks = ranks
        self.model = ByteModel(config.model).to(device)
        ranks.shard(self.model)
        self.optimizer = make_optimizer(self.model)
        self.step = 0
        self.history = History()

    def advance(self) -> Tensor:
        """One step; returns its loss in bits a byte, on the device, so that nothing waits for it."""
        config = self.config
        tokens = self.corpus.batch(config.seed, self.step, config.batch, config.model.context)
        tokens = self.ranks.own(tokens).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        with autocast(self.device):
            logits, aux_loss = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().view(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        (loss + aux_loss).backward()
        loss = self.ranks.average(self.model, loss)
        self.ranks.clip(self.model, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach() / math.log(2)

    def save(self, folder: Path) -> None:
        """Write the checkpoint whole or not at all: a run killed here keeps the one before."""
        state = {
            "config": asdict(self.config),
            "text_digest": self.corpus.digest,
            "ranks": self.ranks.size,
            "step": self.step,
            "model": full_state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
        }
        unfinished = folder / f"{CHECKPOINT}.part"
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / CHECKPOINT)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state. Raises CheckpointError where it was trained on other text."""
        if state["text_digest"] != self.corpus.digest:
            raise CheckpointError(
                "the text is not the one this run was started with (a --text file changed, or another Python "
                "with other sources runs this now); its loss curve cannot be continued"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.history = History(**state["history"])


def read_checkpoint(folder: Path, device: torch.device, ranks: Ranks) -> tuple[TrainConfig, dict[str, Any]]:
    """The checkpoint in ``folder``, this rank's: its configuration and its state.

    Raises CheckpointError, on every rank, where one has none or it is damaged or not one of ours, where they are not
    all of one step of one run, and where the run had another number of ranks.
    """
    wrong = moment = ""
    try:
        config, state = _read(folder, device)
        moment = f"step {state['step']} of {config}, text {state['text_digest']}"
        if state["ranks"] != ranks.size:
            wrong = (
                f"the run was started with {state['ranks']} processes, this one has {ranks.size}; the "
                "optimizer's state is of another share of the experts"
            )
    except CheckpointError as error:
        wrong = str(error)
    if wrongs := [text for text in ranks.gather(wrong) if text]:
        raise CheckpointError(wrongs[0])
    if len(set(ranks.gather(moment))) > 1:
        raise CheckpointError("the processes' checkpoints are not of the same step of one run")
    return config, state


def _read(folder: Path, device: torch.device) -> tuple[TrainConfig, dict[str, Any]]:
    path = folder / CHECKPOINT
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        check_state(state)
        return TrainConfig.from_dict(state["config"]), state
    except FileNotFoundError:
        raise CheckpointError(f"nothing to resume: there is no {path}") from None
    except Exception as error:  # torch.load raises all kinds, by what the file happens to hold
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is not a checkpoint this script can read ({reason})") from None


def check_state(state: object) -> None:
    """Raise TypeError where this is not what ``Run.save`` writes, as far as types tell."""
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(state).__name__}, not a run's state")
    wrong = [name for name, kind in STATE.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise TypeError(f"it has no {', '.join(wrong)} of a run")


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, a plateau, and a linear cool-down to zero."""
    up = (step + 1) / (WARMUP * config.steps)
    down = (config.steps - step) / (COOLDOWN * config.steps)
    return config.learning_rate * min(1.0, up, down)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; on a CPU everything stays float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
