"""Text encoders in files of their own, for a base without: Stable Diffusion 3's; and settings of the family's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

from impasto.core.errors import UserError
from impasto.data.cache import text_encoder_key
from impasto.families.load import load_base
from impasto.formats.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.heard import Heard

PREFIXES = {"clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer.",
            "t5xxl": "text_encoders.t5xxl.transformer."}


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole base, and the same in four files as they are published: the transformer with its VAE, three encoders."""
    folder = tmp_path_factory.mktemp("apart")
    whole = write_checkpoint(folder / "whole.safetensors", "sd3", layout="ldm")
    shutil.copytree(write_checkpoint(folder / "folder", "sd3", layout="diffusers") / "tokenizer_3",
                    folder / "tokenizer_3", dirs_exist_ok=True)
    metadata = open_checkpoint(whole).metadata
    tensors = load_file(whole)
    for name, prefix in PREFIXES.items():
        own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        save_file(own, folder / f"{name}.safetensors", metadata)
    save_file(tensors, folder / "alone.safetensors", metadata)
    return folder


def files(folder: Path, *names: str) -> list[Path]:
    return [folder / f"{name}.safetensors" for name in names]


def test_in_any_order_they_are_the_whole_base(apart: Path) -> None:
    base = load_base(apart / "alone.safetensors", text_encoders=files(apart, "t5xxl", "clip_g", "clip_l"))
    assert base.fingerprint() == load_base(apart / "whole.safetensors").fingerprint()
    ours, theirs = (load_base(apart / name, text_encoders=given).encode_text(["a cat"]) for name, given in (
        ("alone.safetensors", files(apart, "clip_l", "clip_g", "t5xxl")), ("whole.safetensors", ())))
    for name, state in theirs.items():
        torch.testing.assert_close(ours[name], state)


def test_folders_of_components_in_shards_and_in_two_variants(apart: Path, tmp_path: Path) -> None:
    """As a diffusers folder is cloned: T5 in shards, the CLIPs with the half-precision files beside the main ones."""
    for name in ("text_encoder", "text_encoder_2"):
        shutil.copytree(apart / "folder" / name, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        save_file({key: torch.zeros_like(each).half() for key, each in weights.items()},
                  tmp_path / name / "model.fp16.safetensors")
    t5 = T5EncoderModel.from_pretrained(apart / "folder/text_encoder_3")
    t5.save_pretrained(tmp_path / "text_encoder_3", max_shard_size="20KB")
    assert (tmp_path / "text_encoder_3/model.safetensors.index.json").exists()
    given = [tmp_path / name for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    base = load_base(apart / "alone.safetensors", text_encoders=given)
    assert base.fingerprint() == load_base(apart / "whole.safetensors").fingerprint()


def test_folders_tell_what_shapes_do_not(apart: Path, tmp_path: Path) -> None:
    """A folder's config.json counts; a folder of weights alone is read as its file is."""
    shutil.copytree(apart / "folder/text_encoder", tmp_path / "text_encoder")
    config = tmp_path / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    others = files(apart, "clip_g", "t5xxl")
    base = load_base(apart / "alone.safetensors", text_encoders=[tmp_path / "text_encoder", *others])
    assert base.checkpoints["text_encoder"].configs["text_encoder"]["hidden_act"] == "gelu"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(apart / "clip_l.safetensors", bare / "model.safetensors")
    base = load_base(apart / "alone.safetensors", text_encoders=[bare, *others])
    assert base.fingerprint() == load_base(apart / "whole.safetensors").fingerprint()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no weights that can be read"):
        load_base(apart / "alone.safetensors", text_encoders=[tmp_path / "empty", *others])


def test_what_becomes_of_captions_hangs_on_the_tokenizer(apart: Path, tmp_path: Path) -> None:
    """Of each encoder: another vocabulary gives the same weights another key in the cache, the same in another layout
    the same."""
    def key(path: Path) -> str:
        base = load_base(path)
        return text_encoder_key(base, base.fingerprint())

    own = key(apart / "whole.safetensors")
    assert key(apart / "folder") == own
    folder = shutil.copytree(apart / "folder", tmp_path / "base")
    vocabulary = folder / "tokenizer_2/vocab.json"
    words = json.loads(vocabulary.read_text())
    words |= {"cat</w>": words["dog</w>"], "dog</w>": words["cat</w>"]}
    vocabulary.write_text(json.dumps(words))
    other = key(folder)
    shutil.rmtree(folder / "tokenizer_3")
    words = T5Tokenizer(vocab=[*((mark, 0.0) for mark in ("<pad>", "</s>", "<unk>", "▁")), ("▁cat", -2.0)], extra_ids=0)
    words.save_pretrained(folder / "tokenizer_3")
    assert len({own, other, key(folder)}) == 3


def test_without_t5_it_goes_on_and_says_so(apart: Path) -> None:
    heard = Heard()
    base = load_base(apart / "alone.safetensors", text_encoders=files(apart, "clip_l", "clip_g"), report=heard)
    assert base.text_encoder_names == ("text_encoder", "text_encoder_2")
    assert any("goes on without T5" in line for line in heard.notes)


def test_what_is_missing_or_no_text_encoder(apart: Path, tmp_path: Path) -> None:
    alone = apart / "alone.safetensors"
    for given, says in (((), "holds no text encoders.*--text-encoder"),
                        (files(apart, "clip_l", "clip_l", "clip_g"), "channels, which sd3 has none of|is a second"),
                        (files(apart, "alone"), "is no text encoder"),
                        ([tmp_path / "absent.safetensors"], "no such file")):
        with pytest.raises(UserError, match=says) as caught:
            load_base(alone, text_encoders=given)
        assert "\n" not in str(caught.value)
    sd1 = write_checkpoint(tmp_path / "sd1.safetensors", layout="ldm")
    with pytest.raises(UserError, match="is a T5 text encoder, which sd1 has none of"):
        load_base(sd1, text_encoders=files(apart, "t5xxl"))


def test_settings_of_the_familys_own(apart: Path) -> None:
    whole, heard = apart / "whole.safetensors", Heard()
    assert "text_encoder_3" not in load_base(whole, options={"t5": False}, report=heard).components
    assert not heard.notes  # it was asked for
    base = load_base(whole, options={"t5_length": 77, "mask_padding": True})
    assert base.text_settings() == {"clip_skip": 0, "t5_length": 77, "mask_padding": True}
    for options, says in (({"t5_lenght": 77}, "has no setting 't5_lenght' of its own.*t5_length"),
                          ({"t5_length": True}, "takes no True as its t5_length"),
                          ({"t5_length": 0}, "takes no 0 as its t5_length; give a whole number from 1 on"),
                          ({"t5_length": -1}, "takes no -1 as its t5_length")):
        with pytest.raises(UserError, match=says):
            load_base(whole, options=options)


def test_masked_lengths_alone_are_kept_of_t5(apart: Path) -> None:
    """What a cache keeps of a short caption is short, and the condition is what it is at full length."""
    base = load_base(apart / "whole.safetensors", options={"mask_padding": True})
    short, long = base.encode_text(["a cat"]), base.encode_text(["a cat and a dog on a green hill under the moon"])
    assert short["t5"].shape[1] < long["t5"].shape[1] < 256
    both = base.condition(base.stack_text([short, long]))["encoder_hidden_states"]
    assert both.shape[1] == 77 + 256
    torch.testing.assert_close(both[:1], base.condition(short)["encoder_hidden_states"])
