from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import impasto
from impasto.cli import app
from impasto.deltas.adapter import Adapter
from impasto.deltas.hypernetwork import Hypernetwork, initialise
from impasto.deltas.lowrank import LowRank
from impasto.families import pictures
from impasto.families.picture_info import open_picture, picture_texts
from impasto.formats.header import read_header
from tests.checkpoints import write_checkpoint

SMALL = ["--size", "32x48", "--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose text states have a mean, as real ones do: weights in a prompt are scaled by it."""
    folder = tmp_path_factory.mktemp("base")
    tensors = load_file(write_checkpoint(folder / "random.safetensors"))
    metadata = read_header(folder / "random.safetensors").metadata
    (bias,) = (name for name in tensors if name.endswith("final_layer_norm.bias"))
    tensors[bias] = torch.full_like(tensors[bias], 0.5)
    save_file(tensors, folder / "mini.safetensors", metadata=metadata)
    return folder / "mini.safetensors"


@pytest.fixture(scope="module")
def dog(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter strong enough to be seen, on attention layers of the UNet and the text encoder."""
    base, draw = impasto.load_base(mini), torch.Generator().manual_seed(3)
    layers = base.targets("attention") + base.targets("text-encoder")
    deltas = {}
    for layer in layers:
        shape = base.layer(layer).weight.shape
        up, down = torch.randn(shape[0], 2, generator=draw), torch.randn(2, *shape[1:], generator=draw)
        deltas[layer] = (LowRank.from_factors(up * 0.2, down * 0.2, alpha=2.0),)
    path = tmp_path_factory.mktemp("loras") / "dog.safetensors"
    impasto.save_adapter(Adapter(deltas, family="sd1", base=base.fingerprint()), path)
    return path


@pytest.fixture(scope="module")
def plain(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The picture of "a dog" with seed 5 and no adapter."""
    out = tmp_path_factory.mktemp("plain")
    draw(out, mini, "a dog", "--seed", 5)
    return out / "001-5.png"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        app.main(["generate", *map(str, arguments)])
    return int(ended.value.code or 0)


def draw(out: Path, *arguments: object, after: list[str] | None = None) -> dict[str, np.ndarray]:
    """Pixels by file name."""
    assert run(*arguments, "-o", out, *SMALL, *(after or [])) == 0
    return {path.name: pixels(path) for path in sorted(out.iterdir())}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def told(path: Path) -> dict:
    """What a picture says of itself."""
    return json.loads(picture_texts(open_picture(path))["impasto"])


def difference(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference, in 8-bit levels."""
    return int(np.abs(a - b).max())


def test_same_seed_same_file(mini: Path, plain: Path, tmp_path: Path, capsys) -> None:
    draw(tmp_path, mini, "a dog", "--seed", 5)
    assert (tmp_path / "001-5.png").read_bytes() == plain.read_bytes()
    assert pixels(plain).shape == (48, 32, 3)
    assert capsys.readouterr().out == f"{tmp_path / '001-5.png'}\n"  # stdout tells the files


def test_a_picture_does_not_depend_on_its_neighbours(mini: Path, tmp_path: Path) -> None:
    many = draw(tmp_path / "many", mini, "a dog", "a much longer prompt about a cat", "--seed", 5, "--count", 2,
                "--batch", 3, "--negative", "blurry")
    assert list(many) == ["001-5.png", "001-6.png", "002-5.png", "002-6.png"]
    alone = draw(tmp_path / "a", mini, "a dog", "--seed", 6, "--negative", "blurry")
    assert difference(alone["001-6.png"], many["001-6.png"]) <= 1
    other = draw(tmp_path / "b", mini, "a much longer prompt about a cat", "--seed", 5, "--negative", "blurry")
    assert difference(other["001-5.png"], many["002-5.png"]) <= 1
    assert difference(many["001-5.png"], many["001-6.png"]) > 1
    assert difference(many["001-5.png"], many["002-5.png"]) > 1


def test_a_tag_in_the_prompt_equals_the_option(mini: Path, dog: Path, plain: Path, tmp_path: Path,
                                               monkeypatch) -> None:
    option = draw(tmp_path / "option", mini, "a dog", "--seed", 5, "--adapter", f"{dog}:0.8")["001-5.png"]
    tag = draw(tmp_path / "tag", mini, "a dog <lora:dog:0.8>", "--seed", 5, "--adapter-dir", dog.parent)["001-5.png"]
    path = draw(tmp_path / "path", mini, f"a dog <lora:{dog}:0.8>", "--seed", 5)["001-5.png"]
    monkeypatch.chdir(dog.parent)
    here = draw(tmp_path / "here", mini, "<lora:dog:0.8>a dog", "--seed", 5)["001-5.png"]
    assert difference(option, tag) == difference(option, path) == difference(option, here) == 0
    assert difference(option, pixels(plain)) > 1


def test_an_adapter_is_in_force_for_its_own_prompt_only(mini: Path, dog: Path, plain: Path, tmp_path: Path) -> None:
    both = draw(tmp_path / "both", mini, "a dog <lora:dog>", "a dog", "--seed", 5, "--batch", 4,
                "--adapter-dir", dog.parent)
    assert difference(both["002-5.png"], pixels(plain)) <= 1
    assert difference(both["001-5.png"], pixels(plain)) > 1


def test_a_hypernetwork_is_found_by_its_name_and_has_a_strength(mini: Path, plain: Path, tmp_path: Path) -> None:
    hook, draws = Hypernetwork([32, 64], activation="relu"), torch.Generator().manual_seed(0)
    for _, _, network in hook.networks():
        initialise(network, "kaiming_normal", draws)
    impasto.save_adapter(Adapter({}, family="sd1", hooks=(hook,)), tmp_path / "net.pt", format="hypernetwork",
                         dtype=torch.float32)
    file = tmp_path / "net.pt"
    option = draw(tmp_path / "option", mini, "a dog", "--seed", 5, "--adapter", f"{file}:0.7")["001-5.png"]
    tag = draw(tmp_path / "tag", mini, "a dog <lora:net:0.7>", "--seed", 5, "--adapter-dir", tmp_path)["001-5.png"]
    none = draw(tmp_path / "none", mini, "a dog", "--seed", 5, "--adapter", f"{file}:0")["001-5.png"]
    assert difference(option, tag) == 0 and difference(option, pixels(plain)) > 1
    assert difference(none, pixels(plain)) == 0
    impasto.save_adapter(Adapter({}, hooks=(Hypernetwork([999]),)), tmp_path / "odd.pt", format="hypernetwork")
    assert run(mini, "a dog", "--adapter", tmp_path / "odd.pt", "-o", tmp_path / "odd", *SMALL) == 1


def test_strengths_add_up(mini: Path, dog: Path, plain: Path, tmp_path: Path) -> None:
    half = draw(tmp_path / "half", mini, "a dog", "--seed", 5, "--adapter", f"{dog}:0.3", "--adapter", f"{dog}:0.5")
    whole = draw(tmp_path / "whole", mini, "a dog", "--seed", 5, "--adapter", f"{dog}:0.8")
    none = draw(tmp_path / "none", mini, "a dog", "--seed", 5, "--adapter", f"{dog}:0")
    assert difference(half["001-5.png"], whole["001-5.png"]) <= 1
    assert difference(none["001-5.png"], pixels(plain)) <= 1


def test_the_command_in_a_picture_draws_it_again(mini: Path, dog: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    prompt = "-a (red:1.2) dog's <lora:dog:0.5>\nin the snow"
    first = draw(tmp_path / "a", mini, "--seed", 5, "--negative", "-blurry", "--guidance", 4.5, "--scheduler",
                 "euler_a", "--adapter-dir", dog.parent, "--adapter", f"{dog}:0.25", "--clip-skip", 1,
                 after=["--", prompt])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        app.main(["inspect", str(tmp_path / "a" / "001-5.png"), "--json"])
    words = shlex.split(json.loads(capsys.readouterr().out)["command"])
    assert words[:2] == ["impasto", "generate"]
    (tmp_path / "mini.safetensors").symlink_to(mini)
    (tmp_path / "dog.safetensors").symlink_to(dog)
    monkeypatch.chdir(tmp_path)
    assert run("-o", "b", "--device", "cpu", *words[2:]) == 0
    again = pixels(tmp_path / "b" / "001-5.png")
    assert difference(first["001-5.png"], again) == 0


def command_of(picture: Path, capsys) -> list[str]:
    """The words of the command that inspect gives, without those of another picture's making."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        app.main(["inspect", str(picture), "--json"])
    return shlex.split(json.loads(capsys.readouterr().out)["command"])[2:]


def test_the_command_in_a_picture_names_its_refiner_and_its_vae(tmp_path: Path, monkeypatch, capsys) -> None:
    base, refiner = (write_checkpoint(tmp_path / f"{name}.safetensors", name) for name in ("sdxl", "sdxl-refiner"))
    vae = write_checkpoint(tmp_path / "other.safetensors", "sdxl", seed=1)
    first = draw(tmp_path / "a", base, "a dog", "--seed", 5, "--refiner", refiner, "--handover", 0.5, "--vae", vae)
    words = command_of(tmp_path / "a" / "001-5.png", capsys)
    monkeypatch.chdir(tmp_path)
    assert run("-o", "b", "--device", "cpu", *words) == 0
    assert difference(first["001-5.png"], pixels(tmp_path / "b" / "001-5.png")) == 0


@pytest.mark.parametrize(("options", "told"), [
    ((), []), (("t5_length=77", "mask_padding=true"), ["t5_length=77", "mask_padding=true"]),
    (("t5=false",), ["t5=false"]),
])
def test_the_command_in_a_picture_has_the_settings_of_its_family(tmp_path: Path, capsys, options, told) -> None:
    base = write_checkpoint(tmp_path / "base", "sd3", layout="diffusers")
    draw(tmp_path / "a", base, "a dog", "--seed", 5, *(word for one in options for word in ("--base-option", one)))
    words = command_of(tmp_path / "a" / "001-5.png", capsys)
    assert [words[i + 1] for i, word in enumerate(words) if word == "--base-option"] == told


def test_the_command_in_a_picture_tells_what_no_file_does(tmp_path: Path, capsys) -> None:
    base = write_checkpoint(tmp_path / "base.safetensors", "sd2")
    draw(tmp_path / "a", base, "a dog", "--seed", 5, "--prediction", "v_prediction")
    words = command_of(tmp_path / "a" / "001-5.png", capsys)
    assert words[words.index("--prediction") + 1] == "v_prediction"


def test_a_picture_to_begin_from(mini: Path, tmp_path: Path) -> None:
    begin = tmp_path / "begin.png"
    Image.radial_gradient("L").convert("RGBA").save(begin)
    weak = draw(tmp_path / "weak", mini, "a dog", "--seed", 5, "--init", begin, "--strength", 0.4)["001-5.png"]
    strong = draw(tmp_path / "strong", mini, "a dog", "--seed", 5, "--init", begin, "--strength", 1)["001-5.png"]
    assert difference(weak, strong) > 1
    found = told(tmp_path / "weak" / "001-5.png")
    assert (found["init"], found["settings"]["strength"]) == ("begin.png", 0.4)


def test_a_grid_shows_all(mini: Path, tmp_path: Path) -> None:
    files = draw(tmp_path / "out", mini, "a dog", "a cat", "--seed", 5, "--count", 3, "--grid")
    grid = files["grid-5.png"]
    assert grid.shape == (2 * 48, 3 * 32, 3)
    assert difference(grid[48:, 64:], files["002-7.png"]) == 0


def test_a_random_seed_is_in_the_name_and_in_the_file(mini: Path, tmp_path: Path) -> None:
    (name,) = draw(tmp_path / "out", mini, "a dog")
    assert name == f"001-{told(tmp_path / 'out' / name)['seed']}.png"


def test_json(mini: Path, tmp_path: Path, capsys) -> None:
    draw(tmp_path / "out", mini, "a dög", "--seed", 5, "--json")
    assert json.loads(capsys.readouterr().out) == {"grid": None, "pictures": [
        {"file": str(tmp_path / "out" / "001-5.png"), "prompt": "a dög", "seed": 5}]}


def test_an_output_that_exists_is_refused_before_anything_is_loaded(tmp_path: Path, capsys) -> None:
    there = tmp_path / "001-5.png"
    there.write_text("mine")
    assert run("no-base", "a dog", "--seed", 5, "-o", tmp_path) == 1
    assert "--force" in capsys.readouterr().err
    assert there.read_text() == "mine"


def test_force_writes_over_it(mini: Path, tmp_path: Path) -> None:
    (tmp_path / "001-5.png").write_text("mine")
    assert draw(tmp_path, mini, "a dog", "--seed", 5, "--force")["001-5.png"].shape == (48, 32, 3)


@pytest.mark.parametrize(("arguments", "line"), [
    (["a dog <lora:dgo:1>"], "did you mean 'dog'?"),
    (["a dog", "--adapter", "nowhere.safetensors:0.5"], "nowhere.safetensors: no adapter of that name"),
    (["a dog <lora:dog:strong>"], "<lora:name:0.8>"),
    (["a dog", "--negative", "<lora:dog:1>"], "negative"),
    (["a dog", "--scheduler", "eulr"], "did you mean 'euler'?"),
    (["a dog", "--size", "36x48"], "multiple of 8"),
    (["a dog", "--init", "nothing.png"], "nothing.png: no such file"),
    (["a dog", "--device", "cuda:99"], "cuda:99"),
    (["a dog", "--clip-skip", "9"], "clip_skip"),
    (["a dog", "--family", "sd9"], "sd9"),
    (["a dog", "--strength", "0.5"], "--strength: says how much of a picture is drawn anew; give it with --init"),
    (["a dog", "--handover", "0.5"], "--handover: says when another base takes over; give it with --refiner"),
])
def test_what_users_get_wrong_is_one_line(mini: Path, dog: Path, tmp_path: Path, capsys, arguments, line) -> None:
    assert run(mini, "--seed", 5, "-o", tmp_path, "--adapter-dir", dog.parent, *SMALL, *arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and line in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "line"), [
    (["--size", "36x48"], "width 36 is not a multiple of 8 pixels"),
    (["--size", "32x0"], "height 0 is not a multiple of 8 pixels"),
    (["--refiner", "other", "--handover", "1.5"], "handover must lie between 0 and 1, not 1.5"),
    (["--refiner", "other", "--handover", "0"], "handover must lie between 0 and 1, not 0.0"),
    (["--init", "begin.png", "--strength", "0"], "strength must lie above 0"),
])
def test_what_cannot_be_is_told_before_the_base_is_loaded(tmp_path: Path, capsys, monkeypatch, arguments, line) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("begin.png")
    assert run("no-base", "a dog", *arguments) == 1
    assert line in capsys.readouterr().err


def test_a_base_that_is_not_there(tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "none.safetensors", "a dog", "-o", tmp_path) == 1
    assert "none.safetensors: no such file" in capsys.readouterr().err


def test_an_adapter_of_another_shape_is_named(mini: Path, tmp_path: Path, capsys) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = LowRank.from_factors(torch.ones(320, 2), torch.ones(2, 320))
    impasto.save_adapter(Adapter({layer: (wide,)}, family="sd1"), tmp_path / "wide.safetensors")
    assert run(mini, "a dog", "-o", tmp_path / "out", "--adapter", tmp_path / "wide.safetensors", *SMALL) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "wide.safetensors" in error and "320" in error and layer in error


def test_a_full_device_is_advice(mini: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(pictures, "sample", full)
    assert run(mini, "a dog", "-o", tmp_path, *SMALL) == 1
    assert "--batch 1" in capsys.readouterr().err.splitlines()[-1]


def test_what_was_drawn_before_a_stop_is_kept(mini: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    real = pictures.sample

    def stopped(base, prompts, negatives, seeds, *arguments, **options):
        if seeds == [6]:
            raise KeyboardInterrupt
        return real(base, prompts, negatives, seeds, *arguments, **options)

    monkeypatch.setattr(pictures, "sample", stopped)
    assert run(mini, "a dog", "--seed", 5, "--count", 3, "-o", tmp_path, *SMALL) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["001-5.png"]


def test_what_is_not_read_of_a_long_prompt_is_told(tmp_path: Path, capsys) -> None:
    base = write_checkpoint(tmp_path / "base.safetensors", "sd3")
    draw(tmp_path / "a", base, "a dog, " * 25 + "and a cat", "--seed", 5)
    assert "CLIP reads 75 tokens of a prompt in this family, and not: 'and a cat'" in capsys.readouterr().err
