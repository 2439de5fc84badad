"""A1111's hypernetwork file: what A1111 and ComfyUI compute from it, round trips, old layouts, and broken or hostile
files."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.hypernetwork import Hypernetwork, dropout_of, initialise
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.arrangement import save_arranged
from impasto.formats.detect import detect
from impasto.formats.pickles import load_pickle
from tests.formats.adapter_cases import random_adapter

FIELDS = {"step", "name", "layer_structure", "activation_func", "is_layer_norm", "weight_initialization", "use_dropout",
          "activate_output", "last_layer_dropout", "dropout_structure", "optional_info", "sd_checkpoint",
          "sd_checkpoint_name"}
KINDS: list[dict[str, Any]] = [
    {}, {"activation": "relu"}, {"activation": "swish", "layer_norm": True, "structure": (1, 1.5, 2, 1)},
    {"activation": "mish", "activate_output": True},
    {"activation": "tanh", "layer_norm": True, "activate_output": True},
    {"activation": "leakyrelu", "structure": (1, 2, 2, 1), "dropout": (0, 0.3, 0.2, 0)},
]


def hypernetwork(widths: tuple[int, ...] = (12, 32), seed: int = 0, **options: Any) -> Hypernetwork:
    hook = Hypernetwork(widths, **{"structure": (1, 2, 1), **options})
    draw = torch.Generator().manual_seed(seed)
    for _, _, network in hook.networks():
        initialise(network, "kaiming_normal", draw)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return hook.requires_grad_(False).eval()


def adapter(**options: Any) -> Adapter:
    return Adapter({}, {"ss_steps": "7", "note": "mine"}, "sd1", {"unet": "ab12"}, hooks=(hypernetwork(**options),))


def save(given: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_adapter(given, path, format="hypernetwork", dtype=dtype)
    return path


def contexts(width: int) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(9))


# --- what other programs make of it ------------------------------------------------------------------------

ACTIVATIONS = {"relu": F.relu, "leakyrelu": F.leaky_relu, "swish": F.hardswish, "tanh": torch.tanh, "mish": F.mish}


def as_a1111(table: dict[Any, Any], width: int, which: int, x: Tensor, strength: float) -> Tensor:
    """Each module of the sequence in turn, the number in a key being its place, as A1111 builds it from the fields."""
    state, structure, at, h = dict(table[width][which]), table["layer_structure"], 0, x
    dropout = table["dropout_structure"]
    for i, (before, after) in enumerate(zip(structure[:-1], structure[1:], strict=True)):
        weight = state.pop(f"linear.{at}.weight")
        assert tuple(weight.shape) == (int(width * after), int(width * before))
        h, at = F.linear(h, weight.float(), state.pop(f"linear.{at}.bias").float()), at + 1
        func = table["activation_func"]
        if func != "linear" and (i < len(structure) - 2 or table["activate_output"]):
            h, at = ACTIVATIONS[func](h), at + 1
        if table["is_layer_norm"]:
            gain, bias = state.pop(f"linear.{at}.weight").float(), state.pop(f"linear.{at}.bias").float()
            h, at = F.layer_norm(h, (h.shape[-1],), gain, bias), at + 1
        at += dropout[i + 1] > 0
    assert not state
    return x + h * strength


def as_comfyui(table: dict[Any, Any], width: int, which: int, x: Tensor, strength: float) -> Tensor:
    """Weights in the order of their keys, with ComfyUI's assumptions for what is not said; dropout stays on there."""
    state, h = table[width][which], x
    names = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    norm = table.get("is_layer_norm", False)
    assert not table.get("use_dropout", False)
    for i in range(0, len(names), 2 if norm else 1):
        h = F.linear(h, state[f"{names[i]}.weight"].float(), state[f"{names[i]}.bias"].float())
        if table.get("activation_func", "linear") != "linear" and (
                i + norm < len(names) - 1 or table.get("activate_output", False)):
            h = ACTIVATIONS[table["activation_func"]](h)
        if norm:
            h = F.layer_norm(h, (h.shape[-1],), state[f"{names[i + 1]}.weight"].float(),
                             state[f"{names[i + 1]}.bias"].float())
    return x + h * strength


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("program", [as_a1111, as_comfyui])
def test_other_programs_compute_the_same(tmp_path: Path, options: dict[str, Any], program: Any) -> None:
    given = adapter(**options)
    table = torch.load(save(given, tmp_path / "h.pt"), weights_only=True)
    assert FIELDS <= table.keys()
    # whatever else there is, is one text: A1111 looks at whole numbers and its fields, ComfyUI at what int() takes
    assert [type(table[key]) for key in table.keys() - FIELDS if not isinstance(key, int)] == [str]
    for width in (12, 32):
        hook = given.hooks[0].scaled(0.7)
        x = contexts(width)
        assert_close(program(table, width, 0, x, 0.7), hook.keys(x), rtol=1e-6, atol=1e-6)
        assert_close(program(table, width, 1, x, 0.7), hook.values(x), rtol=1e-6, atol=1e-6)


