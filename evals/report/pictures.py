"""A report's pictures: SVG by matplotlib, in colours that the page sets, so that light and dark are both readable."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llmlite.evals.report.views import Picture, pick

Evaluations = Mapping[str, Mapping[str, Any]]
# Colours that stand for those of the page: each becomes a CSS variable in the SVG.
INK, FAINT = "#0a0b0c", "#1a1b1c"
SERIES = ("#aa0001", "#aa0002", "#aa0003", "#aa0004", "#aa0005", "#aa0006")
VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)"} | {c: f"var(--s{n})" for n, c in enumerate(SERIES, 1)}
MARKERS = "osD^vP"
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "llmlite", "text.parse_math": False, "font.size": 9,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": FAINT, "axes.grid": True,
    "axes.axisbelow": True, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "legend.fontsize": 8, "lines.linewidth": 1.8,
}  # fmt: skip
SIZE = (4.8, 3.2)  # inches: two stand side by side on a screen, one on a phone
GIB = 2**30
CARD = 8  # GiB
SHORT = 26  # letters of a name in a picture


def draw(caption: str, paint: Callable[[Any], None]) -> Picture:
    """One set of axes, painted by ``paint``, as an SVG element whose ids are its own."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE, layout="constrained")
        paint(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(_for_page(out.getvalue(), caption), caption)


def _for_page(svg: str, caption: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    mark = "p" + "".join(re.findall("[a-z]", caption.lower()))[:24]
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{mark}-", svg)
    return svg.strip()


def short(name: str) -> str:
    """A name as a picture can hold it, in printable letters, its end kept."""
    name = "".join(character for character in name if character.isprintable()) or "?"
    return name if len(name) <= SHORT else f"…{name[-SHORT + 1 :]}"


def _legend(axes: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    if len(names) > 1:
        axes.legend(handles, [short(name).lstrip("_") or "?" for name in names], loc="best")


def _plain(value: float, _: int) -> str:
    return f"{value:g}" if abs(value) < 10_000 else f"{value / 1024:g}K" if value % 1024 == 0 else f"{value:,.0f}"


def _scale(axis: Any, log: bool) -> None:
    if log:
        axis.axes.set_yscale("log")
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(_plain))


def size_quality(evaluations: Evaluations) -> Picture | None:
    """Mean KL, or without a base the perplexity, against bytes: a point per artifact; None below two points."""
    for group, key, label in (
        ("divergence", "mean_kl", "mean KL over texts (nats)"), ("perplexity", "value", "mean perplexity over texts"),
    ):  # fmt: skip
        points = {}
        for name, facts in evaluations.items():
            found = [pick(of, f"{group}.{key}") for of in facts.get("texts", {}).values()]
            found = [value for value in found if value is not None]
            if found and facts.get("bytes"):
                points[name] = (facts["bytes"] / 1e6, sum(found) / len(found))
        if len(points) > 1:
            return draw("Size against quality: lower left is better", partial(_points, points=points, label=label))
    return None


def _points(axes: Any, points: Mapping[str, tuple[float, float]], label: str) -> None:
    middle = sum(x for x, _ in points.values()) / len(points)
    for number, (name, (x, y)) in enumerate(points.items()):
        axes.scatter([x], [y], color=SERIES[number % 6], marker=MARKERS[number % 6], s=46, zorder=3)
        left = x <= middle
        axes.annotate(
            short(name), (x, y), xytext=(7 if left else -7, 4), textcoords="offset points", fontsize=8,
            ha="left" if left else "right", va="bottom",
        )  # fmt: skip
    values = [y for _, y in points.values()]
    _scale(axes.yaxis, min(values) > 0 and max(values) / min(values) > 5)
    axes.margins(0.12, 0.16)
    axes.set_xlabel("on disk (MB)")
    axes.set_ylabel(label)


def by_text(evaluations: Evaluations) -> Picture | None:
    """Mean KL per text, a bar per artifact with twice its standard error."""
    apart = {
        name: {text: of["divergence"] for text, of in facts.get("texts", {}).items() if of.get("divergence")}
        for name, facts in evaluations.items()
    }
    apart = {name: of for name, of in apart.items() if of}
    texts = list(dict.fromkeys(text for of in apart.values() for text in of))
    if not texts:
        return None

    def paint(axes: Any) -> None:
        high = 0.8 / len(apart)
        handles = []
        for number, of in enumerate(apart.values()):
            places = [row + (number - (len(apart) - 1) / 2) * high for row, text in enumerate(texts) if text in of]
            values = [of[text]["mean_kl"] for text in texts if text in of]
            errors = [2 * of[text].get("stderr", 0) for text in texts if text in of]
            handles.append(axes.barh(places, values, high * 0.9, color=SERIES[number % 6]))
            axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
        axes.set_yticks(range(len(texts)), [short(text) for text in texts])
        beside = max(0.0, (3 - len(texts)) / 2)  # a single bar would be a block
        axes.set_ylim(len(texts) - 0.5 + beside, -0.5 - beside)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("mean KL (nats) ± 2 standard errors")
        _legend(axes, handles, list(apart))

    return draw("Divergence by text", paint)


def by_position(evaluations: Evaluations, group: str, label: str) -> Picture | None:
    """A figure over ranges of positions: a line per artifact, over all texts, weighted by their tokens."""
    lines = {}
    for name, facts in evaluations.items():
        buckets: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for of in facts.get("texts", {}).values():
            for one in pick(of, f"{group}.by_position") or []:
                buckets.setdefault((one["start"], one["stop"]), []).append((one["tokens"], one["value"]))
        if buckets:
            lines[name] = [
                ((start + stop) / 2, sum(n * value for n, value in of) / sum(n for n, _ in of))
                for (start, stop), of in sorted(buckets.items())
            ]
    if not lines:
        return None

    def paint(axes: Any) -> None:
        handles = []
        for number, points in enumerate(lines.values()):
            handles += axes.plot(*zip(*points, strict=True), color=SERIES[number % 6], marker=MARKERS[number % 6], ms=4)
        axes.set_xlabel("position in the window (tokens before)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        _scale(axes.yaxis, log=False)
        _legend(axes, handles, list(lines))

    return draw(f"{'Divergence' if group == 'divergence' else 'Perplexity'} by position", paint)


def memory(evaluations: Evaluations) -> Picture | None:
    """Weights and cache against context as a line, measured peaks as points, the 8 GiB of a small card across."""
    known = {
        name: facts["memory"] for name, facts in evaluations.items()
        if pick(facts, "memory.weights") is not None and pick(facts, "memory.kv_per_token") is not None
    }  # fmt: skip
    if not known:
        return None

    def paint(axes: Any) -> None:
        contexts = [2**power for power in range(9, 18)]
        seen, handles = [float(CARD)], []
        for number, of in enumerate(known.values()):
            colour = SERIES[number % 6]
            line = [(of["weights"] + cache_at(of, context)) / GIB for context in contexts]
            handles += axes.plot(contexts, line, color=colour)
            peaks = [(at["context"], at["peak"] / GIB) for at in of.get("contexts") or [] if at.get("peak")]
            if peaks:
                axes.scatter(*zip(*peaks, strict=True), color=colour, marker=MARKERS[number % 6], s=36, zorder=3)
            seen += [*line, *(y for _, y in peaks)]
        axes.axhline(CARD, color=INK, linestyle="--", linewidth=1.2)
        _contexts(axes)
        axes.set_yscale("log", base=2)  # a small model and the card's 8 GiB, both readable
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} GiB" if y >= 1 else f"{y * 1024:g} MiB"))
        axes.set_ylim(max(min(seen), 1 / 1024) / 1.4, max(seen) * 1.6)
        axes.annotate("8 GiB", (contexts[0], CARD), xytext=(2, 3), textcoords="offset points", fontsize=8, color=INK)
        _legend(axes, handles, list(known))

    return draw("Memory against context: weights and cache as a line, measured peaks as points", paint)


def cache_at(memory: Mapping[str, Any], context: int) -> float:
    """Bytes of cache at a context: between the measured ones, or beyond them as it grew between the last two.

    With fewer than two, every position counts in every layer, which is too much where layers have a sliding window.
    """
    at = sorted((one["context"], one["kv"]) for one in memory.get("contexts") or [] if one.get("kv") is not None)
    if len(at) < 2:
        return memory["kv_per_token"] * context
    last = next((n for n in range(1, len(at)) if at[n][0] >= context), len(at) - 1)
    (start, low), (stop, high) = at[last - 1], at[last]
    return low + (high - low) * (context - start) / (stop - start)


def speed(evaluations: Evaluations) -> Picture | None:
    """Tokens per second of the answer against context, with the range of the repeats; None below two contexts."""
    known = {name: pick(facts, "speed.contexts") or [] for name, facts in evaluations.items()}
    known = {name: of for name, of in known.items() if len(of) > 1}
    if not known:
        return None

    def paint(axes: Any) -> None:
        handles = []
        for number, of in enumerate(known.values()):
            at = [one["generate_tps"] for one in of]
            middle = [one["median"] for one in at]
            errors = [
                [one["median"] - one["minimum"] for one in at], [one["maximum"] - one["median"] for one in at],
            ]  # fmt: skip
            x, mark = [one["context"] for one in of], MARKERS[number % 6]
            handles.append(
                axes.errorbar(x, middle, yerr=errors, color=SERIES[number % 6], marker=mark, ms=4, capsize=3)
            )
        _contexts(axes)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("answer (tokens per second)")
        _legend(axes, handles, list(known))

    return draw("Speed against context", paint)


def long_context(evaluations: Evaluations) -> Picture | None:
    """Log-probability of the right answers against the length of the context, a line per artifact, over all tasks."""
    lines = {}
    for name, facts in evaluations.items():
        found: dict[int, list[float]] = {}
        for at in (pick(facts, "long_context.tasks") or {}).values():
            for length, of in at.items():
                found.setdefault(int(length), []).append(of["logprob"]["value"])
        if len(found) > 1:
            lines[name] = [(length, sum(values) / len(values)) for length, values in sorted(found.items())]
    if not lines:
        return None

    def paint(axes: Any) -> None:
        handles = []
        for number, points in enumerate(lines.values()):
            handles += axes.plot(*zip(*points, strict=True), color=SERIES[number % 6], marker=MARKERS[number % 6], ms=4)
        _contexts(axes)
        axes.set_ylabel("log-probability per token (nats)")
        _legend(axes, handles, list(lines))

    return draw("The right answer's log-probability against context: higher is better", paint)


def _contexts(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    axes.set_xlabel("context (tokens)")
