"""The sections of a recipe that are this floor's: the base, the loop, previews, and what is left behind."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from impasto.core.counts import check_steps
from impasto.core.errors import UserError, nearest
from impasto.core.weighted import checked
from impasto.training.optimizers import OPTIMIZERS, SHARED
from impasto.training.sharing.repository import repository
from impasto.training.trackers import TRACKERS

#: optimizer steps where a recipe says nothing
DEFAULT_STEPS = 500


class Section(pydantic.BaseModel):
    """A section of a recipe: typos are errors, values are checked on assignment too."""

    model_config = pydantic.ConfigDict(extra="forbid", validate_assignment=True)


class BaseOptions(Section):
    """`[base]`: the checkpoint to fine-tune."""

    path: str | None = Field(None, description="A single file, a diffusers folder, a hub id, or mini, the embedded "
                             "base. To plan without one, family is enough.")
    init: Literal["weights", "random"] = Field("weights", description="random: path gives the networks' shapes alone, "
                                               "and their weights begin as their libraries have it.")
    family: str | None = Field(None, description="The family, where the file's own word is not enough.")
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What its network predicts, where the file does not tell. Of SD 2, whose files do not, "
        "it is epsilon in the one of 512 pixels and v_prediction in that of 768.")
    vae: str | None = Field(None, description="Another VAE: a file or a folder.")
    text_encoders: list[str] = Field([], description="Files of text encoders alone, for a base without: clip_l, clip_g "
                                     "and t5xxl of SD 3, in any order.")
    options: dict[str, bool | int] = Field({}, description="Settings of the family's own, in docs/families.md: of SD "
                                           "3, t5 = false leaves T5 out.")
    clip_skip: int = Field(0, ge=0, le=11, description="Text encoder layers left out at the end; 0 is the "
                           "last layer (A1111 and kohya call that clip skip 1).")
    download: bool = Field(False, description="Whether a hub id may be fetched from the internet.")
    adapters: list[Annotated[str, pydantic.AfterValidator(checked)]] = Field(
        [], description="Adapters, each a file or \"FILE:0.8\", that are merged into the base's weights in memory "
        "before all else, one after the other (kohya's base_weights).")
    quantize: Literal["none", "int8", "fp8", "nf4"] = Field(
        "none", description="How the denoiser's frozen weights are held: as they are, in a byte each (int8, fp8; with "
        "a scale for each output), or in half a byte (nf4: QLoRA, Dettmers et al. 2023). Each is made anew where it is "
        "multiplied. Not for method full.")
    quantize_text: Literal["none", "int8", "fp8", "nf4"] = Field(
        "none", description="Likewise those of the text encoders, of which SD 3's T5 is the largest network of all.")

    @pydantic.model_validator(mode="after")
    def _is_some_base(self) -> BaseOptions:
        if self.path is None and self.family is None:
            raise ValueError("say which base: path, or, to plan without one, family")
        return self

    @property
    def place(self) -> str:
        """The path. Raises `UserError` where there is none: planning alone can do without."""
        if self.path is None:
            raise UserError("'base.path' is missing", where="recipe",
                            fix="say which base: base.path=… on the command line")
        return self.path

    @pydantic.model_validator(mode="after")
    def _onto_weights(self) -> BaseOptions:
        if self.adapters and self.init == "random":
            raise ValueError("adapters are made for a base's own weights, not for random ones")
        held = {self.quantize, self.quantize_text} - {"none"}
        if held and self.adapters:
            raise ValueError(f"weights that are held as {held.pop()} would round base.adapters away: merge them into a "
                             "file first (impasto merge)")
        if held and self.init == "random":
            raise ValueError("random weights are there to be trained: leave quantize out")
        return self


def _optimizer(name: str) -> str:
    """A name that is known, or an import path."""
    if name not in OPTIMIZERS and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f"is no optimizer; {nearest(name, OPTIMIZERS)}")
    return name


class TrainOptions(Section):
    """`[train]`: the loop."""

    steps: int | None = Field(None, ge=1, description=f"Optimizer steps; default {DEFAULT_STEPS} (diffusers' "
                              "DreamBooth-LoRA example), unless epochs is given.")
    epochs: int | None = Field(None, ge=1, description="Passes over the pictures, instead of steps.")
    batch_size: int = Field(1, ge=1, description="Pictures in a micro-batch (diffusers, kohya: 1). Class pictures "
                            "come on top.")
    accumulation: int = Field(1, ge=1, description="Micro-batches in an optimizer step.")
    learning_rate: float = Field(1e-4, gt=0, description="1e-4: LoRA in diffusers, kohya and OneTrainer alike. Where "
                                 "left out, the optimizer's own, in the table below.")
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Other rates for weights whose path matches a regular expression, such as "
        "'unet[.]mid_block' = 2e-5; the first that matches counts, before the methods' own rates.")
    optimizer: Annotated[str, pydantic.AfterValidator(_optimizer)] = Field(
        "adamw", description="One of the table below, or any class by its import path, as in torch.optim:RAdam.")
    optimizer_options: dict[str, Any] = Field({}, description="A table that is passed on to the optimizer's class.")
    betas: tuple[float, float] | None = Field(None, description="Default: the optimizer's own (AdamW's are [0.9, "
                                              "0.999] in diffusers and OneTrainer).")
    weight_decay: float | None = Field(None, ge=0, description="Likewise (AdamW: 0.01, diffusers, OneTrainer).")
    eps: float | None = Field(None, gt=0, description="Likewise (AdamW: 1e-8).")
    schedule: Literal["constant", "cosine", "cosine_with_restarts", "linear", "polynomial", "rex", "one_cycle"] = Field(
        "constant", description="How the rate falls to zero after the warm-up: not (constant), as half a cosine, as "
        "several, linearly, as a power, by REX (Chen et al. 2021), or by one_cycle, which rises through three tenths "
        "of the steps, or through the warm-up (Smith 2018, torch's).")
    restarts: int | None = Field(None, ge=1, description="Cosines in the run, for cosine_with_restarts (default 3; "
                                 "transformers' num_cycles).")
    power: float | None = Field(None, gt=0, description="Of polynomial (default 2; diffusers' is 1, which is linear).")
    warmup: int | float = Field(0, ge=0, description="Steps in which the rate rises linearly from zero (diffusers: "
                                "0-500); a share of all steps if less than 1.")
    clip: float = Field(1.0, ge=0, description="Largest global gradient norm (diffusers, OneTrainer: 1); 0: none.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Of frozen weights and of the computation. auto: bf16 on a GPU that has it, fp16 "
        "with loss scaling on one that has not, fp32 on a CPU. Trained weights are always fp32.")
    checkpointing: bool | Annotated[float, Field(gt=0, lt=1)] = Field(
        False, description="Gradient checkpointing: less memory, about a third more time. A share such as 0.25 is of "
        "the denoiser's blocks, those at the highest resolution first, which keep the most.")
    fused_backward: bool = Field(False, description="Step inside the backward, weight by weight, and let each gradient "
                                 "go at once (LOMO, Lv et al. 2023; kohya's fused_backward_pass): of method full, "
                                 "where gradients take as much as the weights. Equal to the bit. Needs clip = 0 and "
                                 "accumulation = 1; not for fp16, [prior] or several processes.")
    offload: list[Literal["activations", "blocks", "optimizer"]] = Field(
        [], description="What waits in the computer's memory until the device needs it: \"activations\", what the "
        "forward keeps for the backward; \"optimizer\", its states, which come to the device weight by weight; "
        "\"blocks\", the denoiser's frozen blocks, which come one by one (needs checkpointing = true). Equal results, "
        "for the time that the way takes.")
    fit: bool = Field(False, description="Whether the run is changed before it begins so that it fits the memory that "
                      "is free, by the cheapest means (those of impasto plan), which are told.")
    ema: float = Field(0.0, ge=0, lt=1, description="Decay of an exponential moving average of the trained weights, "
                       "which previews and artifacts then show; 0: none (SD 1.x was trained with 0.9999).")
    compile: bool = Field(False, description="torch.compile the denoiser: slow first step, faster ones after.")
    deterministic: bool = Field(False, description="Deterministic kernels, for bit-equal runs on CUDA.")
    device: str = Field("auto", description="auto, cuda, mps, cpu, or one such as cuda:1.")
    seed: int = Field(0, ge=0, description="Of every random draw.")

    @property
    def known_steps(self) -> int | None:
        """Optimizer steps, as far as they are known without the pictures: those of epochs are not."""
        return None if self.epochs else self.steps or DEFAULT_STEPS

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> TrainOptions:
        if self.steps and self.epochs:
            raise ValueError("give steps or epochs, not both")
        return self

    @pydantic.model_validator(mode="after")
    def _one_schedule(self) -> TrainOptions:
        check_steps(self.warmup, "a warmup")
        for key, schedule in (("restarts", "cosine_with_restarts"), ("power", "polynomial")):
            if getattr(self, key) is not None and self.schedule != schedule:
                raise ValueError(f"{key} belongs to schedule = \"{schedule}\", not {self.schedule}")
        return self

    @pydantic.model_validator(mode="after")
    def _own_defaults(self) -> TrainOptions:
        """What is left out is what the optimizer recommends, so that a recipe says all that it means."""
        if (entry := OPTIMIZERS.get(self.optimizer)) is None:
            return self
        for key in SHARED:
            if key not in self.model_fields_set:
                object.__setattr__(self, key, entry.settings.get(key))  # assignment would validate
            elif getattr(self, key) is not None and key not in entry.settings:
                raise ValueError(f"{self.optimizer} has no {key}")
        if "learning_rate" not in self.model_fields_set:
            object.__setattr__(self, "learning_rate", entry.rate)
        return self


class SampleOptions(Section):
    """`[sample]`: previews, made by the same code as `impasto generate`."""

    prompts: list[str] = Field([], description="What to draw; empty: the data's caption, if there is one for all.")
    negative: str = Field("", description="What to keep away from.")
    every: int = Field(200, ge=0, description="Steps between previews, beside the one before the first step; "
                       "0: no previews at all.")
    steps: int = Field(25, ge=1, description="Sampler steps.")
    guidance: float = Field(7.5, ge=0, description="Classifier-free guidance (diffusers' default for SD 1.x).")
    image_guidance: float = Field(1.5, ge=0, description="Of an instruct-pix2pix base: guidance by the picture to edit "
                                  "(diffusers: 1.5). Such bases, and those for inpainting, draw their previews with "
                                  "pictures of the data, held-out ones where there are any, and random holes.")
    scheduler: str = Field("dpm++2m", description="As in impasto generate --scheduler.")
    size: int | None = Field(None, ge=8, description="Side in pixels; default: data.resolution.")
    seed: int = Field(0, ge=0, description="Of the first prompt; the next ones count on.")


def _tracker(name: str) -> str:
    """A name that is known."""
    if name not in TRACKERS:
        raise ValueError(f"is no tracker; {nearest(name, TRACKERS)}")
    return name


class OutputOptions(Section):
    """`[output]`: where the run lives and what it leaves."""

    dir: str = Field("runs/run", description="The run's directory; the same recipe there goes on where it stopped.")
    name: str | None = Field(None, description="Of the artifact; default: the directory's name.")
    format: Literal["auto", "kohya", "diffusers", "peft", "webui-embedding", "diffusers-embedding",
                    "hypernetwork", "delta"] = Field(
        "auto", description="auto is kohya for changes of layers: A1111, Forge, ComfyUI, kohya and diffusers all load "
        "a LoRA of it, all but diffusers LoHa and LoKr; and for new tokens beside one (A1111 finds them there, "
        "diffusers refuses the file); for a token by itself A1111's and ComfyUI's .safetensors; for a hypernetwork "
        "A1111's .pt; for full it is diffusers, a folder with the whole base. delta is for full too: what training has "
        "changed and no more, as LyCORIS' full differences (.diff) in one file, for A1111, Forge and ComfyUI.")
    dtype: Literal["fp16", "bf16", "fp32"] = Field("fp16", description="Of the artifact (kohya: fp16).")
    save_every: int = Field(0, ge=0, description="Steps between artifacts that other programs can use at once; "
                            "0: only at the end.")
    save_every_epochs: int = Field(0, ge=0, description="The same in epochs.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints to resume from.")
    keep: int = Field(2, ge=1, description="Checkpoints kept, the newest ones.")
    metadata: Literal["full", "none"] = Field("full", description="What the artifact tells of how it was made: recipe, "
                                              "fingerprints and versions, or nothing.")
    keep_every: int = Field(0, ge=0, description="Steps between checkpoints that are kept for good; 0: none.")
    trackers: list[Annotated[str, pydantic.AfterValidator(_tracker)]] = Field(
        [], description="Where else to follow the run, beside TensorBoard: [\"wandb\"], which needs the extra wandb "
        "and goes by WANDB_PROJECT, WANDB_MODE=offline and the like.")
    track_every: int = Field(1, ge=1, description="Steps between the figures that trackers get (kohya, diffusers: 1).")
    push_to: Annotated[str, pydantic.AfterValidator(repository)] | None = Field(
        None, description="owner/name of a Hugging Face repository that gets the artifact at the end, as by "
        "impasto push.")
    push_private: bool = Field(False, description="Whether that repository is made private.")
