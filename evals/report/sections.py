"""What a report says, as plain sections of tables and pictures, from which every kind of page is made.

A section whose figures nobody measured says so. Everything in it is plain text, escaped where it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmlite.evals.gate import Verdict, number
from llmlite.evals.lightness_table import WORDS, threshold
from llmlite.evals.report import pictures
from llmlite.evals.report.tokens import worst_table
from llmlite.evals.report.views import Section, Table, flat, percent, pick, share, size, spread, with_error

Evaluations = Mapping[str, Mapping[str, Any]]
KEYS_OF_MEMORY = ("weights", "kv_per_token", "peak", "program")
SIZES_OF_LIGHTNESS = ("bytes", "weights", "memory", "kv")


def sections(evaluations: Evaluations, verdicts: Sequence[Verdict]) -> list[Section]:
    """Every section in the page's order."""
    measured = (
        _quality, _divergence, _perplexity, _positions, _worst, _memory, _speed, _tasks, _long_context, _lightness,
    )  # fmt: skip
    return [
        *(make(evaluations) for make in measured), _gate(verdicts), _structure(evaluations), _how(evaluations),
    ]  # fmt: skip


def headline(name: str, facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that stand first: (what, figure, remark) of one artifact."""
    out = [("on disk", size(facts.get("bytes")), ""), ("bits per weight", number(facts.get("bits_per_weight")), "")]
    texts = facts.get("texts", {})
    apart = {text: of["divergence"] for text, of in texts.items() if of.get("divergence")}
    if apart:
        worst = max(apart, key=lambda text: apart[text].get("mean_kl", 0))
        out.append(("mean KL from the base", f"{number(apart[worst].get('mean_kl'))} nats", worst))
        out.append(("same top token", percent(apart[worst].get("same_top")), worst))
    elif texts:
        text = next(iter(texts))
        out.append(("perplexity", number(pick(texts[text], "perplexity.value")), text))
    if pick(facts, "memory.peak") is not None:
        out.append(("peak memory", size(pick(facts, "memory.peak")), str(pick(facts, "memory.device") or "")))
    if pick(facts, "speed.generate_tps") is not None:
        out.append(("answer", f"{number(pick(facts, 'speed.generate_tps'))} tokens/s", ""))
    return out


def _gate(verdicts: Sequence[Verdict]) -> Section:
    tables = []
    for verdict in verdicts:
        failed = sum(not check.passed for check in verdict.checks)
        said = "passed" if verdict.passed else f"failed: {failed} of {len(verdict.checks)} checks"
        rows = [
            (
                "passed" if check.passed else "FAILED", check.figure, number(check.value), check.limit,
                "" if check.passed else "; ".join(part for part in (check.reason, check.because) if part),
            ) for check in sorted(verdict.checks, key=lambda check: check.passed)
        ]  # fmt: skip
        tables.append(Table(f"{verdict.artifact}: {said}", ("", "figure", "value", "bound", "why"), rows, ("value",)))
    return Section("gate", "The gate's verdict", tables=tables, missing="no rules were given: --rules judges by some")


def _rows(evaluations: Evaluations, group: str, cells: Callable[..., tuple]) -> list[tuple[str, ...]]:
    """A row per artifact and text that has ``group``: names, then ``cells`` of what is in it."""
    return [
        (name, text, *cells(of[group], of))
        for name, facts in evaluations.items()
        for text, of in facts.get("texts", {}).items()
        if of.get(group)
    ]


def _quality(evaluations: Evaluations) -> Section:
    rows = []
    for name, facts in evaluations.items():
        apart = [of["divergence"]["mean_kl"] for of in facts.get("texts", {}).values() if of.get("divergence")]
        rows.append(
            (
                name, str(pick(facts, "engine.name") or "-"), size(facts.get("bytes")),
                number(facts.get("bits_per_weight")), number(facts.get("parameters")),
                number(sum(apart) / len(apart)) if apart else "-",
            )
        )  # fmt: skip
    head = ("artifact", "engine", "on disk", "bits per weight", "parameters", "mean KL over texts")
    return Section(
        "size", "Size against quality", tables=[Table("", head, rows, head[2:])],
        pictures=[picture for picture in [pictures.size_quality(evaluations)] if picture],
        text="KL is the Kullback-Leibler divergence of the artifact's predictions from the base's, in nats: 0 is the "
        "same model.",
    )  # fmt: skip


def _divergence(evaluations: Evaluations) -> Section:
    def cells(apart: Mapping, _: Mapping) -> tuple:
        figures = ("median_kl", "p95_kl", "p99_kl", "p999_kl", "max_kl")
        moved = [share(apart.get(key)) for key in ("mean_delta_p", "rms_delta_p")]
        mean = with_error(apart.get("mean_kl"), apart.get("stderr"))
        return (mean, *(number(apart.get(key)) for key in figures), percent(apart.get("same_top")), *moved)

    head = ("artifact", "text", "mean KL", "median", "95%", "99%", "99.9%", "largest", "same top", "mean Δp", "rms Δp")
    rows = _rows(evaluations, "divergence", cells)
    return Section(
        "divergence", "Divergence from the base by text", tables=[Table("", head, rows, head[2:])] if rows else [],
        pictures=[picture for picture in [pictures.by_text(evaluations)] if picture],
        text="Over all scored tokens, in nats, with percentiles. Same top: the share of tokens for which both like the "
        "same token best. Δp: the change of the correct token's probability, in percentage points.",
        missing="needs --text and --base",
    )  # fmt: skip


def _perplexity(evaluations: Evaluations) -> Section:
    def cells(found: Mapping, of: Mapping) -> tuple:
        base = pick(of, "divergence.base_perplexity")
        change = percent(found["value"] / base - 1, signed=True) if base else "-"
        value = with_error(found.get("value"), found.get("stderr"))
        return (value, number(base), change, number(found.get("tokens")), number(found.get("windows")))

    head = ("artifact", "text", "perplexity", "the base's", "change", "tokens scored", "windows")
    rows = _rows(evaluations, "perplexity", cells)
    tables = [Table("", head, rows, head[2:])] if rows else []
    return Section("perplexity", "Perplexity", tables=tables, missing="needs --text")


def _positions(evaluations: Evaluations) -> Section:
    drawn = [
        pictures.by_position(evaluations, group, label)
        for group, label in (("divergence", "mean KL (nats)"), ("perplexity", "perplexity"))
    ]
    return Section(
        "positions", "By position in the window", pictures=[picture for picture in drawn if picture],
        text="A token's position is the number of tokens it is predicted from. What rises to the right loses long "
        "contexts.", missing="needs --text",
    )  # fmt: skip


def _worst(evaluations: Evaluations) -> Section:
    name, facts = next(iter(evaluations.items()))
    tables = [
        worst_table(f"{name}, {text}", of["divergence"]["worst"])
        for text, of in facts.get("texts", {}).items()
        if pick(of, "divergence.worst")
    ]
    return Section(
        "worst", "The tokens that suffered most", tables=tables, text=f"Of {name}, by KL; the token itself stands "
        "between ⟦ and ⟧.", missing="needs --text and --base",
    )  # fmt: skip


def _memory(evaluations: Evaluations) -> Section:
    main, at, rest = [], [], []
    for name, facts in evaluations.items():
        memory = facts.get("memory") or {}
        if memory:
            main.append((name, str(memory.get("device", "-")), *(size(memory.get(key)) for key in KEYS_OF_MEMORY)))
        for one in memory.get("contexts") or []:
            keys = ("kv", "activations", "peak", "address_space", "reserved", "driver")
            at.append((name, number(one.get("context")), *(size(one.get(key)) for key in keys)))
        others = {key: of for key, of in memory.items() if key not in ("device", "contexts", *KEYS_OF_MEMORY)}
        rest += [(name, *pair) for pair in flat(others)]
        within = facts.get("budget") or {}
        sizes = ("budget", "predicted", "peak", "short_by", "longest_peak")
        rest += [(name, key, size(of) if key in sizes else str(of)) for key, of in within.items() if of is not None]
    head = ("artifact", "device", "weights", "cache per token", "peak", "of it the program")
    more = ("artifact", "context", "cache", "activations", "peak", "address space", "reserved", "driver")
    tables = [Table("", head, main, head[2:])] if main else []
    tables += [Table("at each context", more, at, more[1:])] if at else []
    tables += (
        [Table("predicted, and within a budget", ("artifact", "figure", "value"), rest, ("value",))] if rest else []
    )
    return Section(
        "memory", "Memory against context", tables=tables, missing="needs --memory",
        pictures=[picture for picture in [pictures.memory(evaluations)] if picture],
        text="Beyond the longest context measured the line goes on as the cache grew between the last two. Peaks are "
        "of the whole process.",
    )  # fmt: skip


def _speed(evaluations: Evaluations) -> Section:
    rows = []
    for name, facts in evaluations.items():
        speed = facts.get("speed") or {}
        keys = ("prompt_tps", "generate_tps", "first_token_s", "prompt_joules", "generate_joules")
        for at in speed.get("contexts") or ([speed] if speed else []):
            rows.append((name, number(at.get("context")), *(spread(at.get(key)) for key in keys)))
    head = (
        "artifact", "context", "prompt, tokens/s", "answer, tokens/s", "first token, s", "J per prompt token",
        "J per token",
    )  # fmt: skip
    return Section(
        "speed", "Speed", tables=[Table("", head, rows, head[1:])] if rows else [],
        pictures=[picture for picture in [pictures.speed(evaluations)] if picture],
        text="Medians, with the least and the most of the repeats in brackets; one request at a time.",
        missing="needs --speed",
    )  # fmt: skip


def _tasks(evaluations: Evaluations) -> Section:
    rows = [
        (name, task, *pair)
        for name, facts in evaluations.items()
        for task, of in (facts.get("tasks") or {}).items()
        for pair in flat(_without_items(of))
    ]
    head = ("artifact", "task", "figure", "value")
    tables = [Table("", head, rows, ("value",))] if rows else []
    return Section("tasks", "Tasks", tables=tables, missing="needs --tasks")


def _without_items(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task's figures without each question's own, which a short task has few enough of to be listed."""
    return {
        key: {inner: part for inner, part in of.items() if inner != "items"} if isinstance(of, Mapping) else of
        for key, of in task.items()
    }


def _long_context(evaluations: Evaluations) -> Section:
    rows, settings = [], []
    for name, facts in evaluations.items():
        of = facts.get("long_context") or {}
        lengths = [
            (task, length, found) for task, at in (of.get("tasks") or {}).items() for length, found in at.items()
        ]
        for task, length, found in [*lengths, *([("all", "all", of["all"])] if of.get("all") else [])]:
            cells = [cell for key in ("match", "logprob") for cell in _with_change(found.get(key) or {})]
            rows.append((name, task, str(length), number(found.get("questions")), *cells))
        asked = {key: of[key] for key in ("seed", "text", "text_sha256", "kv", "chat", "against") if key in of}
        settings += [(name, *pair) for pair in flat(asked)]
    head = (
        "artifact", "task", "length", "questions", "matched", "its change", "p", "log-probability", "change", "p of it",
    )  # fmt: skip
    tables = [Table("", head, rows, head[3:])] if rows else []
    tables += [Table("how it was asked", ("artifact", "what", "value"), settings)] if rows and settings else []
    return Section(
        "long_context", "Long context", tables=tables, missing="needs --long-context",
        pictures=[picture for picture in [pictures.long_context(evaluations)] if picture],
        text="Matched: the share of what was asked for that the answers have. Log-probability: of the right answer, "
        "per token, in nats. Changes are against the base on the same questions, p by a sign-flip test.",
    )  # fmt: skip


def _with_change(figure: Mapping[str, Any]) -> tuple[str, str, str]:
    change = figure.get("change") or {}
    return (
        with_error(figure.get("value"), figure.get("stderr")), with_error(change.get("value"), change.get("stderr")),
        number(change.get("p")),
    )  # fmt: skip


def _lightness(evaluations: Evaluations) -> Section:
    figures, classes = [], []
    for name, facts in evaluations.items():
        light = facts.get("lightness") or {}
        known = {key: size(of) if key in SIZES_OF_LIGHTNESS else of for key, of in light.items() if key != "classes"}
        figures += [(name, key.replace("_", " "), value) for key, value in flat(known)]
        for of in (light.get("classes") or {}).values():
            said = {True: "yes", False: "no"}.get(of.get("light"), "not known")
            by = str(of.get("decides", "-"))
            has, asked = (threshold(by, of.get(key, 0)) for key in ("value", "threshold"))
            missing = ", ".join(WORDS.get(key, key) for key in of.get("unknown") or []) or "-"
            about = (str(of.get("name", "-")), str(of.get("about", "-")))
            classes.append((name, *about, said, WORDS.get(by, by), has, asked, missing))
    head = ("artifact", "class", "what it is", "light enough", "decided by", "has", "asked", "not measured")
    tables = [Table("", head, classes, ("has", "asked"))] if classes else []
    tables += [Table("", ("artifact", "figure", "value"), figures, ("value",))] if figures else []
    return Section("lightness", "Light enough for which machine", tables=tables, missing="needs --lightness")


def _structure(evaluations: Evaluations) -> Section:
    rows = [
        (name, aspect.replace("_", " "), "as the base" if of["equal"] else "DIFFERS", str(of.get("detail") or ""))
        for name, facts in evaluations.items()
        for aspect, of in (facts.get("structure") or {}).items()
        if isinstance(of, Mapping) and "equal" in of
    ]
    tables = [Table("", ("artifact", "what", "", "in words"), rows)] if rows else []
    return Section("structure", "What must be the base's", tables=tables, missing="needs --base")


def _how(evaluations: Evaluations) -> Section:
    tables = []
    for name, facts in evaluations.items():
        rows = [("artifact", str(facts.get("artifact"))), ("SHA-256", str(facts.get("sha256", "not kept")))]
        rows.append(("engine", " ".join(str(pick(facts, f"engine.{key}") or "") for key in ("name", "version"))))
        if facts.get("base"):
            rows += [("base", str(facts["base"])), ("SHA-256 of the base", str(facts.get("base_sha256", "not kept")))]
        protocol = facts.get("protocol") or {}
        if protocol:
            rows.append(
                ("protocol", ", ".join(f"{key} {value}" for key, value in protocol.items() if value is not None))
            )
        for text, of in facts.get("texts", {}).items():
            rows.append((f"text {text}", f"SHA-256 {of.get('sha256')}"))
        tables.append(Table(name, ("what", "value"), rows))
    return Section("how", "How it was measured", tables=tables)
