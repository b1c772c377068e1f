"""The command `llmlite`: one thin function per verb."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmlite import __version__
from llmlite.errors import InputError, LlmliteError
from llmlite.options import Parser, add_options, settings_from
from llmlite.progress import console

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns its exit status, after one sentence on standard error where it failed."""
    try:
        given = _parser().parse_args(arguments)
        _check_json(given.json)
        return given.run(given)
    except LlmliteError as error:
        return _fail(str(error), error.exit_status)
    except MemoryError:
        return _fail("out of memory", 3)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 3)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted; nothing was kept", INTERRUPTED)


def _fail(sentence: str, status: int) -> int:
    console.print(f"llmlite: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    return status


def _parser() -> Parser:
    parser = Parser(prog="llmlite", description="Make a language model fit the machine at hand, measure it, serve it.")
    parser.add_argument("--version", action="version", version=f"llmlite {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    for add in (
        _add_import, _add_quantize, _add_imatrix, _add_lora, _add_merge, _add_distill, _add_eval,
        _add_compare, _add_gate, _add_report, _add_serve, _add_key, _add_chat,
    ):  # fmt: skip
        add(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, settings: type) -> Parser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    add_options(parser, settings)
    parser.set_defaults(json=None)
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="settings as YAML; the command line overrides them")
    return parser


def _out(parser: Parser, what: str = "the directory to write") -> None:
    parser.add_argument("-o", dest="out", type=Path, required=True, metavar="OUT", help=what)


def _json(parser: Parser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the facts as JSON; - for standard output")


def _check_json(to: str | None) -> None:
    if to not in (None, "-") and not Path(str(to)).absolute().parent.is_dir():
        raise InputError(f"--json {to}: its folder is not there")


def _write_json(facts: dict, to: str | None) -> None:
    text = json.dumps(facts, indent=2) + "\n"
    if to == "-":
        sys.stdout.write(text)
    elif to:
        Path(to).write_text(text)


def _add_import(verbs: Any) -> None:
    from llmlite.run.import_gguf import ImportSettings

    parser = _verb(verbs, "import", _import, "turn a GGUF file into a Hugging Face checkpoint", ImportSettings)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    _out(parser)
    _json(parser)


def _import(given: argparse.Namespace) -> int:
    from llmlite.checkpoint.artifact import read_manifest
    from llmlite.run.import_gguf import ImportSettings, run_import

    run_import(given.file, given.out, settings_from(ImportSettings, given, given.recipe))
    _write_json(read_manifest(given.out) or {}, given.json)
    if given.json != "-":
        print(f"{given.out}: imported from {given.file}")
    return 0


def _add_quantize(verbs: Any) -> None:
    from llmlite.run.quantize import QuantizeSettings

    parser = _verb(verbs, "quantize", _quantize, "compress a checkpoint", QuantizeSettings)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a GGUF file or a hub id")
    _out(parser)
    _json(parser)


def _quantize(given: argparse.Namespace) -> int:
    from llmlite.run.quantize import QuantizeSettings, quantize
    from llmlite.run.summary import summary, summary_table

    done = quantize(given.model, given.out, settings_from(QuantizeSettings, given, given.recipe))
    _write_json(summary(done), given.json)
    if given.json != "-":
        from rich.console import Console

        Console().print(summary_table(done))
    return 0


def _add_imatrix(verbs: Any) -> None:
    from llmlite.run.imatrix import ImatrixSettings

    parser = _verb(verbs, "imatrix", _imatrix, "measure llama.cpp's importance matrix", ImatrixSettings)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a GGUF file or a hub id")
    _out(parser, "the GGUF file to write, as llama-quantize --imatrix reads it")


def _imatrix(given: argparse.Namespace) -> int:
    from llmlite.run.imatrix import ImatrixSettings, measure_imatrix

    done = measure_imatrix(given.model, given.out, settings_from(ImatrixSettings, given, given.recipe))
    tokens = done.chunk_count * done.chunk_size
    print(f"{given.out}: mean squared inputs of {len(done.sums)} linear layers over {tokens:,} tokens")
    return 0


def _add_merge(verbs: Any) -> None:
    from llmlite.run.merge import MergeSettings

    text = "merge a LoRA adapter into its base, at 16 bits or rounded again"
    parser = _verb(verbs, "merge", _merge, text, MergeSettings)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, an artifact, a GGUF file or a hub id")
    parser.add_argument("adapter", metavar="ADAPTER", help="the directory of an adapter saved by peft")
    _out(parser)
    _json(parser)


def _merge(given: argparse.Namespace) -> int:
    from llmlite.run.merge import MergeSettings, merge

    done = merge(given.model, given.adapter, given.out, settings_from(MergeSettings, given, given.recipe))
    facts = done.to_json()
    _write_json(facts, given.json)
    if given.json != "-":
        print(f"{given.out}: {facts['format']}, {facts['bytes'] / 1e6:,.1f} MB, {done.changed} weights merged")
    return 0


def _add_eval(verbs: Any) -> None:
    from llmlite.evals.evaluate import EvalSettings

    parser = _verb(verbs, "eval", _eval, "measure an artifact, alone or against its base", EvalSettings)
    parser.add_argument(
        "artifact", metavar="ARTIFACT", help="an artifact, a checkpoint directory, a GGUF file or a hub id"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="also draw divergence and perplexity against size"
    )
    parser.add_argument("--draft-for", metavar="TEACHER", help="instead: measure ARTIFACT as a draft of this GGUF")
    _json(parser)


def _eval(given: argparse.Namespace) -> int:
    if given.draft_for is not None:
        return _eval_draft(given)
    from llmlite.evals.evaluate import EvalSettings, evaluate, save_in_manifest
    from llmlite.evals.resources_table import show_resources
    from llmlite.evals.table import check_picture, picture, show, show_worst

    if given.picture:
        check_picture(given.picture)
    measured = evaluate(given.artifact, settings_from(EvalSettings, given, given.recipe))
    _write_json(measured.to_json(), given.json)
    if given.picture:
        picture([measured], given.picture)
    if given.json != "-":
        show([measured])
        show_worst(measured)
        show_resources(measured)
    save_in_manifest(given.artifact, measured)
    return 0


def _eval_draft(given: argparse.Namespace) -> int:
    from llmlite.serve.draft_figures import eval_draft

    found = eval_draft(given.artifact, given.draft_for, vars(given))
    _write_json(found.to_json(), given.json)
    if given.json != "-":
        print(found)
    return 0


def _add_compare(verbs: Any) -> None:
    from llmlite.evals.compare import CompareSettings

    text = "hold artifacts side by side, and tell real differences from chance"
    parser = _verb(verbs, "compare", _compare, text, CompareSettings)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="artifacts, or JSON files of llmlite eval")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="also draw the differences")
    _json(parser)


