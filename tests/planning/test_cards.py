from __future__ import annotations

import pytest

from impasto.core.errors import UserError
from impasto.planning.cards import CARDS, SOURCES, TABLE, card_of
from impasto.planning.forecast import GIB


@pytest.mark.parametrize(("text", "size"), [
    ("16GiB", 16 * GIB), ("24GB", 24 * GIB), ("12", 12 * GIB), (" 8 gb ", 8 * GIB), ("7.5GiB", int(7.5 * GIB)),
    ("6144MiB", 6 * GIB), ("80G", 80 * GIB)])
def test_a_size_is_a_card_without_a_speed(text: str, size: int) -> None:
    card = card_of(text)
    assert card.bytes == size and not card.tflops and not card.bandwidth


@pytest.mark.parametrize(("text", "name"), [
    ("RTX 3060", "RTX 3060 12GB"), ("rtx3060", "RTX 3060 12GB"), ("3060", "RTX 3060 12GB"),
    ("RTX 3060 12GB", "RTX 3060 12GB"), ("RTX-3060-8gb", "RTX 3060 8GB"), ("rtx 4090", "RTX 4090 24GB"),
    ("a100", "A100 40GB"), ("A100 80GB", "A100 80GB"), ("H100", "H100 80GB"), ("t4", "T4 16GB"),
    ("RTX 2060", "RTX 2060 6GB"), ("GTX 1660", "GTX 1660 6GB"), ("1660ti", "GTX 1660 Ti 6GB"),
    ("RX 7900 XTX", "RX 7900 XTX 24GB"), ("7900xt", "RX 7900 XT 20GB"), ("RTX 5090", "RTX 5090 32GB"),
    ("4060 Ti 16", "RTX 4060 Ti 16GB"),
    # as torch.cuda.get_device_name has them
    ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super 16GB"), ("Tesla T4", "T4 16GB"),
    ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
    ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
    ("Tesla V100-SXM2-32GB", "Tesla V100 32GB"), ("AMD Radeon RX 7900 XTX", "RX 7900 XTX 24GB"),
    ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"), ("NVIDIA A10G", "A10G 24GB"), ("A10", "A10 24GB")])
def test_a_name_is_forgiven_its_spelling(text: str, name: str) -> None:
    assert card_of(text).name == name


@pytest.mark.parametrize(("text", "hint"), [
    ("RTX 3061", "'RTX 3060'"), ("rtx 4990", "'RTX 4090'"), ("fridge", "Known are"), ("", "12GiB"), ("0", "12GiB")])
def test_an_unknown_name_gets_the_nearest_and_the_way_out(text: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        card_of(text)
    assert hint in error.value.fix and "12GiB" in error.value.fix


def test_a_memory_that_is_not_sold_is_told() -> None:
    with pytest.raises(UserError, match="a RTX 3060 has 12 or 8 GiB"):
        card_of("RTX 3060 16GB")


def test_every_card_is_found_by_its_own_name() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert card_of(card.name) is card
        assert card.source in SOURCES.values()


def test_the_numbers_go_together() -> None:
    """Summed in fp32, GeForce's tensor units make 2 (Ampere and later) or 4 (Turing) times what its shaders make."""
    for row in TABLE.strip().splitlines():
        name, _, fp32, half, _, family = (cell.strip() for cell in row.split("|"))
        if name.startswith("RTX") and family in ("turing", "ampere", "ada", "blackwell") and name[4].isdigit() and \
                "6000" not in name:
            assert float(half) / float(fp32) == pytest.approx(4 if family == "turing" else 2, rel=0.012), name
    assert {"fp32", "fp16"} == card_of("T4").tflops.keys() and "bf16" in card_of("L4").tflops
