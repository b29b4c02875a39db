"""Text as bytes: gathered by domain, split into training and held-out text, dealt out in batches."""

import hashlib
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.1  # of each domain's bytes
SMALLEST_DOMAIN = 32 * 1024  # bytes; what this machine has less of is left out of the default text
NOT_PROSE = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages",
             "test", "tests", "turtledemo"}  # fmt: skip


class TextError(Exception):
    """The text asked for cannot be trained on; the message says which and why."""


@dataclass(frozen=True)
class Domain:
    """One kind of text: ``train`` and ``held_out`` are 1-D uint8 tensors of different documents."""

    name: str
    train: Tensor
    held_out: Tensor


class Corpus:
    """All domains, and the batches they make.

    A batch is a function of the seed and the step alone, so a run that is resumed reads on as if it had
    never stopped.
    """

    def __init__(self, domains: list[Domain]) -> None:
        self.domains = domains
        self.train = torch.cat([domain.train for domain in domains])
        sizes = torch.tensor([len(domain.train) for domain in domains])
        self.starts = sizes.cumsum(0) - sizes
        self.sizes = sizes
        # Small domains are read more often than their size says, or the largest would be all there is.
        self.shares = sizes.double().sqrt() / sizes.double().sqrt().sum()

    @property
    def names(self) -> list[str]:
        return [domain.name for domain in self.domains]

    @property
    def digest(self) -> str:
        """Names this exact text: a run can only be resumed on what it was started with."""
        parts = hashlib.sha256()
        for domain in self.domains:
            parts.update(domain.name.encode())
            parts.update(domain.train.numpy().tobytes())
            parts.update(domain.held_out.numpy().tobytes())
        return parts.hexdigest()[:16]

    def check_context(self, context: int) -> None:
        """Raise TextError where a domain is too short for one window of ``context`` bytes."""
        for domain in self.domains:
            shortest = min(len(domain.train), len(domain.held_out))
            if shortest <= context:
                raise TextError(
                    f"{domain.name}: a tenth of this text is held out, which leaves a part of {shortest} "
                    f"bytes; a context of {context} needs more: use a longer text or a smaller --context"
                )

    def batch(self, seed: int, step: int, rows: int, context: int) -> Tensor:
        """Windows for one step: int64 [rows, context + 1], each from one domain at a random place."""
        generator = torch.Generator().manual_seed((seed << 32) + step)
        domain = torch.multinomial(self.shares, rows, replacement=True, generator=generator)
        place = torch.rand(rows, generator=generator, dtype=torch.float64)
        offset = self.starts[domain] + (place * (self.sizes[domain] - context)).long()
        return self.train[offset[:, None] + torch.arange(context + 1)].long()

    def held_out(self, context: int, windows: int) -> list[Tensor]:
        """For each domain at most ``windows`` windows, evenly spread: int64 [windows, context + 1]."""
        return [_spread(domain.held_out, context + 1, windows) for domain in self.domains]


def default_corpus() -> Corpus:
    """The text every Python brings, and what its machine has beside it."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = {
        "python docs": [text.encode() for _, text in sorted(pydoc_data.topics.topics.items())],
        "python code": _read(
            path for path in library.rglob("*.py") if not NOT_PROSE & set(path.relative_to(library).parts)
        ),
        "character tables": _read((library / "encodings").glob("*.py")),
        "C headers": _read(Path(sysconfig.get_path("include")).rglob("*.h")),
        "licences": _read([*Path("/usr/share/common-licenses").glob("*"), *library.glob("LICENSE*")]),
    }
    found = {name: texts for name, texts in sources.items() if sum(map(len, texts)) >= SMALLEST_DOMAIN}
    return Corpus([split(name, texts) for name, texts in found.items()])


def corpus_of(files: list[str]) -> Corpus:
    """The user's own text, a domain a file."""
    domains = []
    for file in files:
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise TextError(f"cannot read {file}: {error.strerror}") from None
        name = Path(file).stem
        taken = {domain.name for domain in domains}
        domains.append(split(file if name in taken else name, [content]))
    return Corpus(domains)


def split(name: str, documents: list[bytes]) -> Domain:
    """Hold out whole documents, up to a tenth of the bytes, chosen by digest: the same on every machine."""
    total = sum(map(len, documents))
    pieces = [piece for document in documents for piece in _cut(document, limit=max(1, total // 20))]
    by_digest = sorted(range(len(pieces)), key=lambda i: hashlib.sha256(pieces[i]).digest())
    room = int(total * HELD_OUT)
    held_out = set()
    for i in by_digest:
        if len(pieces[i]) <= room:
            held_out.add(i)
            room -= len(pieces[i])
    return Domain(
        name,
        train=_tensor(piece for i, piece in enumerate(pieces) if i not in held_out),
        held_out=_tensor(piece for i, piece in enumerate(pieces) if i in held_out),
    )


def _read(paths: Iterable[Path]) -> list[bytes]:
    """The files' contents in order of path, each content once (licences are often links to each other)."""
    contents = (path.read_bytes() for path in sorted(paths) if path.is_file())
    return list(dict.fromkeys(contents))


def _cut(document: bytes, limit: int) -> list[bytes]:
    """The document in equal pieces of at most ``limit`` bytes, so that one long file can be split too."""
    parts = max(1, -(-len(document) // limit))
    return [document[len(document) * i // parts : len(document) * (i + 1) // parts] for i in range(parts)]


def _tensor(pieces: Iterable[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(pieces), dtype=np.uint8).copy())


def _spread(text: Tensor, length: int, windows: int) -> Tensor:
    count = min(windows, len(text) // length)
    starts = torch.linspace(0, len(text) - length, count, dtype=torch.float64).long()
    return text[starts[:, None] + torch.arange(length)].long()
