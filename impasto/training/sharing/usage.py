"""How a shared artifact is used, program by program: the middle of its model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath

from impasto.core.errors import UserError
from impasto.formats.adapters import load_adapter
from impasto.formats.configs import CONFIGS
from impasto.formats.header import read_header
from impasto.formats.programs import Verdict, lycoris, of_file
from impasto.training.sharing.parcel import Parcel

#: how each program that `formats.programs` knows is told to use a LoRA file
HINTS = {
    "A1111": "put `{file}` into `models/Lora` and write `<lora:{stem}:1>` in the prompt",
    "Forge": "put `{file}` into `models/Lora` and write `<lora:{stem}:1>` in the prompt",
    "ComfyUI": "put `{file}` into `models/loras` and choose it in a *Load LoRA* node",
    "kohya": "`--network_module {module} --network_weights {file}`, {where}",
}
#: kohya's module, and where its scripts take a file, by family; of any other
KOHYAS = {"sd3": ("networks.lora_sd3", "to train on from it with `sd3_train_network.py`")}
KOHYA = ("networks.lora", "with `gen_img.py` or to train on from it")
LOADS_NOTHING = "it loads no layer of this file's format"


#: what bases of a variant are shown: in diffusers' call, and on our command line
SHOWN = {"": ("", ""), "inpainting": (", image=photo, mask_image=mask", " --init photo.png --mask mask.png"),
         "instruct-pix2pix": (", image=photo", " --init photo.png")}


def usage(parcel: Parcel, repo: str, base_model: str | None, caption: str) -> Iterator[str]:
    """Lines of Markdown. `caption`: a prompt that calls what was learned, or ""."""
    prompt = next((sample.prompt for sample in parcel.samples if sample.prompt), caption) or "a prompt of yours"
    if parcel.detected.kind == "checkpoint":
        yield from (_folder(parcel, repo, prompt) if parcel.artifact.is_dir() else _single_file(parcel, repo, prompt))
    elif parcel.detected.kind == "hypernetwork":
        yield from _hypernetwork(parcel, base_model, prompt)
    elif parcel.artifact.is_dir():
        yield from _peft(parcel, repo, base_model)
    elif parcel.detected.kind == "embedding":
        yield from _embedding(parcel, repo, base_model, prompt)
    else:
        yield from _adapter(parcel, repo, base_model, prompt)


def _adapter(parcel: Parcel, repo: str, base_model: str | None, prompt: str) -> Iterator[str]:
    name = parcel.weights.replace("`", "'")
    base = base_model or "path/to/the/base"
    module, where = KOHYAS.get(parcel.detected.family, KOHYA)
    module = "lycoris.kohya" if lycoris(read_header(parcel.artifact).tensors) else module
    verdicts = _verdicts(parcel)
    if "diffusers" not in verdicts or verdicts["diffusers"].loaded:
        yield from _diffusers(base, [f"pipe.load_lora_weights({json.dumps(repo)}, weight_name={json.dumps(name)})"],
                              prompt)
    for program, loads in _programs(verdicts):
        if program in HINTS:
            hint = HINTS[program].format(file=name, stem=PurePath(name).stem, module=module, where=where)
            yield f"**{program}**: {hint}{loads}.\n"
        elif loads:
            yield f"**{program}**{loads}.\n"
    yield from _with_hypernetworks(parcel, base, prompt, f"{name}:0.8")


def _diffusers(base: str, loads: Iterable[str], prompt: str) -> Iterator[str]:
    """A pipeline on the base, which loads something, and a picture."""
    yield from ["**diffusers**", "", "```python", "import torch", "from diffusers import DiffusionPipeline", "",
                f'pipe = DiffusionPipeline.from_pretrained({json.dumps(base)}, torch_dtype=torch.float16).to("cuda")',
                *loads, f"picture = pipe({json.dumps(prompt, ensure_ascii=False)}).images[0]", "```", ""]


def _embedding(parcel: Parcel, repo: str, base_model: str | None, prompt: str) -> Iterator[str]:
    """Each token by its own file: A1111, Forge and ComfyUI call it after that, diffusers by any name."""
    base, whole = base_model or "path/to/the/base", parcel.weights.replace("`", "'")
    within = list(load_adapter(parcel.artifact).embeddings)
    parts = parcel.tokens if len(within) > 1 else (parcel.artifact,)
    tokens = {part.name.replace("`", "'"): next(iter(load_adapter(part).embeddings)) for part in parts}
    if tokens:
        yield from _diffusers(base, [
            f"pipe.load_textual_inversion({json.dumps(repo)}, weight_name={json.dumps(name)}, "
            f"token={json.dumps(token, ensure_ascii=False)})" for name, token in tokens.items()], prompt)
    for name, token in tokens.items():
        stem, word = PurePath(name).stem, token.replace("`", "'")
        yield from [f"**A1111**, **Forge**: put `{name}` into `embeddings` and write `{stem}` for `{word}`.\n",
                    f"**ComfyUI**: put `{name}` into `models/embeddings` and write `embedding:{stem}` for `{word}`.\n"]
    if alone := ["`" + token.replace("`", "'") + "`" for token in within if token not in tokens.values()]:
        yield from [f"**A1111**: for {', '.join(alone)}, put `{whole}` into `models/Lora` and write "
                    f"`<lora:{PurePath(whole).stem}:1>` beside the token.\n",
                    f"**diffusers**, **Forge**, **ComfyUI**: they take a file for each token, and `{whole}` holds "
                    f"several; for {', '.join(alone)} there is none here.\n"]
    yield from _with_hypernetworks(parcel, base, prompt, whole)


def _hypernetwork(parcel: Parcel, base_model: str | None, prompt: str) -> Iterator[str]:
    name = parcel.weights.replace("`", "'")
    yield from _of_hypernetwork(name)
    yield from _with_hypernetworks(parcel, base_model or "path/to/the/base", prompt, f"{name}:0.8")


def _of_hypernetwork(name: str) -> Iterator[str]:
    """What other programs do with a hypernetwork's file."""
    yield from [f"**A1111**, **Forge**: put `{name}` into `models/hypernetworks` and write "
                f"`<hypernet:{PurePath(name).stem}:1>` in the prompt.\n",
                f"**ComfyUI**: put `{name}` into `models/hypernetworks` and choose it in a *HypernetworkLoader* "
                "node.\n"]