def _compare(given: argparse.Namespace) -> int:
    from llmlite.evals.compare import CompareSettings, compare
    from llmlite.evals.compare_table import comparison_picture, show_comparison
    from llmlite.evals.table import check_picture

    if given.picture:
        check_picture(given.picture)
    found = compare(given.artifacts, settings_from(CompareSettings, given, given.recipe))
    _write_json(found.to_json(), given.json)
    if given.picture:
        comparison_picture(found, given.picture)
    if given.json != "-":
        show_comparison(found)
    return 0


def _add_gate(verbs: Any) -> None:
    from llmlite.evals.gating import GateSettings

    parser = _verb(verbs, "gate", _gate, "judge an artifact by rules; exit status 1 where it fails", GateSettings)
    parser.add_argument("artifact", metavar="ARTIFACT", help="an artifact, a checkpoint directory or a GGUF file")
    _json(parser)


def _gate(given: argparse.Namespace) -> int:
    from llmlite.evals.gating import GateSettings, measure_values, run_gate, write_verdict
    from llmlite.evals.ruleset import read_rules
    from llmlite.evals.terminal import show_wide
    from llmlite.evals.verdict import verdict_table

    rules = read_rules(settings_from(GateSettings, given, given.recipe).rules)
    settings = settings_from(GateSettings, given, given.recipe, under=measure_values(rules))
    verdict = run_gate(given.artifact, rules, settings)
    _write_json(verdict.to_json(), given.json)
    write_verdict(verdict, settings)
    if given.json != "-":
        show_wide(verdict_table(verdict))
    return 0 if verdict.passed else 1


def _add_report(verbs: Any) -> None:
    from llmlite.evals.report.run import ReportSettings

    text = "show what was measured: one page, a model card, Markdown and JSON"
    parser = _verb(verbs, "report", _report, text, ReportSettings)
    parser.add_argument("artifact", metavar="ARTIFACT", help="an artifact, or a JSON file of llmlite eval")
    parser.add_argument("others", nargs="*", metavar="OTHER", help="more of them, to stand beside it")
    parser.add_argument("-o", dest="out", type=Path, metavar="FILE.html", help="the page to write")
    _json(parser)


