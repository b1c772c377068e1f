"""Train low-rank adapters with peft on chats, the base frozen.

LoRA (2106.09685), DoRA (2402.09353), rsLoRA (2312.03732), and with a quantized base QLoRA (2305.14314).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from llmlite.adapt.conversations import IGNORED, Row, batch
from llmlite.adapt.losses import soft_capped
from llmlite.adapt.training import TrainSettings
from llmlite.errors import InputError
from llmlite.extras import need
from llmlite.memory import free_memory

Kind = Literal["lora", "dora", "rslora"]
LOGIT_ROWS = 256  # positions whose logits over the vocabulary are held at a time
ROOM = 0.5  # the share of the free memory that activations may take before they are computed twice


@dataclass(frozen=True)
class AdapterSettings(TrainSettings):
    """What adapter to train, and how."""

    steps: int = field(default=100, metadata={"help": "steps of the optimizer"})
    batch_rows: int = field(default=1, metadata={"help": "rows of the data in one forward pass"})
    rate: float = field(default=1e-3, metadata={"help": "learning rate at its highest"})
    kind: Kind = field(
        default="lora", metadata={"help": "dora also trains the weights' lengths; rslora scales by 1/sqrt(rank)"}
    )
    rank: int = field(default=16, metadata={"help": "rank of the adapter"})
    alpha: float | None = field(
        default=None, metadata={"help": "the adapter's product is scaled by ALPHA / rank (default: twice the rank)"}
    )
    targets: tuple[str, ...] = field(
        default=(),
        metadata={"help": "layers by the end of their names, as in q_proj v_proj (default: all linear ones)"},
    )
    checkpointing: Literal["auto", "on", "off"] = field(
        default="auto", metadata={"help": "compute activations twice to hold few of them; auto: where memory is short"}
    )


def check_adapter(settings: AdapterSettings) -> None:
    """`InputError` for an adapter that can't be, whatever the model."""
    if settings.rank < 1:
        raise InputError(f"--rank {settings.rank}: at least 1 is right")
    if settings.alpha is not None and not settings.alpha > 0:
        raise InputError(f"--alpha {settings.alpha}: more than 0 is right")


def target_modules(model: torch.nn.Module, wanted: Sequence[str]) -> list[str]:
    """The linear layers of the decoder, or those whose names end as ``wanted``; `InputError` where one matches none."""
    linears = [
        name for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}"
    ]  # fmt: skip
    if not linears:
        raise InputError("the model has no linear layers in a list `layers`, so there is nothing to put an adapter on")
    chosen = [name for name in linears if not wanted or any(f".{name}".endswith(f".{end}") for end in wanted)]
    for end in wanted:
        if not any(f".{name}".endswith(f".{end}") for name in linears):
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise InputError(f"--targets {end}: no linear layer's name ends so; known are {', '.join(known)}")
    return sorted({name.rpartition(".")[2] for name in chosen}) if not wanted else list(wanted)


def new_adapter(model: Any, settings: AdapterSettings, base_name: str, begin: Path | None = None) -> Any:
    """The peft model of a frozen base with a fresh adapter, float32, that changes nothing yet, or the one in ``begin``.

    ``base_name`` goes into adapter_config.json: what peft opens the base by.
    """
    peft = need("lora", "peft")
    check_adapter(settings)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        target_modules=target_modules(model, settings.targets),
        use_dora=settings.kind == "dora",
        use_rslora=settings.kind == "rslora",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads an attribute by its old name
        if begin is None:
            adapted = peft.get_peft_model(model, config)
        else:
            adapted = peft.PeftModel.from_pretrained(model, str(begin), is_trainable=True)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def packing_holds(adapted: Any) -> bool:
    """Whether this model keeps conversations in one row apart when it is given their positions.

    The second conversation is run behind two different first ones, and must come out alike.
    """
    device, vocabulary = adapted.device, adapted.get_base_model().config.get_text_config().vocab_size
    positions = torch.tensor([[*range(12), *range(8)]], device=device)
    ids = torch.arange(20, device=device)[None] % vocabulary
    other = torch.where(torch.arange(20, device=device) < 12, (ids * 7 + 3) % vocabulary, ids)
    with torch.no_grad():
        first, second = (hidden_states(adapted, given, positions)[0, 12:].float() for given in (ids, other))
    return bool((first - second).norm() <= 0.01 * first.norm())