def test_passes_a1111_s_check(tmp_path: Path) -> None:
    """modules/safe.py: entries of no other names (today's torch.save makes others), and globals of a short list."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with zipfile.ZipFile(save(adapter(), tmp_path / "h.pt", dtype)) as archive:
            assert all(re.fullmatch(r"[^/]+/(data/\d+|version|data\.pkl)", name) for name in archive.namelist())
            named = {argument for opcode, argument, _ in pickletools(archive.read("archive/data.pkl"))
                     if opcode == "GLOBAL"}
        assert named <= {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage",
                         "torch HalfStorage", "torch BFloat16Storage"}


def pickletools(data: bytes) -> list[tuple[str, Any, int]]:
    import pickletools as tools

    return [(opcode.name, argument, at) for opcode, argument, at in tools.genops(data)]


def test_tensors_are_aligned_and_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    one, two = save(adapter(), tmp_path / "a" / "h.pt"), save(adapter(), tmp_path / "b" / "h.pt")
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        for entry in archive.infolist():
            head = one.read_bytes()[entry.header_offset + 26:entry.header_offset + 30]
            lengths = int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
            assert (entry.header_offset + 30 + lengths) % 64 == 0


# --- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    given = adapter(**options)
    loaded = load_adapter(save(given, tmp_path / "h.pt", dtype))
    (hook,), (was,) = loaded.hooks, given.hooks
    assert isinstance(hook, Hypernetwork) and isinstance(was, Hypernetwork)
    for name in ("widths", "structure", "activation", "layer_norm", "activate_output", "dropout", "strength"):
        assert getattr(hook, name) == getattr(was, name), name
    assert hook.state_dict().keys() == was.state_dict().keys()
    for key, tensor in was.state_dict().items():
        assert torch.equal(hook.state_dict()[key], tensor.to(dtype).float())
    assert not any(p.requires_grad for p in hook.parameters()) and not hook.training
    assert (loaded.family, loaded.base) == ("sd1", {"unet": "ab12"})
    assert loaded.metadata.items() >= given.metadata.items()
    save(loaded, tmp_path / "again.pt", dtype)
    again = load_adapter(tmp_path / "again.pt")
    assert all(map(torch.equal, again.hooks[0].state_dict().values(), hook.state_dict().values()))


@pytest.mark.parametrize("strength", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("options", [{}, {"activation": "tanh", "layer_norm": True, "activate_output": True}])
def test_a_strength_goes_into_the_last_layer(tmp_path: Path, strength: float, options: dict[str, Any]) -> None:
    given = adapter(**options) * strength
    loaded = load_adapter(save(given, tmp_path / "h.pt"))
    x = contexts(12)
    assert loaded.hooks[0].strength == 1
    assert_close(loaded.hooks[0].keys(x), given.hooks[0].keys(x), rtol=1e-6, atol=1e-6)


def test_what_the_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "h.pt"
    with pytest.raises(UserError, match="no place for the strength 0.5"):
        save(adapter(activation="tanh", activate_output=True) * 0.5, path)
    with pytest.raises(UserError, match="one hypernetwork, and these are 2"):
        save(adapter() + adapter(), path)
    with pytest.raises(UserError, match="holds changes of layers, for which the format hypernetwork"):
        save(adapter() + random_adapter(), path)
    with pytest.raises(UserError, match="holds a hypernetwork, for which the format kohya"):
        save_adapter(adapter(), tmp_path / "h.safetensors")
    broken, large = adapter(), adapter()
    next(broken.hooks[0].parameters()).fill_(float("nan"))
    next(large.hooks[0].parameters()).fill_(1e6)
    with pytest.raises(UserError, match="NaN"):
        save(broken, path)
    with pytest.raises(UserError, match="too large for"):
        save(large, path, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_beside_other_things_it_is_a_file_beside_theirs(tmp_path: Path) -> None:
    both = random_adapter() + replace(adapter(), base={})
    paths = save_arranged(both, tmp_path / "dog.safetensors")
    assert [path.name for path in paths] == ["dog.safetensors", "dog-hypernetwork.pt"]
    one, two = map(load_adapter, paths)
    assert one.deltas and not one.hooks and two.hooks and not two.deltas
    assert save_arranged(adapter(), tmp_path / "h.pt") == [tmp_path / "h.pt"]
    names = [path.name for path in save_arranged(adapter() + adapter(), tmp_path / "two.pt")]
    assert names == ["two.pt", "two-hypernetwork-2.pt"]


# --- A1111's own files -------------------------------------------------------------------------------------


def table(**fields: Any) -> dict[Any, Any]:
    """What A1111 of late 2022 saved, as far as `fields` do not say otherwise (None: not there)."""
    draw = torch.Generator().manual_seed(4)

    def network() -> dict[str, Tensor]:
        shapes = {"linear.0.weight": (24, 12), "linear.0.bias": (24,), "linear.1.weight": (12, 24),
                  "linear.1.bias": (12,)}
        return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}

    made = {12: (network(), network()), "step": 300, "name": "dog", "layer_structure": [1, 2, 1],
            "activation_func": "linear", "is_layer_norm": False, "weight_initialization": "XavierNormal",
            "use_dropout": False, "sd_checkpoint": "81761151", "sd_checkpoint_name": "v1-5", "activate_output": False,
            "last_layer_dropout": False, **fields}
    return {key: value for key, value in made.items() if value is not None}


def written(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_a_file_of_a1111(tmp_path: Path) -> None:
    path = written(tmp_path / "dog.pt", table())
    assert detect(path).kind == "hypernetwork"
    loaded = load_adapter(path)
    assert loaded.metadata == {"ss_steps": "300", "ss_output_name": "dog", "ss_sd_model_hash": "81761151",
                               "ss_sd_model_name": "v1-5", "ss_weight_initialization": "XavierNormal"}
    x = contexts(12)
    assert_close(loaded.hooks[0].keys(x), as_a1111({**table(), "dropout_structure": [0, 0, 0]}, 12, 0, x, 1.0))
    again = load_pickle(save(loaded, tmp_path / "again.pt"))
    assert {key: again[key] for key in FIELDS} == {
        **{key: value for key, value in table().items() if isinstance(key, str)}, "dropout_structure": [0, 0, 0],
        "optional_info": None}
    assert type(again["layer_structure"][0]) is int


def test_the_oldest_layout(tmp_path: Path) -> None:
    new = table()
    old = {12: tuple({key.replace("linear.0", "linear1").replace("linear.1", "linear2"): tensor
                      for key, tensor in part.items()} for part in new[12]), "step": 1, "name": "x"}
    one, two = (load_adapter(written(tmp_path / "h.pt", content)).hooks[0] for content in (new, old))
    assert torch.equal(one.values(contexts(12)), two.values(contexts(12)))


def test_what_is_not_said_is_what_a1111_assumes(tmp_path: Path) -> None:
    """activate_output true, activation none, normalisation and dropout off: modules/hypernetworks/hypernetwork.py."""
    hook = load_adapter(written(tmp_path / "h.pt", {12: table()[12], "name": "x"})).hooks[0]
    assert isinstance(hook, Hypernetwork)
    assert (hook.structure, hook.activation, hook.layer_norm) == ((1, 2, 1), "linear", False) and hook.activate_output
    state = {key.replace("linear.1", "linear.2"): tensor for key, tensor in table()[12][0].items()}
    content = table(activation_func="relu", activate_output=None) | {12: (state, state)}
    hook = load_adapter(written(tmp_path / "h.pt", content)).hooks[0]
    x = contexts(12)
    assert_close(hook.keys(x), x + F.relu(hook.pairs["12"]["k"][:3](x)))


@pytest.mark.parametrize("fields, wanted", [
    ({"use_dropout": True}, (0, 0.3, 0, 0)), ({"use_dropout": True, "last_layer_dropout": True}, (0, 0.3, 0.3, 0)),
    ({"use_dropout": True, "dropout_structure": [0, 0.1, 0.2, 0]}, (0, 0.1, 0.2, 0)),
    ({"dropout_structure": [0, 0.1, 0.2, 0]}, (0, 0.1, 0.2, 0))])
def test_dropout_takes_a_place_in_a1111_s_files(tmp_path: Path, fields: dict[str, Any], wanted: tuple) -> None:
    state, at = {}, 0
    for i, (before, after) in enumerate([(12, 24), (24, 24), (24, 12)]):
        state |= {f"linear.{at}.weight": torch.full((after, before), 0.1 * i), f"linear.{at}.bias": torch.zeros(after)}
        at += 2 if wanted[i + 1] else 1
    hook = load_adapter(written(tmp_path / "h.pt", table(layer_structure=[1, 2, 2, 1], **fields) | {
        12: (state, state)})).hooks[0]
    assert isinstance(hook, Hypernetwork) and hook.dropout == wanted
    assert torch.equal(hook.keys(contexts(12)), hook.keys(contexts(12)))


@pytest.mark.parametrize("widths, family", [((768,), "sd1"), ((1024, 320), "sd2"), ((768, 1024), ""), ((320,), "")])
def test_the_family_is_told_by_the_text_s_width(tmp_path: Path, widths: tuple[int, ...], family: str) -> None:
    state = {width: {"linear.0.weight": torch.zeros(width, width), "linear.0.bias": torch.zeros(width)}
             for width in widths}
    content = table(layer_structure=[1, 1]) | {width: (state[width], state[width]) for width in widths}
    del content[12]
    assert load_adapter(written(tmp_path / "h.pt", content)).family == family


# --- broken and hostile ones -------------------------------------------------------------------------------


def changed(key: str, value: Any) -> dict[Any, Any]:
    """The table with one tensor of its second network replaced (None: removed)."""
    made = table()
    part = {**made[12][1], key: value}
    made[12] = (made[12][0], {name: tensor for name, tensor in part.items() if tensor is not None})
    return made


@pytest.mark.parametrize("content, message", [
    (changed("linear.1.bias", None), "lack the tensor 'linear.1.bias'"),
    (changed("linear.7.bias", torch.zeros(12)), "have the tensor 'linear.7.bias'"),
    (changed("linear.0.weight", torch.zeros(24, 13)), r"is \(24, 13\), not \(24, 12\)"),
    (changed("linear.0.weight", "text"), "is str"),
    (changed("linear.0.weight", torch.full((24, 12), float("inf"))), "NaN, infinity"),
    (changed("linear.0.weight", torch.zeros(24, 12, dtype=torch.int64)), "whole numbers"),
    (table(activation_func="relu"), "have the tensor 'linear.1"), (table(activation_func="nonsense"), "no activation"),
    (table(activation_func=["relu"]), "in no known way"), (table(is_layer_norm="yes"), "in no known way"),
    (table(layer_structure=[1, 3, 1]), r"is \(24, 12\), not \(36, 12\)"), (table(layer_structure="121"), "not a list"),
    (table(layer_structure=[1, 2, 2]), "cannot have the structure"),
    (table(layer_structure=[1, *[1] * 1000, 1]), "not a list of numbers"),
    (table(layer_structure=[1, float("inf"), 1]), "cannot have the structure"),
    (table() | {12: "text"}, "no pair of networks"), (table() | {12: (table()[12][0],)}, "no pair of networks"),
    (table() | {-5: table()[12]}, "widths"), (table() | {1 << 40: table()[12]}, "widths"),
    (table(impasto="[1]"), "'impasto' is not a table"), (table(skip_connection=True), "skip_connection"),
    ({"layer_structure": [1, 2, 1]}, "holds no hypernetwork"),
])
def test_broken_files_are_one_line(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_adapter(written(tmp_path / "h.pt", content))
    assert "h.pt" in str(error.value) and "\n" not in str(error.value)


class Hostile:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('ran')",)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    for content in (table(name=Hostile()), Hostile()):
        for zipped in (True, False):
            torch.save(content, tmp_path / "h.pt", _use_new_zipfile_serialization=zipped)
            with pytest.raises(UserError, match="wants to run code"):
                load_adapter(tmp_path / "h.pt")
    (tmp_path / "h.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError):
        load_adapter(tmp_path / "h.pt")


def test_a_truncated_file(tmp_path: Path) -> None:
    path = save(adapter(), tmp_path / "h.pt")
    whole = path.read_bytes()
    for size in (len(whole) - 10, len(whole) // 2, 30):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            load_adapter(path)


def test_our_text_says_how_it_was_made(tmp_path: Path) -> None:
    given = replace(adapter(dropout=dropout_of((1, 2, 1), 0.3)), metadata={"impasto.recipe": "{}"})
    told = json.loads(load_pickle(save(given, tmp_path / "h.pt"))["impasto"])
    assert told == {"dropout": [0, 0.3, 0], "metadata": {
        "impasto.recipe": "{}", "impasto.family": "sd1", "impasto.base": '{"unet": "ab12"}'}}
