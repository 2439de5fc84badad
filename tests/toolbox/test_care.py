"""What the toolbox must not do: touch its inputs, lose things silently, end in a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.dense import Dense
from impasto.deltas.hypernetwork import Hypernetwork
from impasto.deltas.ranks import Wanted
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.toolbox.blocks import Blocks
from impasto.toolbox.convert import convert
from impasto.toolbox.extract import extracted
from impasto.toolbox.merge import add_difference, merge_adapters, merge_checkpoints
from impasto.toolbox.mix import mix, resize
from tests.formats.adapter_cases import random_adapter
from tests.formats.checkpoint_cases import tensors_of
from tests.formats.kind_cases import adapter_of_kind

Written = Callable[..., Path]
QUERY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def saved(adapter: Adapter, path: Path) -> Path:
    save_adapter(adapter, path, dtype=torch.float32, format="hypernetwork" if adapter.hooks else "kohya")
    return path


def network(activate_output: bool = False) -> Adapter:
    hook = Hypernetwork([32], activation="relu", activate_output=activate_output)
    with torch.no_grad():
        for parameter in hook.parameters():
            parameter.normal_(std=0.1)
    return Adapter({}, family="sd1", hooks=(hook.requires_grad_(False),))


def changed(checkpoint: Path, out: Path, **tensors: torch.Tensor) -> Path:
    with safe_open(checkpoint, "pt") as opened:
        save_file(load_file(checkpoint) | tensors, out, opened.metadata())
    return out


def test_no_folder_with_inputs_gives_way(written: Written, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(written(), models / "a.safetensors")
    file = saved(random_adapter(), models / "l.safetensors")
    shutil.copytree(written("diffusers"), models / "folder")
    for work in (lambda: convert(models / "a.safetensors", models, force=True),
                 lambda: merge_adapters(models / "folder", [Weighted(str(file))], models, force=True),
                 lambda: merge_adapters(models / "folder", [Weighted(str(file))], Path("."), force=True)):
        with pytest.raises(UserError, match="holds one of the inputs|is no name"):
            work()
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "page.txt").write_text("dear")
    with pytest.raises(UserError, match="holds something else than a model"):
        convert(models / "a.safetensors", tmp_path / "diary", force=True)
    assert sorted(path.name for path in models.iterdir()) == ["a.safetensors", "folder", "l.safetensors"]
    convert(models / "a.safetensors", tmp_path / "made")
    convert(models / "a.safetensors", tmp_path / "made", force=True)


def test_the_base_is_an_input_too(written: Written, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    shutil.copy(written(), base)
    dora = saved(adapter_of_kind("dora"), tmp_path / "d.safetensors")
    for work in (lambda: mix([Weighted(str(dora))], base, base=base, force=True),
                 lambda: resize(dora, Wanted(rank=1), base, base=base, force=True),
                 lambda: convert(dora, base, kind="lora", wanted=Wanted(rank=1), base=base, force=True)):
        with pytest.raises(UserError, match="is one of the inputs"):
            work()
    assert base.stat().st_size == written().stat().st_size


def test_files_beside_are_looked_at_too_and_none_is_left_of_a_failure(tmp_path: Path) -> None:
    lora = saved(random_adapter(), tmp_path / "l.safetensors")
    hyper = saved(network(), tmp_path / "both-hypernetwork.pt")
    before = hyper.read_bytes()
    with pytest.raises(UserError, match="is one of the inputs"):
        mix([Weighted(str(lora)), Weighted(str(hyper), 0.5)], tmp_path / "both.safetensors")
    shutil.copy(hyper, tmp_path / "h.pt")
    with pytest.raises(UserError, match="both-hypernetwork.pt: is there already"):
        mix([Weighted(str(lora)), Weighted(str(tmp_path / "h.pt"))], tmp_path / "both.safetensors")
    on = saved(network(activate_output=True), tmp_path / "on.pt")
    with pytest.raises(UserError, match="strength"):
        mix([Weighted(str(lora)), Weighted(str(on), 0.5)], tmp_path / "half.safetensors")
    assert not (tmp_path / "half.safetensors").exists() and hyper.read_bytes() == before
    for out, line in (("h.safetensors", "call it h.pt"),):
        with pytest.raises(UserError, match=line):
            mix([Weighted(str(tmp_path / "h.pt"), 0.5)], tmp_path / out)
    with pytest.raises(UserError, match="call it x.safetensors"):
        mix([Weighted(str(lora))], tmp_path / "x.pt")
    mix([Weighted(str(lora)), Weighted(str(tmp_path / "h.pt"), 0.5)], tmp_path / "two.safetensors")
    assert (tmp_path / "two-hypernetwork.pt").exists()


def test_a_vae_alone_in_a_folder(written: Written, tmp_path: Path) -> None:
    one, other = written("diffusers") / "vae", written("diffusers", seed=1) / "vae"
    merge_checkpoints([one, other], [0.5, 0.5], tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    a, b, c = (tensors_of(open_checkpoint(path)) for path in (one, other, tmp_path / "out"))
    assert all(torch.allclose(c[name], 0.5 * a[name] + 0.5 * b[name], atol=1e-6) for name in c)


def test_biases_survive_another_kind(tmp_path: Path) -> None:
    file = saved(adapter_of_kind("dense"), tmp_path / "a.safetensors")
    for kind, wanted in (("lokr", None), ("lora", Wanted(rank=1))):
        convert(file, tmp_path / f"{kind}.safetensors", kind=kind, wanted=wanted)
        assert sum(key.endswith("diff_b") for key in load_file(tmp_path / f"{kind}.safetensors")) == sum(
            key.endswith("diff_b") for key in load_file(file)) > 0


def test_types_of_eight_bits(written: Written, tmp_path: Path) -> None:
    with safe_open(written(), "pt") as opened:
        metadata = opened.metadata()
    small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(written()).items()}
    save_file(small, tmp_path / "f8.safetensors", metadata)
    adapter = random_adapter()
    file = saved(adapter, tmp_path / "l.safetensors")
    merge_adapters(tmp_path / "f8.safetensors", [Weighted(str(file))], tmp_path / "o.safetensors", dtype=torch.float32)
    found, layer = tensors_of(open_checkpoint(tmp_path / "o.safetensors")), "unet.conv_in"
    wanted = small["model.diffusion_model.input_blocks.0.0.weight"].float() + adapter.dense(layer)
    torch.testing.assert_close(found[f"{layer}.weight"], wanted)
    merge_checkpoints([tmp_path / "f8.safetensors", written(seed=1)], [0.5, 0.5], tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float8_e4m3fn}


def test_integers_are_refused(written: Written, tmp_path: Path) -> None:
    whole = changed(written(), tmp_path / "i8.safetensors",
                    **{QUERY: torch.ones(load_file(written())[QUERY].shape, dtype=torch.int8)})
    file = saved(random_adapter(), tmp_path / "l.safetensors")
    for work in (lambda out: merge_adapters(whole, [Weighted(str(file))], out),
                 lambda out: merge_checkpoints([whole, written()], [0.5, 0.5], out),
                 lambda out: extracted(whole, written(), Wanted(rank=1)),
                 lambda out: extracted(written(), whole, Wanted(rank=1))):
        with pytest.raises(UserError, match="int8|floating"):
            work(tmp_path / "out.safetensors")


def test_a_type_that_is_too_small_is_told(written: Written, tmp_path: Path) -> None:
    big = changed(written(), tmp_path / "big.safetensors",
                  **{"model.diffusion_model.out.2.bias": torch.full((4,), 1e6)})
    file = saved(random_adapter(), tmp_path / "l.safetensors")
    for work in (lambda: merge_adapters(big, [Weighted(str(file))], tmp_path / "o.safetensors", dtype=torch.float16),
                 lambda: convert(big, tmp_path / "o", dtype=torch.float16),
                 lambda: convert(big, tmp_path / "o.safetensors", dtype=torch.float16)):
        with pytest.raises(UserError, match="too large for F16"):
            work()


def test_the_ending_tells_the_layout(written: Written, tmp_path: Path) -> None:
    convert(written("pickle"), tmp_path / "new.safetensors")
    old, new = (tensors_of(open_checkpoint(path)) for path in (written("pickle"), tmp_path / "new.safetensors"))
    assert all(torch.equal(old[name], new[name]) for name in old)
    with pytest.raises(UserError, match="a folder under a file's name"):
        convert(written(), tmp_path / "x.safetensors", to="diffusers")
    told = changed(written(), tmp_path / "told.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    assert not convert(told, tmp_path / "folder").remarks
    unet = {key: tensor for key, tensor in load_file(written()).items() if key.startswith("model.diffusion_model.")}
    with safe_open(written(), "pt") as opened:
        save_file(unet, tmp_path / "unet.safetensors", opened.metadata() | {"impasto.family": "sd1"})
    with pytest.raises(UserError, match="holds no text_encoder and no vae"):
        convert(tmp_path / "unet.safetensors", tmp_path / "lone")


def test_a_bias_needs_one(written: Written, tmp_path: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    file = saved(Adapter({layer: (Dense.from_weight(torch.ones(32, 32), torch.ones(32)),)}, family="sd1"),
                 tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="changes the bias of .*to_q, which has none"):
        merge_adapters(written(), [Weighted(str(file))], tmp_path / "out.safetensors")


def test_a_base_of_other_sizes(tmp_path: Path) -> None:
    dora = saved(adapter_of_kind("dora"), tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="changes text_encoder.* and in the base it is"):
        mix([Weighted(str(dora))], tmp_path / "out.safetensors", base=Path(__file__).parents[2] / "impasto/mini/base")


def test_a_tokenizer_of_its_own_is_not_lost(written: Written, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(written("diffusers"), folder)
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<cat>": 49408}')
    with pytest.raises(UserError, match="a tokenizer of its own"):
        convert(folder, tmp_path / "out.safetensors")


def test_what_was_not_read_is_not_copied(written: Written, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(written("diffusers"), folder)
    shutil.copy(written(), folder / "v1-5-pruned.safetensors")
    (folder / "text_encoder" / "flax_model.msgpack").write_bytes(b"old")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"kept")
    file = saved(random_adapter(), tmp_path / "l.safetensors")
    (remark,) = merge_adapters(folder, [Weighted(str(file))], tmp_path / "out").remarks
    assert remark == "left out, as they were not read: text_encoder/flax_model.msgpack, v1-5-pruned.safetensors"
    assert not (tmp_path / "out" / "v1-5-pruned.safetensors").exists()
    assert (tmp_path / "out" / "safety_checker" / "model.safetensors").read_bytes() == b"kept"


def test_blocks_that_fit_nothing_and_weights_that_do_not_sum_up(written: Written, tmp_path: Path) -> None:
    file = saved(random_adapter(), tmp_path / "l.safetensors")
    out = tmp_path / "o.safetensors"
    for work in (lambda blocks: merge_adapters(written(), [Weighted(str(file))], out, blocks=blocks),
                 lambda blocks: mix([Weighted(str(file))], out, blocks=blocks)):
        with pytest.raises(UserError, match="unet.up_block.3: is the beginning of no layer's path"):
            work(Blocks.parse("unet.up_block.3=0"))
    merge_checkpoints([written(), written(seed=1)], [0.5, 0.6], out, blocks=Blocks.parse("M00=0"))
    first, made = (tensors_of(open_checkpoint(path)) for path in (written(), out))
    name = "unet.mid_block.resnets.0.conv1.weight"
    assert torch.equal(made[name], first[name])


def test_an_inpainting_model_is_made_of_another(written: Written, tmp_path: Path) -> None:
    inpainting, tuned, base = written(variant="inpainting"), written(seed=1), written()
    add_difference(inpainting, tuned, base, 1.0, tmp_path / "out.safetensors")
    a, b, c, made = (tensors_of(open_checkpoint(path))
                     for path in (inpainting, tuned, base, tmp_path / "out.safetensors"))
    wanted = a["unet.conv_in.weight"].clone()
    wanted[:, :4] += b["unet.conv_in.weight"] - c["unet.conv_in.weight"]
    torch.testing.assert_close(made["unet.conv_in.weight"], wanted)
    assert open_checkpoint(tmp_path / "out.safetensors").variant == "inpainting"


def test_one_by_one_convolutions_in_both_shapes(tmp_path: Path) -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{layer}.lora_up.weight": torch.randn(32, 2), f"{layer}.lora_down.weight": torch.randn(2, 32)},
              tmp_path / "flat.safetensors")
    file = saved(random_adapter(), tmp_path / "l.safetensors")
    for order in ((0, 1), (1, 0)):
        files = [Weighted(str(tmp_path / "flat.safetensors")), Weighted(str(file))]
        mix([files[i] for i in order], tmp_path / "out.safetensors", dtype=torch.float32, force=True)
        path = "unet.down_blocks.0.attentions.0.proj_in"
        one, two, made = (load_adapter(each).dense(path).flatten()
                          for each in (files[0].path, file, tmp_path / "out.safetensors"))
        torch.testing.assert_close(made, one + two, rtol=1e-4, atol=1e-5)


def test_metadata_tell_of_what_it_is_now(tmp_path: Path) -> None:
    file = saved(adapter_of_kind("loha"), tmp_path / "a.safetensors")
    convert(file, tmp_path / "out.safetensors", kind="lora")
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        told = opened.metadata()
    assert told["ss_network_module"] == "networks.lora" and json.loads(told["ss_network_args"]).get("algo") is None


def test_comfyui_gets_no_core_under_dora_either(tmp_path: Path) -> None:
    from impasto.deltas.dora import Dora

    plain = adapter_of_kind("lokr-tucker")
    deltas = {layer: (Dora(terms[0], torch.ones(terms[0].shape[0], *(1,) * (len(terms[0].shape) - 1))),)
              for layer, terms in plain.deltas.items() if len(terms[0].shape) > 2}
    file = saved(Adapter(deltas, family="sd1"), tmp_path / "a.safetensors")
    convert(file, tmp_path / "out.safetensors", to="comfyui", dtype=torch.float32)
    keys = load_file(tmp_path / "out.safetensors").keys()
    assert not any(key.endswith("lokr_t2") for key in keys) and any(key.endswith("dora_scale") for key in keys)


def test_only_what_is_there_is_resized_and_compared(written: Written, tmp_path: Path) -> None:
    tokens = Adapter({}, family="sd1", embeddings={"<cat>": {"text_encoder": torch.randn(2, 768)}})
    save_adapter(tokens, tmp_path / "cat.safetensors", format="webui-embedding")
    with pytest.raises(UserError, match="changes no layer by a matrix"):
        resize(tmp_path / "cat.safetensors", Wanted(rank=2), tmp_path / "out.safetensors")
    save_adapter(random_adapter(), tmp_path / "l.safetensors", dtype=torch.float32)
    told = mix([Weighted(str(tmp_path / "l.safetensors")), Weighted(str(tmp_path / "cat.safetensors"), 0.3)],
               tmp_path / "both.safetensors")
    assert told.remarks == ("new words are carried along as they are: no strength changes them",)
    unet = {key: tensor + 0.01 * torch.randn(tensor.shape) for key, tensor in load_file(written()).items()
            if key.startswith("model.diffusion_model.")}
    with safe_open(written(), "pt") as opened:
        save_file(unet, tmp_path / "unet.safetensors", opened.metadata() | {"impasto.family": "sd1"})
    remarks = extracted(written(), tmp_path / "unet.safetensors", Wanted(rank=1))[1].remarks
    assert remarks[0] == "text_encoder and vae: not compared, unet.safetensors has none"
    assert not any("embeddings" in remark for remark in remarks)
    with pytest.raises(UserError, match="by fro or by ratio"):
        extracted(written(), tmp_path / "unet.safetensors", Wanted(energy=0.9, measure="cumulative"))
