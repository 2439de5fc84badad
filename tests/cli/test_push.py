"""`impasto push`, against a stand-in for the hub."""

from __future__ import annotations

import io
import json
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from impasto.cli import app
from impasto.core.errors import UserError
from impasto.core.progress import Reporter
from impasto.deltas.adapter import Adapter
from impasto.formats.adapters import save_adapter
from impasto.formats.arrangement import save_arranged
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.sharing import hub as sharing
from impasto.training.sharing.after import announce, push_after
from impasto.training.sharing.card import write_card
from impasto.training.sharing.parcel import pack
from impasto.training.trainer import train
from tests.checkpoints import write_checkpoint
from tests.cli.running import impasto, one_line
from tests.training.conftest import draw, tree
from tests.training.hub_server import Hub, serving

PROMPT = "sks dog | in a `bucket`"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name must not be told."""
    return tmp_path_factory.mktemp("secret-place")


def trained(place: Path, name: str, **sections) -> Recipe:
    mini = place / "mini.safetensors"
    photos = place / "private-photos"
    if not mini.exists():
        write_checkpoint(mini, family="sd1", size="mini", layout="ldm", seed=0)
        photos.mkdir()
        for key in range(2):
            draw(photos / f"{key}.png", key, (64, 64))
    sections = {"train": {"steps": 2, "batch_size": 1}, "sample": {"every": 2, "steps": 1, "prompts": [PROMPT]},
                **sections}
    method = sections.pop("method", None)
    nested = tree(mini, photos, place / name, **sections)
    nested["method"] = method or nested["method"]
    made = make_recipe(nested)
    train(made)
    return made


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run of a LoRA."""
    return Path(trained(place, "run").output.dir)


