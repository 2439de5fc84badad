"""Every kind of change in every format that can hold it, and what is refused where it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import attach
from impasto.deltas.dense import Dense
from impasto.deltas.dora import Dora
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import DTYPES, load_adapter, save_adapter
from impasto.formats.detect import detect
from impasto.formats.header import read_header
from tests.formats.adapter_cases import mini_unet, unet_output, worst
from tests.formats.kind_cases import MAKERS, adapter_of_kind, output_with, weights

#: what each of peft's formats can hold; kohya's holds all
DIFFUSERS = ("lora", "lora-tucker", "dora")
PEFT = (*DIFFUSERS, "loha", "loha-tucker", "lokr", "lokr-both", "lokr-full", "lokr-tucker")
HELD = [("kohya", kind) for kind in (*MAKERS, "mixed")] + [("diffusers", kind) for kind in DIFFUSERS] + \
    [("peft", kind) for kind in PEFT]

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def target(folder: Path, format: str, name: str = "a") -> Path:
    return folder / (name if format == "peft" else f"{name}.safetensors")


@pytest.mark.parametrize(("format", "kind"), HELD)
def test_round_trip(tmp_path: Path, format: str, kind: str) -> None:
    """In fp32 nothing is lost; what a file holds, the next one holds to the bit, in the same kinds."""
    adapter = adapter_of_kind(kind, norms=format == "kohya")
    save_adapter(adapter, target(tmp_path, format), format=format, dtype=torch.float32)
    loaded = load_adapter(target(tmp_path, format))
    assert worst(weights(loaded), weights(adapter)) < 1e-5
    if kind != "lora-tucker" or format == "kohya":
        assert {path: [term.kind for term in terms] for path, terms in loaded.deltas.items()} == \
            {path: [term.kind for term in terms] for path, terms in adapter.deltas.items()}
    save_adapter(loaded, target(tmp_path, format, "b"), format=format, dtype=torch.float32)
    again = load_adapter(target(tmp_path, format, "b"))
    for path, terms in loaded.deltas.items():
        for one, other in zip(terms, again.deltas[path], strict=True):
            assert one.tensors().keys() == other.tensors().keys()
            assert all(torch.equal(one.tensors()[name], other.tensors()[name]) for name in one.tensors())


@pytest.mark.parametrize(("format", "kind"), [case for case in HELD if case[1] not in ("mixed", "dora-in")])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_storage_rounds_once(tmp_path: Path, format: str, kind: str, dtype: torch.dtype) -> None:
    """Each factor by half of ε at most, six factors of a Tucker LoHa."""
    adapter = adapter_of_kind(kind)
    save_adapter(adapter, target(tmp_path, format), format=format, dtype=dtype)
    assert worst(weights(load_adapter(target(tmp_path, format))), weights(adapter)) < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", [*MAKERS, "mixed"])
def test_it_attaches_as_it_was(tmp_path: Path, kind: str) -> None:
    """Shapes are those of the layers, 1×1 and 3×3 convolutions too, with and without a family that tells."""
    adapter = adapter_of_kind(kind, norms=True)
    want = output_with(adapter, "unet", unet_output)
    for family in ("sd1", ""):
        path = tmp_path / f"{family}.safetensors"
        save_adapter(replace(adapter, family=family, metadata={}), path, dtype=torch.float32)
        loaded = load_adapter(path)
        assert loaded.family == family
        torch.testing.assert_close(output_with(loaded, "unet", unet_output), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "said"), [
    ("loha", "a LoHa, which a diffusers file cannot hold; save it as kohya or peft"),
    ("lokr", "a LoKr, which a diffusers file cannot hold; save it as kohya or peft"),
    ("dora-loha", "a LoHa under DoRA, which a diffusers file cannot hold; save it as kohya"),
    ("dora-in", "a magnitude for each input.*save it as kohya"),
])
def test_diffusers_refuses(tmp_path: Path, kind: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("; ", ".*")) as caught:
        save_adapter(adapter_of_kind(kind), tmp_path / "a.safetensors", format="diffusers")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_full_difference_is_kohyas(tmp_path: Path, format: str) -> None:
    bias = Adapter({QUERY: (LowRank(((32, 32)), 1), Dense.from_weight(None, torch.ones(32)))})
    for adapter, said in ((bias, "change of a bias"), (adapter_of_kind("dense", text=False), "bias|full difference")):
        with pytest.raises(UserError, match=f"({said}).*kohya"):
            save_adapter(adapter, target(tmp_path, format), format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kinds", "said"), [
    (("lora", "loha"), "unet holds loha and lora.*one kind.*kohya"),
    (("lora", "dora"), "DoRA in some layers.*kohya"),
    (("loha", "loha-tucker"), "Tucker cores in some.*kohya"),
])
def test_a_peft_folder_holds_one_kind(tmp_path: Path, kinds: tuple[str, str], said: str) -> None:
    one, two = (adapter_of_kind(kind, text=False).deltas for kind in kinds)
    half = len(one) // 2
    mixed = Adapter({path: (one if number < half else two)[path] for number, path in enumerate(one)})
    with pytest.raises(UserError, match=said):
        save_adapter(mixed, tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())


def test_a_kronecker_product_that_peft_would_not_make(tmp_path: Path) -> None:
    odd = Kronecker.from_factors((32, 32), w1=torch.ones(16, 2), w2=torch.ones(2, 16))
    with pytest.raises(UserError, match="no decompose_factor.*kohya"):
        save_adapter(Adapter({QUERY: (odd,)}), tmp_path / "a", format="peft")
    high = Kronecker.from_factors((32, 32), w1=torch.ones(4, 4), w2_a=torch.ones(8, 5), w2_b=torch.ones(5, 8))
    with pytest.raises(UserError, match="to_q has whole LoKr factors where.*kohya"):
        save_adapter(Adapter({QUERY: (high,)}), tmp_path / "a", format="peft")


# --- sums ------------------------------------------------------------------------------------------------


def low(rank: int = 1) -> LowRank:
    return LowRank.from_factors(torch.randn(32, rank), torch.randn(rank, 32))


def hadamard(rank: int = 1) -> Hadamard:
    return Hadamard.from_factors((32, 32), *(torch.randn(size) for size in ((32, rank), (rank, 32)) * 2))


def test_unlike_kinds_are_joined_by_their_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = Adapter({QUERY: (low(3), hadamard(2))})
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    ((term,),) = load_adapter(tmp_path / "a.safetensors").deltas.values()
    assert isinstance(term, LowRank) and term.rank == 3 + 4
    torch.testing.assert_close(term.weight(), adapter.dense(QUERY), rtol=1e-5, atol=1e-5)


def test_a_sum_with_a_full_difference_is_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    terms = low(), Dense.from_weight(torch.randn(32, 32), torch.randn(32)), hadamard(5), \
        Dense.from_weight(None, torch.ones(32))
    save_adapter(Adapter({QUERY: terms}), tmp_path / "a.safetensors", dtype=torch.float32)
    ((term,),) = load_adapter(tmp_path / "a.safetensors").deltas.values()
    assert term.kind == "dense"
    torch.testing.assert_close(term.weight(), sum((t.weight() for t in (terms[0], terms[2])), start=terms[1].weight()))
    torch.testing.assert_close(term.bias(), terms[1].bias() + 1)


def test_a_bias_beside_another_kind(tmp_path: Path) -> None:
    """As ComfyUI saves what it extracts: LoRA of the weights, differences of biases."""
    torch.manual_seed(0)
    path = QUERY.replace("to_q", "to_out.0")
    adapter = Adapter({path: (hadamard(2), Dense.from_weight(None, torch.ones(32)))})
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    assert [term.kind for term in load_adapter(tmp_path / "a.safetensors").deltas[path]] == ["loha", "dense"]


@pytest.mark.parametrize(("terms", "said"), [
    (lambda: (hadamard(5), hadamard(2)), "sum of a LoHa.*resize"),
    (lambda: (low(), Kronecker.from_factors((32, 32), w1=torch.ones(4, 4), w2=torch.ones(8, 8))),
     "sum of a LoKr and a LoRA.*resize"),
    (lambda: (low(), Dora(low(), torch.ones(32, 1))), "a DoRA and a LoRA.*depends on the base"),
    (lambda: (Dora(low(), torch.ones(32, 1)).scaled(0.5),), "DoRA at strength 0.5"),
    (lambda: (Hadamard.from_factors((32, 32), *(torch.full(size, float("nan")) for size in ((32, 1), (1, 32)) * 2)),),
     "to_q holds NaN"),
])
@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_sums_without_a_form_leave_nothing(tmp_path: Path, terms, said: str, format: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        save_adapter(Adapter({QUERY: terms()}), target(tmp_path, format), format=format)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr-both", "lokr-full", "lokr-tucker", "dense"])
def test_no_strength_and_half_of_it(tmp_path: Path, kind: str) -> None:
    adapter = adapter_of_kind(kind, text=False)
    for strength in (0.0, 0.5):
        save_adapter(adapter * strength, tmp_path / "a.safetensors", dtype=torch.float32)
        loaded = load_adapter(tmp_path / "a.safetensors")
        tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
        assert all(float(tensor) != 0 for name, tensor in tensors.items() if name.endswith(".alpha"))
        got, want = weights(loaded), weights(adapter)
        for path in got:
            torch.testing.assert_close(got[path], want[path] * strength, rtol=1e-5, atol=1e-6)


# --- what other programs are told ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "module", "args"), [
    ("lora", "networks.lora", {"conv_dim": "3", "conv_alpha": "2"}),
    ("lora-tucker", "lycoris.kohya", {"algo": "locon", "use_tucker": "True", "conv_dim": "3", "conv_alpha": "2"}),
    ("loha", "lycoris.kohya", {"algo": "loha"}),
    ("lokr-both", "lycoris.kohya", {"algo": "lokr", "factor": "-1", "decompose_both": "True"}),
    ("dense", "lycoris.kohya", {"algo": "full"}),
    ("dora", "lycoris.kohya", {"algo": "locon", "dora_wd": "True", "wd_on_output": "True"}),
    ("dora-in", "lycoris.kohya", {"algo": "locon", "dora_wd": "True", "wd_on_output": "False"}),
])
def test_metadata(tmp_path: Path, kind: str, module: str, args: dict[str, str]) -> None:
    save_adapter(adapter_of_kind(kind), tmp_path / "a.safetensors")
    metadata = read_header(tmp_path / "a.safetensors").metadata
    assert metadata["ss_network_module"] == module
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert json.loads(metadata["ss_network_args"]).items() >= args.items()
    assert ("ss_network_dim" in metadata) == (kind != "dense")
    assert detect(tmp_path / "a.safetensors").kind == "adapter"


def test_files_hold_factors_as_lycoris_names_them(tmp_path: Path) -> None:
    save_adapter(adapter_of_kind("mixed", norms=True), tmp_path / "a.safetensors")
    endings = {name.partition(".")[2] for name in read_header(tmp_path / "a.safetensors").tensors}
    assert endings == {
        "alpha", "dora_scale", "lora_up.weight", "lora_down.weight", "lora_mid.weight", "hada_w1_a", "hada_w1_b",
        "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a",
        "lokr_w2_b", "lokr_t2", "diff", "diff_b", "w_norm", "b_norm"}


def test_a_table_lies_as_the_network_has_it(tmp_path: Path) -> None:
    """Its linear map is the transpose of the table."""
    path = "text_encoder.text_model.embeddings.token_embedding"
    change = torch.randn(32, 99)
    save_adapter(Adapter({path: (Dense.from_weight(change),)}, family="sd1"), tmp_path / "a.safetensors",
                 dtype=torch.float32)
    (tensor,) = safetensors.torch.load_file(tmp_path / "a.safetensors").values()
    torch.testing.assert_close(tensor, change.T)
    ((term,),) = load_adapter(tmp_path / "a.safetensors").deltas.values()
    torch.testing.assert_close(term.weight(), change)


def test_matrices_fit_pointwise_convolutions_alone() -> None:
    unet = {"unet": mini_unet()}
    layer = "unet.down_blocks.0.attentions.0.proj_in"
    flat = LowRank.from_factors(torch.randn(32, 1), torch.randn(1, 32))
    with attach(unet, {layer: flat}):
        pass
    with pytest.raises(UserError, match="made for another base"):
        attach(unet, {"unet.conv_in": LowRank.from_factors(torch.randn(32, 1), torch.randn(1, 36))})