def _report(given: argparse.Namespace) -> int:
    from llmlite.evals.report.run import ReportSettings, write_report

    settings = settings_from(ReportSettings, given, given.recipe)
    report = write_report([given.artifact, *given.others], given.out, settings)
    _write_json(report.to_json(), given.json)
    if given.json != "-":
        print("\n".join(report.written) or "nothing to write: name a page with -o, --markdown or --model-card")
    return 0


def _add_lora(verbs: Any) -> None:
    from llmlite.run.lora import LoraSettings

    parser = _verb(verbs, "lora", _lora, "train an adapter of a model on chats", LoraSettings)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory or a hub id, 16 bits or quantized")
    _out(parser)
    _json(parser)


def _lora(given: argparse.Namespace) -> int:
    from llmlite.run.adapting import run_lora
    from llmlite.run.lora import LoraSettings

    facts, sentence = run_lora(given.model, given.out, settings_from(LoraSettings, given, given.recipe))
    _write_json(facts, given.json)
    if given.json != "-":
        print(sentence)
    return 0


def _add_distill(verbs: Any) -> None:
    from llmlite.run.distill import DistillSettings

    text = "make a smaller student, and train it on its teacher's predictions"
    parser = _verb(verbs, "distill", _distill, text, DistillSettings)
    _out(parser)
    _json(parser)


def _distill(given: argparse.Namespace) -> int:
    from llmlite.run.distilling import run_distill

    done = run_distill(given)
    _write_json(done.to_json(), given.json)
    if given.json != "-":
        print(done)
    return 0


def _add_serve(verbs: Any) -> None:
    from llmlite.serve.settings import ServeSettings

    parser = _verb(verbs, "serve", _serve, "serve an artifact over an OpenAI-compatible HTTP API", ServeSettings)
    parser.add_argument(
        "artifacts",
        nargs="+",
        metavar="ARTIFACT",
        help="an artifact, a checkpoint directory, a GGUF file, a hub id, or URLs of OpenAI-compatible servers",
    )


def _serve(given: argparse.Namespace) -> int:
    from llmlite.serve.run import serve
    from llmlite.serve.settings import ServeSettings

    serve(given.artifacts, settings_from(ServeSettings, given, given.recipe))
    return 0


def _add_key(verbs: Any) -> None:
    from llmlite.serve.settings import KeySettings

    parser = _verb(verbs, "key", _key, "make an API key for the server, shown once, and keep its hash", KeySettings)
    parser.add_argument("name", metavar="NAME", help="whose key it is; logs show it")
    _out(parser, "the key file to add it to, for llmlite serve --api-key-file")


def _key(given: argparse.Namespace) -> int:
    from llmlite.extras import need
    from llmlite.serve.settings import KeySettings

    settings = settings_from(KeySettings, given, given.recipe)
    need("serve", "fastapi")
    from llmlite.serve.keys import StoredKey, add_key, new_key
    from llmlite.serve.limits import Limits

    key = sys.stdin.readline().strip() if settings.from_stdin else new_key()
    limits = Limits(settings.requests_per_minute, settings.tokens_per_minute, settings.concurrent)
    add_key(given.out, StoredKey.of(given.name, key, limits))
    if not settings.from_stdin:
        print(key)
        console.print("shown this once: only its hash was kept", highlight=False)
    return 0


def _add_chat(verbs: Any) -> None:
    from llmlite.serve.chat.settings import ChatSettings

    text = "talk to an artifact, or to a server, in the terminal"
    parser = _verb(verbs, "chat", _chat, text, ChatSettings)
    parser.add_argument(
        "place", metavar="ARTIFACT_OR_URL", help="an artifact, as for serve, or a server, as in http://127.0.0.1:8000"
    )


def _chat(given: argparse.Namespace) -> int:
    from llmlite.extras import need
    from llmlite.serve.chat.settings import ChatSettings

    settings = settings_from(ChatSettings, given, given.recipe)
    need("serve", "httpx")
    from llmlite.serve.chat.run import chat

    return chat(given.place, settings)


if __name__ == "__main__":
    sys.exit(main())