def _with_hypernetworks(parcel: Parcel, base: str, prompt: str, own: str) -> Iterator[str]:
    """What was trained beside an adapter, and the command that draws with all of it. `own`: the adapter's argument."""
    names = [path.name.replace("`", "'") for path in parcel.hypernetworks]
    for name in names:
        yield from _of_hypernetwork(name)
    adapters = " ".join(f"--adapter {each}" for each in (own, *(f"{name}:0.8" for name in names)))
    yield from [f"**Impasto**: `impasto generate {base} {_quoted(prompt)} {adapters}`", ""]


def _verdicts(parcel: Parcel) -> dict[str, Verdict]:
    """What each program makes of this file, if that is known."""
    try:
        return {verdict.program: verdict for verdict in of_file(parcel.artifact)}
    except UserError:
        return {}


def _programs(found: Mapping[str, Verdict]) -> Iterator[tuple[str, str]]:
    """Each program with what it leaves out of a file, if that is known."""
    for program in ("diffusers", *HINTS):
        verdict = found.get(program)
        if verdict is None or (verdict.loaded == verdict.total and not verdict.caution):
            yield program, ""
        elif verdict.loaded == 0:
            yield program, f" ({verdict.caution or LOADS_NOTHING})"
        elif verdict.loaded < verdict.total:
            more = f", and {verdict.caution}" if verdict.caution else ""
            yield program, f" (it loads {verdict.loaded} of {verdict.total} layers{more})"
        else:
            yield program, f" ({verdict.caution})"


def _drawn(variant: str, prompt: str) -> list[str]:
    """Lines of Python that draw a picture with `pipe`."""
    called, _ = SHOWN[variant]
    loads = [f'{name} = load_image("{name}.png")' for name in ("photo", "mask") if name in called]
    return [*(["", "from diffusers.utils import load_image", ""] if loads else []), *loads,
            f"picture = pipe({json.dumps(prompt, ensure_ascii=False)}{called}).images[0]", "```", ""]


def _folder(parcel: Parcel, repo: str, prompt: str) -> Iterator[str]:
    variant = parcel.detected.variant
    yield from ["**diffusers**", "", "```python", "import torch", "from diffusers import DiffusionPipeline", "",
                f'pipe = DiffusionPipeline.from_pretrained({json.dumps(repo)}, torch_dtype=torch.float16).to("cuda")',
                *_drawn(variant, prompt),
                "**ComfyUI**: download the folder into `models/diffusers` and choose it in a *DiffusersLoader* node.\n",
                f"**kohya**: `--pretrained_model_name_or_path {repo}`.\n",
                "**A1111**, **Forge**: they take single files, into which this folder has to be converted first.\n",
                f"**Impasto**: `impasto generate {repo} {_quoted(prompt)}{SHOWN[variant][1]} --download`", ""]


def _single_file(parcel: Parcel, repo: str, prompt: str) -> Iterator[str]:
    name, variant = parcel.weights.replace("`", "'"), parcel.detected.variant
    pipeline = CONFIGS.get(parcel.detected.family or "sd1").pipelines[variant]
    yield from ["**diffusers**", "", "```python", f"from diffusers import {pipeline}",
                "from huggingface_hub import hf_hub_download", "",
                f"file = hf_hub_download({json.dumps(repo)}, {json.dumps(name)})",
                f"pipe = {pipeline}.from_single_file(file)", *_drawn(variant, prompt),
                f"**A1111**, **Forge**: put `{name}` into `models/Stable-diffusion`.\n",
                f"**ComfyUI**: put `{name}` into `models/checkpoints`.\n",
                f"**kohya**: `--pretrained_model_name_or_path {name}`.\n",
                f"**Impasto**: `impasto generate {name} {_quoted(prompt)}{SHOWN[variant][1]}`", ""]


def _peft(parcel: Parcel, repo: str, base_model: str | None) -> Iterator[str]:
    base = base_model or "path/to/the/base"
    parts = [path.name for path in sorted(parcel.artifact.iterdir()) if (path / "adapter_config.json").exists()]
    loads = [f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, {json.dumps(repo)}, subfolder="{part}")'
             for part in parts] or [f"pipe.unet = PeftModel.from_pretrained(pipe.unet, {json.dumps(repo)})"]
    yield from ["**peft**, and diffusers through it", "", "```python", "from diffusers import DiffusionPipeline",
                "from peft import PeftModel", "", f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base)})",
                *loads, "```", "",
                "A1111, ComfyUI and kohya's scripts do not read this format.", ""]


def _quoted(prompt: str) -> str:
    """A prompt as a word of a command line, between backticks."""
    return json.dumps(" ".join(prompt.split()), ensure_ascii=False).replace("`", "'").replace("$", "\\$")