@pytest.fixture(scope="module")
def silent(place: Path) -> Path:
    """One that keeps to itself how it was made."""
    return Path(trained(place, "silent", output={"metadata": "none"}).output.dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, with a token for it; of this process and of those that it starts."""
    with serving() as served:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.address)
        for name, value in (("HF_ENDPOINT", served.address), ("HF_TOKEN", "hf_test"), ("HF_HUB_OFFLINE", "0")):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield served


def push(capsys, *arguments: object, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        app.main(["push", *map(str, arguments)])
    shown = capsys.readouterr()
    assert (ended.value.code or 0) == code, shown
    return shown.out, shown.err


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_goes_up_in_one_commit(run: Path, hub: Hub, capsys, place: Path) -> None:
    out, _ = push(capsys, run, "me/dog")
    files = hub.repos["me/dog"]["files"]
    assert set(files) == {"README.md", "dog.safetensors", "samples/0.png"}
    assert files["dog.safetensors"] == (run / "dog.safetensors").read_bytes()
    assert files["samples/0.png"] == (run / "previews" / "000002-0.png").read_bytes()
    assert len(hub.commits) == 1 and hub.tokens == {"Bearer hf_test"} and not hub.repos["me/dog"]["private"]
    assert out.splitlines()[-1] == f"{hub.address}/me/dog" and "README.md" in out
    push(capsys, run / "dog.safetensors", "me/dog")  # again: the repository is there
    assert len(hub.commits) == 2


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub library's own
def test_weights_go_as_large_files_where_the_hub_asks_for_it(run: Path, hub: Hub, capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.large = ".safetensors"
    push(capsys, run, "me/dog")
    assert hub.repos["me/dog"]["files"]["dog.safetensors"] == (run / "dog.safetensors").read_bytes()
    hub.refuse["/large/"] = 403
    hub.large_files.clear()
    assert "may not write there" in push(capsys, run, "me/dog", code=1)[1]
    assert len(hub.commits) == 1


def test_the_card_tells_all_but_places(run: Path, place: Path) -> None:
    parcel = pack(run)
    card = write_card(parcel, "me/dog", base_model="stable-diffusion-v1-5/stable-diffusion-v1-5")
    front = front_of(card)
    assert front["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert front["library_name"] == "diffusers" and front["pipeline_tag"] == "text-to-image"
    assert {"stable-diffusion", "text-to-image", "lora"} <= set(front["tags"])
    assert front["instance_prompt"] == "a photo of sks dog"
    assert front["widget"] == [{"text": PROMPT, "output": {"url": "samples/0.png"}}]
    for program in ("diffusers", "A1111", "ComfyUI", "kohya", "Impasto"):
        assert f"**{program}**" in card
    assert "<lora:dog:1>" in card and 'weight_name="dog.safetensors"' in card
    assert r"sks dog \| in a \`bucket\`" in card and "lora of rank 4" in card
    recipe = tomllib.loads(card.split("```toml\n")[1].split("\n```")[0])
    assert recipe["method"][0]["rank"] == 4 and recipe["base"]["path"] == "mini.safetensors"
    assert recipe["data"]["resolution"] == 64 and "folder" not in recipe["data"] and "dir" not in recipe["output"]
    assert "private-photos" not in card and place.name not in card


def test_a_hub_id_is_the_base_of_the_card(place: Path, run: Path) -> None:
    parcel = pack(run)
    assert parcel.told is not None
    assert "base_model" not in front_of(write_card(parcel, "me/dog"))
    for path, told in (("owner/name", "owner/name"), ("v1-5-pruned-emaonly.safetensors",
                                                      "stable-diffusion-v1-5/stable-diffusion-v1-5")):
        parcel.told.recipe["base"]["path"] = path
        assert front_of(write_card(parcel, "me/dog"))["base_model"] == told


def test_what_keeps_to_itself_how_it_was_made_stays_silent(silent: Path, capsys, tmp_path: Path) -> None:
    push(capsys, silent, "me/dog", "--dry-run", "-o", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = front_of(card)
    assert not {"base_model", "instance_prompt"} & front.keys() and front["widget"][0]["text"] == "-"
    assert "sks" not in card and "mini.safetensors" not in card and "private" not in card and "It does not say" in card
    with Image.open(tmp_path / "out" / "samples" / "0.png") as picture:
        assert picture.size == (64, 64) and getattr(picture, "text", {}) == {}
    with Image.open(silent / "previews" / "000002-0.png") as kept:
        assert "parameters" in kept.text  # the run's own is as it was


def test_a_dry_run_writes_the_folder_and_asks_nobody(run: Path, hub: Hub, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    told = json.loads(push(capsys, run, "me/dog", "--dry-run", "--json")[0])
    assert told["folder"] == "dog-push" and told["url"] is None
    assert {each["path"]: each["bytes"] for each in told["files"]} == {
        path.relative_to("dog-push").as_posix(): path.stat().st_size for path in Path("dog-push").rglob("*.*")}
    assert (tmp_path / "dog-push" / "dog.safetensors").read_bytes() == (run / "dog.safetensors").read_bytes()
    assert hub.asked == []
    assert "is there already" in push(capsys, run, "me/dog", "--dry-run", code=1)[1]
    assert "nothing was pushed" in push(capsys, run, "me/dog", "--dry-run", "-o", "other")[0]
    assert "--dry-run" in push(capsys, run, "me/dog", "-o", "other", code=2)[1]


def test_a_whole_checkpoint_is_a_folder_that_diffusers_opens(place: Path, hub: Hub, capsys) -> None:
    made = trained(place, "whole", method={"kind": "full"})
    push(capsys, made.output.dir, "me/whole")
    files = hub.repos["me/whole"]["files"]
    assert {"model_index.json", "unet/config.json", "README.md", "samples/0.png"} <= set(files)
    card = files["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("me/whole"' in card and "lora" not in front_of(card)["tags"]
    assert place.name not in card


def test_peft_folders_and_single_files_have_their_own_ways(run: Path, place: Path, tmp_path: Path) -> None:
    from impasto.formats.adapters import load_adapter

    save_adapter(load_adapter(run / "dog.safetensors"), tmp_path / "dog", format="peft")
    card = write_card(pack(tmp_path / "dog"), "me/dog")
    assert 'PeftModel.from_pretrained(pipe.unet, "me/dog")' in card
    (tmp_path / "two").mkdir()
    (tmp_path / "dog").rename(tmp_path / "two" / "unet")
    parcel = pack(tmp_path / "two")
    assert 'subfolder="unet"' in write_card(parcel, "me/dog") and "unet/adapter_config.json" in parcel.files
    card = write_card(pack(place / "mini.safetensors"), "me/base")
    assert "from_single_file(file)" in card and "models/Stable-diffusion" in card and "It does not say" in card


@pytest.mark.parametrize("tokens", [["<cat>"], ["<cat>", "sks dog"]])
def test_embeddings_go_up_with_each_token_s_own_file(place: Path, tmp_path: Path, tokens: list[str]) -> None:
    """What the card says of diffusers is what diffusers does with the file."""
    from diffusers import StableDiffusionPipeline

    method = {"kind": "textual_inversion", "tokens": {token: {"vectors": 2} for token in tokens}}
    name = f"pets-{len(tokens)}"
    made = trained(place, name, method=method, data={"caption": " ".join(tokens)}, output={"name": "pets"})
    parcel = pack(Path(made.output.dir))
    own = ["pets-cat.safetensors", "pets-sks_dog.safetensors"] if len(tokens) > 1 else ["pets.safetensors"]
    assert set(parcel.files) == {"pets.safetensors", *own, "samples/0.png"}
    card = write_card(parcel, "me/pets")
    assert "textual_inversion" in front_of(card)["tags"] and "A textual inversion embedding for Stable" in card
    for file, token in zip(own, tokens, strict=True):
        assert f'weight_name="{file}", token="{token}")' in card
        assert f"write `embedding:{Path(file).stem}` for `{token}`" in card
        base = write_checkpoint(tmp_path / file, layout="diffusers")
        pipe: Any = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, local_files_only=True)
        pipe.load_textual_inversion(str(Path(made.output.dir)), weight_name=file, token=token)
        assert pipe.tokenizer.convert_tokens_to_ids([token, f"{token}_1"]) == [49408, 49409]
    assert "private-photos" not in card and place.name not in card


def test_a_bundle_without_its_tokens_own_files_is_not_offered_as_one_token(tmp_path: Path) -> None:
    embeddings = {token: {"text_encoder": torch.randn(1, 768)} for token in ("<cat>", "sks dog")}
    files = save_arranged(Adapter({}, family="sd1", embeddings=embeddings), tmp_path / "pets.safetensors")
    for path in files[1:]:
        path.unlink()
        card = write_card(pack(files[0]), "me/pets")
        assert 'weight_name="pets.safetensors"' not in card and "put `pets.safetensors` into `embeddings`" not in card
        assert "put `pets.safetensors` into `models/embeddings`" not in card
        assert "`pets.safetensors` into `models/Lora`" in card and "--adapter pets.safetensors`" in card
        assert ("load_textual_inversion" in card) == (path == files[1])  # of the token whose file is there
        assert "`<cat>`" in card


@pytest.mark.parametrize(("method", "own"), [
    ([{"kind": "lora", "rank": 2}, {"kind": "hypernetwork", "structure": [1, 1]}], "dog.safetensors"),
    ([{"kind": "textual_inversion", "tokens": {"<cat>": {}}}, {"kind": "hypernetwork", "structure": [1, 1]}],
     "dog.safetensors")])
def test_a_hypernetwork_goes_up_with_what_it_was_trained_beside(place: Path, hub: Hub, capsys, method: list[dict],
                                                                own: str) -> None:
    kind = method[0]["kind"]
    made = trained(place, f"both-{kind}", method=method, data={"caption": "a <cat>"})
    out, _ = push(capsys, made.output.dir, "me/dog")
    files = hub.repos["me/dog"]["files"]
    assert set(files) == {"README.md", own, "dog-hypernetwork.pt", "samples/0.png"} and "dog-hypernetwork.pt" in out
    assert files["dog-hypernetwork.pt"] == (Path(made.output.dir) / "dog-hypernetwork.pt").read_bytes()
    card = files["README.md"].decode()
    assert {"hypernetwork", {"lora": "lora"}.get(kind, "textual_inversion")} <= set(front_of(card)["tags"])
    assert {"lora": "A LoRA and a hypernetwork for"}.get(kind, "A textual inversion embedding and a hyper") in card
    assert "put `dog-hypernetwork.pt` into `models/hypernetworks`" in card and "<hypernet:dog-hypernetwork:1>" in card
    strength = ":0.8" if kind == "lora" else ""
    assert f"--adapter {own}{strength} --adapter dog-hypernetwork.pt:0.8`" in card
    push(capsys, Path(made.output.dir) / "dog-hypernetwork.pt", "me/alone")  # by itself it stays alone
    assert set(hub.repos["me/alone"]["files"]) == {"README.md", "dog-hypernetwork.pt", "samples/0.png"}


def test_what_diffusers_refuses_is_not_offered_to_it(tmp_path: Path) -> None:
    """A LoRA beside a token: A1111 loads both, diffusers neither."""
    from tests.formats.adapter_cases import random_adapter

    for embeddings, offered in (({}, True), ({"<cat>": {"text_encoder": torch.randn(1, 768)}}, False)):
        save_adapter(replace(random_adapter(alpha=1.0), embeddings=embeddings), tmp_path / "dog.safetensors")
        card = write_card(pack(tmp_path / "dog.safetensors"), "me/dog")
        assert ("load_lora_weights" in card) == offered
        assert ("**diffusers** (refuses a file with new tokens in it)" in card) == (not offered)
        assert ("choose it in a *Load LoRA* node (ignores the new tokens)." in card) == (not offered)
        assert ("(it loads 18 of 21 layers, and ignores the new tokens)" in card) == (not offered)
        assert "write `<lora:dog:1>` in the prompt.\n" in card


def test_a_card_of_other_kinds_of_change(tmp_path: Path) -> None:
    """It names the kinds and ranks, and the module that kohya's scripts want for them."""
    from tests.formats.kind_cases import adapter_of_kind

    for kind, title, tags in (("loha", "A LoHa for", {"loha"}), ("dora-lokr", "A DoRA/LoKr for", {"lokr", "dora"})):
        save_adapter(adapter_of_kind(kind), tmp_path / "dog.safetensors")
        card = write_card(pack(tmp_path / "dog.safetensors"), "me/dog")
        assert title in card and tags <= set(front_of(card)["tags"])
        assert "--network_module lycoris.kohya" in card and "(refuses a file with more than LoRA in it)" in card
        assert "load_lora_weights" not in card


def test_a_card_of_ones_own(run: Path, hub: Hub, capsys, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Mine, 猫\n", encoding="utf-8")
    push(capsys, run, "me/dog", "--card", tmp_path / "card.md")
    assert hub.repos["me/dog"]["files"]["README.md"].decode() == "# Mine, 猫\n"
    assert "cannot be read as a card" in push(capsys, run, "me/dog", "--card", tmp_path / "none.md", code=1)[1]


def test_private_is_private(run: Path, hub: Hub, capsys) -> None:
    push(capsys, run, "me/dog", "--private")
    assert hub.repos["me/dog"]["private"]
    push(capsys, run, "me/dog", "--private")
    hub.repos["me/cat"] = {"private": False, "files": {}}
    assert "is public" in push(capsys, run, "me/cat", "--private", code=1)[1]
    assert hub.repos["me/cat"]["files"] == {}


@pytest.mark.parametrize("name", ["dog", "a/b/c", "me/..", "me/a--b", "me/-a", "me/a b", "me/dog.git", "/dog", "me/",
                                  "me/" + "a" * 95, "mé/dog"])
def test_bad_names_are_one_line(name: str, run: Path, hub: Hub, capsys) -> None:
    error = push(capsys, run, name, code=1)[1]
    assert error.count("\n") == 1 and error.startswith("error: OWNER/NAME: ") and hub.asked == []


def test_a_missing_token_is_one_line(run: Path, hub: Hub, tmp_path: Path) -> None:
    error = one_line(impasto("push", run, "me/dog", HF_TOKEN="", HF_HOME=str(tmp_path), HF_ENDPOINT=hub.address,
                             HF_HUB_OFFLINE="0"))
    assert "there is no token" in error and "HF_TOKEN" in error and hub.asked == []


def test_offline_is_one_line(run: Path, hub: Hub, capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in push(capsys, run, "me/dog", code=1)[1]


@pytest.mark.parametrize(("where", "status", "told"), [
    ("/api/repos/create", 401, "does not know this token"), ("/api/repos/create", 403, "may not write there"),
    ("/api/repos/create", 500, "the hub failed (500)"), ("/commit/", 401, "does not know this token"),
    ("/commit/", 403, "may not write there"), ("/commit/", 500, "the hub failed (500)"),
    ("/commit/", 413, "too large"), ("/preupload/", 429, "asks for a pause"),
])
def test_a_server_that_refuses_is_one_line(where: str, status: int, told: str, run: Path, hub: Hub, capsys,
                                           monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.refuse[where] = status
    error = [line for line in push(capsys, run, "me/dog", code=1)[1].splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and told in error[0] and error[0].startswith("error: me/dog: ")
    assert hub.commits == []


@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/"])
def test_a_server_that_hangs_is_given_up(where: str, run: Path, hub: Hub, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sharing, "TIMEOUT", 0.5)
    hub.refuse[where] = 0
    assert "does not answer" in push(capsys, run, "me/dog", code=1)[1]


def test_a_server_that_is_not_there(run: Path, hub: Hub, capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "could not be pushed" in push(capsys, run, "me/dog", code=1)[1]


def test_what_is_no_artifact_is_refused(run: Path, hub: Hub, capsys, tmp_path: Path) -> None:
    assert "no such" in push(capsys, tmp_path / "none.safetensors", "me/dog", code=1)[1]
    assert "is a picture" in push(capsys, run / "previews" / "000002-0.png", "me/dog", code=1)[1]
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half" / "dog.safetensors").rename(tmp_path / "half" / "dog-000001.safetensors")
    assert "dog-000001.safetensors" in push(capsys, tmp_path / "half", "me/dog", code=1)[1]
    assert hub.asked == []


class Heard(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    warn = note = lambda self, line: self.said.append(line)


def test_push_to_pushes_at_the_end_and_a_failure_loses_nothing(place: Path, hub: Hub, run: Path) -> None:
    made = trained(place, "pushed", output={"push_to": "me/dog", "push_private": True})
    assert "README.md" in hub.repos["me/dog"]["files"] and hub.repos["me/dog"]["private"]
    assert "push_to" not in hub.repos["me/dog"]["files"]["README.md"].decode()
    heard, artifact = Heard(), Path(made.output.dir) / "dog.safetensors"
    hub.refuse["/api/"] = 403
    push_after(made.output, artifact, heard)
    assert len(heard.said) == 1 and heard.said[0].startswith("was not pushed: ")
    assert heard.said[0].endswith(f"impasto push {artifact} me/dog --private")


def test_push_to_is_looked_at_before_the_first_step(hub: Hub, monkeypatch) -> None:
    base = {"base": {"path": "x"}, "method": {"kind": "lora"}}
    with pytest.raises(UserError, match="output.push_to: is not OWNER/NAME"):
        make_recipe({**base, "output": {"push_to": "dog"}})
    heard, output = Heard(), make_recipe({**base, "output": {"push_to": "me/dog"}}).output
    announce(output, heard)
    assert heard.said == []
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(sharing, "get_token", lambda: None)
    announce(output, heard)
    assert len(heard.said) == 1 and "there is no token" in heard.said[0]


def test_pictures_without_texts_are_pictures(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, format="PNG")
    (tmp_path / "run" / "previews" / "000002-0.png").write_bytes(blank.getvalue())
    assert pack(tmp_path / "run").samples[0].prompt == ""
