"""What is made, by which tool, and which of llmlite's artifacts stands against which of a peer's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

import llmlite
from benchmarks.quantization.peers import make_peer
from benchmarks.quantization.pieces import digest, piece, run
from benchmarks.quantization.prepare import Setup

PRESETS = ("q4_0", "iq4_nl", "q5_0", "q4_k_m", "q3_k_m", "q2_k", "iq4_xs", "q5_k_m", "q6_k", "q8_0")
PURE = ("q4_0", "iq4_nl", "q5_0")
SIZED = ("q4_0", "q4_k_m", "q3_k_m", "q2_k")  # whose bytes llmlite is given as --target-size
REPAIRED = ("q4_0-pure", "iq4_nl-pure", "q3_k_m", "q2_k")  # made once more, with --repair


@dataclass(frozen=True)
class Artifact:
    """``type``: the peer's word for it, or a name made of ``target``, what llmlite is told to make: FORMAT:TYPE,
    size:PRESET for --target-size and the bytes of that preset, or repair:PRESET for that preset with --repair.

    For a peer, ``target`` names the llmlite artifact that it is held against.
    """

    tool: str
    type: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.tool}/{self.type}"

    def path(self, setup: Setup) -> Path:
        """A directory, or a peer's GGUF file."""
        ending = ".gguf" if self.tool == "llama.cpp" else ""
        return setup.work / self.tool / f"{self.type}{ending}"


PEERS = (
    *(Artifact("llama.cpp", preset, f"gguf:{preset}") for preset in PRESETS),
    *(Artifact("llama.cpp", f"{preset}-pure", f"gguf:{preset}-pure") for preset in PURE),
    *(Artifact("gptqmodel", kind, f"gptq:{kind}") for kind in ("w4g64", "w3g64")),
    *(Artifact("auto-round", kind, f"gptq:{kind}") for kind in ("w4g64", "w3g64")),
    Artifact("bitsandbytes", "nf4", "bnb:nf4"),
)
LLMLITE = tuple(
    Artifact("llmlite", target.replace(":", "-"), target)
    for target in (
        *dict.fromkeys(peer.target for peer in PEERS),
        *(f"size:{preset}" for preset in SIZED),
        *(f"repair:{preset}" for preset in REPAIRED),
    )
)


def pairs() -> Iterator[tuple[Artifact, Artifact]]:
    """Each artifact of llmlite with what it is held against: a peer's, and, told a size, its own of the preset too."""
    ours = {artifact.target: artifact for artifact in LLMLITE}
    for peer in PEERS:
        yield ours[peer.target], peer
        for way in ("repair", "size"):
            other = ours.get(f"{way}:{peer.type}")
            if other is not None:
                yield other, peer
    for preset in SIZED:
        yield ours[f"size:{preset}"], ours[f"gguf:{preset}"]


def selected(patterns: Sequence[str]) -> list[Artifact]:
    """All artifacts whose names fit one of the patterns; SystemExit lists the names where none does."""
    everything = (*PEERS, *LLMLITE)
    found = [artifact for artifact in everything if any(fnmatch(artifact.name, pattern) for pattern in patterns)]
    if not found:
        raise SystemExit(f"--only {' '.join(patterns)}: the names are {', '.join(a.name for a in everything)}")
    return found


def make_peers(setup: Setup, wanted: Sequence[Artifact]) -> None:
    for artifact in wanted:
        if artifact in PEERS:
            make_peer(setup, artifact.tool, artifact.type, artifact.path(setup))


def make_llmlite(setup: Setup, wanted: Sequence[Artifact]) -> None:
    """By its command line, from exactly the peers' token rows."""
    rows = setup.calibration_rows()
    for artifact in wanted:
        if artifact not in LLMLITE:
            continue
        command = [sys.executable, "-m", "llmlite.cli", "quantize", str(setup.base), *_asked(setup, artifact)]
        command += ["--threads", str(setup.threads), "--calibration", str(rows)]
        command += ["--calibration-tokens", str(setup.tokens), "--row-length", str(setup.length)]
        settings = {**setup.origin, "rows": digest(rows), "command": command[4:], "llmlite": _sources()}

        def make(out: Path, command: list[str] = command, artifact: Artifact = artifact) -> None:
            run([*command, "-o", str(out)], setup.work / "logs" / f"llmlite-{artifact.type}.txt")

        piece(artifact.path(setup), settings, make)


def _asked(setup: Setup, artifact: Artifact) -> list[str]:
    kind, _, name = artifact.target.partition(":")
    if kind == "repair":
        return ["--to", f"gguf:{name}", "--repair"]
    if kind != "size":
        return ["--to", artifact.target]
    (peer,) = (peer for peer in PEERS if peer.name == f"llama.cpp/{name}")
    make_peer(setup, peer.tool, peer.type, peer.path(setup))
    return ["--target-size", str(peer.path(setup).stat().st_size)]


def _sources() -> str:
    """A digest over llmlite's own files, for an artifact is made anew when the code that made it has changed."""
    folder = Path(llmlite.__file__).parent
    found = sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()
