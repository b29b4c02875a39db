"""report.html: one page, nothing loaded from anywhere, with what a run learned and what its experts do."""

import math
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

import torch

from . import charts
from .charts import Curve
from .evaluate import Evaluation, first_choices, mutual_information, shares_by_domain
from .run import Run
from .sample import as_text

PAGE = Template((Path(__file__).parent / "report.template.html").read_text())
SMOOTHING = 0.96  # of the training curve, a step
TRACED_BYTES = 400  # of each domain, in windows of the context's length


@dataclass(frozen=True)
class Sample:
    """Held-out text of a domain, and how the model goes on."""

    domain: str
    prompt: str
    written: str


def write_report(path: Path, run: Run, evaluation: Evaluation, samples: list[Sample]) -> None:
    """Write the page for a run whose held-out text gave ``evaluation``."""
    sections = [
        section("Loss", loss_chart(run), "Training batches, raw and smoothed, and held-out text."),
        section("Held-out text by domain", domain_chart(run) + before_after(run)),
        *(expert_sections(run, evaluation) if run.model.moe_layers else []),
        section("What it writes", sample_list(samples), "The model continues held-out text, in bold."),
        section("Configuration", configuration(run)),
    ]
    model = run.config.model
    kind = "dense twin" if model.dense else f"mixture of {model.experts} experts, {model.top_k} a byte"
    page = PAGE.substitute(subtitle=escape(kind), tiles=tiles(run, evaluation), sections="\n".join(sections))
    path.write_text(page, encoding="utf-8")


def section(title: str, body: str, note: str = "") -> str:
    lead = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def tiles(run: Run, evaluation: Evaluation) -> str:
    total, active = run.model.parameter_counts()
    tokens = run.step * run.config.batch * run.config.model.context
    before = mean(run.history.held_out[0][1])
    figures = [
        ("bits a byte", f"{evaluation.mean_bits:.3f}", f"held-out; {before:.2f} before"),
        ("active parameters", f"{active / 1e6:.2f} M", f"of {total / 1e6:.2f} M"),
        ("bytes a second", f"{tokens / run.history.seconds:,.0f}", f"{tokens / 1e6:.2f} million read"),
    ]
    if run.model.moe_layers:
        known = mutual_information(evaluation.load).max().item()
        busiest = (evaluation.load.sum(1) / evaluation.load.sum(1).mean(-1, keepdim=True)).max().item()
        figures.append(("load imbalance", f"{busiest:.2f}", "busiest expert over the mean"))
        figures.append(("specialisation", f"{known:.2f}", "bits told of the domain"))
    return "".join(
        f'<div class="tile"><span>{name}</span><strong>{value}</strong><span>{note}</span></div>'
        for name, value, note in figures
    )


def loss_chart(run: Run) -> str:
    raw = list(enumerate(run.history.train, 1))
    held_out = [(step, mean(bits)) for step, bits in run.history.held_out]
    curves = [
        Curve("", raw, "raw"),
        Curve("training", smoothed(raw), "c1"),
        Curve("held-out", held_out, "c2", dots=True),
    ]
    return charts.line_chart("Loss over the run", "step", "bits a byte", curves)


def domain_chart(run: Run) -> str:
    later = run.history.held_out[1:]  # from where all start alike, all would look alike
    curves = [
        Curve(name, [(step, bits[i]) for step, bits in later], f"c{i % 6 + 1}", dots=True)
        for i, name in enumerate(run.corpus.names)
    ]
    return charts.line_chart("Held-out bits a byte by domain", "step", "bits a byte", curves)


def before_after(run: Run) -> str:
    before, after = run.history.held_out[0][1], run.history.held_out[-1][1]
    rows = [
        (domain.name, f"{len(domain.train):,}", f"{len(domain.held_out):,}", f"{first:.3f}", f"{last:.3f}")
        for domain, first, last in zip(run.corpus.domains, before, after, strict=True)
    ]
    rows.append(("mean", "", "", f"{mean(before):.3f}", f"{mean(after):.3f}"))
    return table(("domain", "training bytes", "held-out bytes", "bits a byte before", "after"), rows)


