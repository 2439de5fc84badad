"""What people want to know of a delta: its kind, its rank, its alpha."""

from __future__ import annotations

from impasto.deltas.delta import Delta


def kinds_of(delta: Delta) -> tuple[str, ...]:
    """Its kind; of a DoRA that of its inner change too: ("lora", "dora")."""
    return (inner_of(delta).kind, delta.kind) if inner_of(delta) is not delta else (delta.kind,)


def inner_of(delta: Delta) -> Delta:
    """The change inside a DoRA, or the delta itself."""
    inner = getattr(delta, "inner", delta)
    assert isinstance(inner, Delta)
    return inner


def is_plain_lora(delta: Delta) -> bool:
    """Whether it is up · down and nothing else: no core between them, no magnitude around them."""
    return delta.kind == "lora" and "mid" not in delta.tensors()


def rank_of(delta: Delta) -> int | None:
    """The rank of its factors; None where there are whole matrices alone."""
    return getattr(inner_of(delta), "rank", None) or None


def alpha_of(delta: Delta) -> float | None:
    """What the delta is multiplied by, times the rank; None where there is no rank."""
    return float(inner_of(delta).tensors()["alpha"]) if rank_of(delta) else None