def refuse_other_head(adapted: Any, where: str) -> None:
    """`InputError` where the model makes other logits of its hidden states than `answer_loss`, as by a scale."""
    base, places = adapted.get_base_model(), torch.arange(8, device=adapted.device)[None]
    with torch.no_grad():
        wanted = base(input_ids=places, use_cache=False).logits.float()
        found = _logits(base, hidden_states(adapted, places, places))
    if not (found - wanted).norm() <= 0.01 * wanted.norm():
        raise InputError(f"{where}: its head does more than multiply and cap, which can't be trained through here")


def hidden_states(adapted: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the head sees [rows, length, hidden]. Without a mask the model keeps apart what the positions keep apart."""
    return adapted.get_base_model().base_model(
        input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False
    ).last_hidden_state  # fmt: skip


def answer_loss(adapted: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, int]:
    """The summed negative log-likelihood of the rows' answers in nats, and how many tokens they have.

    Logits are made only where a label is, of `LOGIT_ROWS` positions at a time, and again in the backward pass.
    """
    ids, positions, labels = batch(rows, adapted.device)
    hidden = hidden_states(adapted, ids, positions)
    counts = labels != IGNORED
    chosen, wanted = hidden[counts], labels[counts]
    base = adapted.get_base_model()

    def loss_of(part: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(_logits(base, part), tokens, reduction="sum")

    total = torch.zeros((), device=hidden.device)
    for part, tokens in zip(chosen.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True):
        twice = part.requires_grad
        total = total + (recomputed(loss_of, part, tokens, use_reentrant=False) if twice else loss_of(part, tokens))
    return total, len(wanted)


def _logits(base: Any, hidden: torch.Tensor) -> torch.Tensor:
    logits = base.get_output_embeddings()(hidden).float()
    return soft_capped(logits, base.config.get_text_config().to_dict())


class AdapterTask:
    """Answers of chats, learned by a peft adapter; ``held`` are the rows that judge."""

    def __init__(self, adapted: Any, rows: Sequence[Row], held: Sequence[Row], batch_rows: int = 1):
        self._adapted, self._rows, self._held, self._batch = adapted, rows, held, batch_rows

    @property
    def rows(self) -> int:
        return len(self._rows)

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        return {name: value for name, value in self._adapted.named_parameters() if value.requires_grad}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters().values())}]

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        total, count = answer_loss(self._adapted, [self._rows[row] for row in rows])
        return total / count

    def judge(self) -> float:
        """Nats per token of the answers, in eval mode, as a server runs it."""
        self._adapted.eval()
        try:
            total, count = 0.0, 0
            for start in range(0, len(self._held), self._batch):
                found = answer_loss(self._adapted, self._held[start : start + self._batch])
                total, count = total + float(found[0]), count + found[1]
            return total / count
        finally:
            self._adapted.train()


def activation_bytes(config: Any, tokens: int) -> int:
    """About what a forward pass over ``tokens`` keeps for the backward one, in bytes, without checkpointing.

    Per token and layer, float32: 16 times the hidden size and 8 times the feed-forward's, as adapters on every layer
    keep their inputs twice.
    """
    text = config.get_text_config()
    return 4 * tokens * text.num_hidden_layers * (16 * text.hidden_size + 8 * text.intermediate_size)


def set_checkpointing(adapted: Any, wanted: str, tokens: int) -> bool:
    """Switch gradient checkpointing on where wanted; "auto": where activations would take half the free memory."""
    if wanted == "auto":
        free = free_memory(str(adapted.device))
        wanted = "on" if activation_bytes(adapted.config, tokens) > ROOM * free else "off"
    if wanted == "on":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has a newer name for it, 5.0 has not
            adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return wanted == "on"