def expert_sections(run: Run, evaluation: Evaluation) -> list[str]:
    load, names = evaluation.load, run.corpus.names
    layers, domains, experts = load.shape
    layer_names = [f"layer {i + 1}" for i in range(layers)]
    expert_names = [str(i) for i in range(experts)]
    told = mutual_information(load)
    shares = shares_by_domain(load)
    even = 1 / experts
    by_layer = shares.mean(1).tolist()
    best = int(told.argmax())
    others = (shares[best].sum(0) - shares[best]) / max(1, domains - 1)
    domain, expert = divmod(int((shares[best] - others).argmax()), experts)
    panels = ""
    for i, layer in enumerate(layer_names):
        title = f"Expert load by domain, {layer}"
        chart = charts.heatmap(title, shares[i].tolist(), names, expert_names, shares[i].mean(0).tolist())
        caption = f"{layer} <span>tells {told[i]:.2f} bits</span>"
        panels += f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"
    specialised = (
        "Each row is one domain's held-out text, and adds up to 100%. Blue: more than the expert takes of the "
        "average domain; orange: less; without specialisation all would be blank. The expert that a byte goes "
        f"to tells {told[best]:.2f} bits of its domain in {layer_names[best]} ({math.log2(domains):.2f} would "
        f"tell all), {told.mean():.2f} on average over the layers. In {layer_names[best]}, expert {expert} "
        f"takes {shares[best, domain, expert]:.0%} of {escape(names[domain])} and "
        f"{others[domain, expert]:.0%} of the other text."
    )
    return [
        section(
            "Expert load by layer",
            charts.heatmap("Expert load by layer", by_layer, layer_names, expert_names, [even] * experts),
            f"The share of all held-out rows that each expert (0 to {experts - 1}) takes. {even:.1%} is balanced: "
            "blue is more, orange less.",
        ),
        section("Expert load by domain", panels, specialised),
        section(
            "Which expert reads which byte",
            traced_text(run, best),
            f"Held-out text, coloured by each byte's heaviest expert in {layer_names[best]}.",
        ),
    ]


def traced_text(run: Run, layer: int) -> str:
    experts = run.config.model.experts
    parts = ['<p class="key">' + "".join(mark(str(e), e, experts) for e in range(experts)) + "</p>"]
    context = run.config.model.context
    for domain in run.corpus.domains:
        windows = max(1, min(TRACED_BYTES, len(domain.held_out)) // context)
        start = (len(domain.held_out) - windows * context) // 2
        tokens = domain.held_out[start : start + windows * context].long().view(windows, context)
        chosen = first_choices(run.model, tokens, run.device)[layer].flatten().tolist()
        text = tokens.flatten().tolist()
        for i in range(1, len(text)):
            if 0x80 <= text[i] < 0xC0:  # inside a character of several bytes, which cannot be cut
                chosen[i] = chosen[i - 1]
        alike = groupby(zip(chosen, text, strict=True), key=lambda pair: pair[0])
        marked = [mark(as_text(byte for _, byte in group), expert, experts) for expert, group in alike]
        parts.append(f"<h3>{escape(domain.name)}</h3><pre>{''.join(marked)}</pre>")
    return "".join(parts)


def mark(content: str, expert: int, experts: int) -> str:
    return f'<mark style="--hue:{360 * expert // experts}" title="expert {expert}">{escape(content)}</mark>'


def sample_list(samples: list[Sample]) -> str:
    return "".join(
        f"<h3>{escape(sample.domain)}</h3><pre>{escape(sample.prompt)}<b>{escape(sample.written)}</b></pre>"
        for sample in samples
    )


def configuration(run: Run) -> str:
    config, model = run.config, run.config.model
    feed_forward = (
        f"dense, {model.top_k * model.hidden} wide inside"
        if model.dense
        else f"{model.experts} experts {model.hidden} wide inside, {model.top_k} a byte"
    )
    rows = [
        ("layers", f"{model.layers}, {model.width} wide, {model.heads} heads, context {model.context}"),
        ("feed-forward", feed_forward),
        ("load-balance loss", f"coefficient {model.aux_loss_coeff:g}"),
        ("training", f"{config.steps:,} steps of {config.batch} windows, AdamW at {config.learning_rate:g}"),
        ("seed", str(config.seed)),
        ("text", ", ".join(config.text) or "what this machine has"),
        ("device", device_name(run.device)),
        ("time in training steps", f"{run.history.seconds:.0f} s"),
        ("torch", torch.__version__),
    ]
    return table(("", ""), rows)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"

    top = f"<thead>{cells('th', head)}</thead>" if any(head) else ""
    return f"<table>{top}<tbody>{''.join(cells('td', row) for row in rows)}</tbody></table>"


def smoothed(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """An exponential average that starts without a bias towards its first value."""
    total = weight = 0.0
    curve = []
    for x, y in points:
        total = SMOOTHING * total + (1 - SMOOTHING) * y
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        curve.append((x, total / weight))
    return curve


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
