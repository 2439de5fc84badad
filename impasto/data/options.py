"""The `[data]` and `[prior]` sections of a recipe: which pictures, how they are cut, what they are called."""

from __future__ import annotations

from typing import Literal

import pydantic
from PIL import ImageColor
from pydantic import Field


class Section(pydantic.BaseModel):
    """Typos are errors; values are checked on assignment too."""

    model_config = pydantic.ConfigDict(extra="forbid", validate_assignment=True)


class DataOptions(Section):
    """`[data]`: the pictures to learn from."""

    folder: str | None = Field(None, description="Folder of pictures, folders inside it included, with a .txt "
                               "caption beside each unless caption is given.")
    source: Literal["folder", "world"] = Field("folder", description="world: pictures of the embedded base's drawn "
                                               "world with their captions, made as they are needed.")
    pictures: int | None = Field(None, ge=1, description="How many of the drawn world (default 20000).")
    doodles: float = Field(0.0, ge=0, le=1, description="Share of the drawn world's pictures that show nothing in "
                           "particular and have no caption; they keep a VAE general.")
    caption: str | None = Field(None, description="One caption for all pictures; .txt files are then not "
                                "read (diffusers' instance prompt).")
    missing_captions: Literal["error", "empty"] = Field(
        "error", description="What a picture without a caption is: an error by name, or captioned with "
        "nothing.")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="Share of samples that are trained without their "
                                   "caption, which guidance needs when a base is trained (SD 1.x: 0.1).")
    resolution: int = Field(512, ge=8, description="Pixels: side of the square whose area buckets have; "
                            "512 is what SD 1.x was trained at.")
    buckets: bool = Field(True, description="Aspect-ratio buckets, as in kohya and OneTrainer; without "
                          "them every picture is cropped to a square (diffusers' examples).")
    bucket_step: int = Field(64, ge=8, description="Pixels: sides of buckets are multiples of it (kohya: "
                             "64).")
    bucket_min: int | None = Field(None, ge=8, description="Pixels: shortest side of a bucket; default: "
                                   "half of resolution (kohya: 256 at 512).")
    bucket_max: int | None = Field(None, ge=8, description="Pixels: longest side of a bucket; default: "
                                   "twice resolution (kohya: 1024 at 512).")
    upscale: Literal["allow", "never"] = Field(
        "allow", description="Whether small pictures are enlarged, up to 4 times, to fill their bucket "
        "(the default of all trainers); never: they get a smaller bucket of their own (kohya's "
        "bucket_no_upscale).")
    flip: bool = Field(False, description="Each picture mirrored in half of its uses; off by default in "
                       "all trainers, as faces and writing are not symmetric.")
    background: str = Field("white", description="Colour under transparent pixels: a CSS name or #rrggbb.")
    cache: str | None = Field(None, description="Folder for encoded pictures and captions; default: the "
                              "user's cache directory.")

    @pydantic.field_validator("background")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        ImageColor.getrgb(value)
        return value

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> DataOptions:
        if self.source == "folder" and self.folder is None:
            raise ValueError("say where the pictures are: data.folder")
        if self.source == "world" and (self.folder is not None or self.caption is not None):
            raise ValueError("source = \"world\" draws pictures and captions itself: leave folder and caption out")
        if self.source == "folder" and (self.pictures is not None or self.doodles):
            raise ValueError("pictures and doodles are of source = \"world\"")
        if self.source == "world" and self.pictures is None:
            object.__setattr__(self, "pictures", 20_000)
        return self

    @pydantic.model_validator(mode="after")
    def _sizes_agree(self) -> DataOptions:
        if self.buckets and self.bucket_step > self.resolution:
            raise ValueError(f"bucket_step {self.bucket_step} is larger than resolution {self.resolution}")
        low, high = self.shortest, self.longest
        if self.buckets and not low <= self.resolution <= high:
            raise ValueError(f"resolution {self.resolution} is not between bucket_min {low} and "
                             f"bucket_max {high}")
        return self

    @property
    def shortest(self) -> int:
        """Shortest side of a bucket, pixels."""
        return self.bucket_min or max(self.resolution // 2, self.bucket_step)

    @property
    def longest(self) -> int:
        """Longest side of a bucket, pixels."""
        return self.bucket_max or self.resolution * 2


class PriorOptions(Section):
    """`[prior]`: class pictures, which keep what the base knows of the class (DreamBooth, Ruiz et al.)."""

    caption: str | None = Field(None, description='What the class is called: "a photo of a dog". Needed to draw '
                                "class pictures; without it those of folder have a .txt caption each.")
    folder: str | None = Field(None, description="Class pictures that are there already, all of them "
                               "used; default: they are drawn with the base itself, once.")
    images: int = Field(200, ge=1, description="Class pictures to draw (200: Hugging Face's DreamBooth "
                        "guide; the paper: about 1000).")
    weight: float = Field(1.0, ge=0, description="Loss weight of class pictures beside 1 for the others "
                          "(the paper's lambda; diffusers: 1).")
    @pydantic.model_validator(mode="after")
    def _drawn_from_words(self) -> PriorOptions:
        if self.folder is None and self.caption is None:
            raise ValueError("say what the class is called (prior.caption), or where its pictures are (prior.folder)")
        return self

    steps: int = Field(30, ge=1, description="Sampler steps for drawing them.")
    guidance: float = Field(7.5, ge=0, description="Classifier-free guidance for drawing them (diffusers: "
                            "7.5).")
    scheduler: str = Field("dpm++2m", description="As in impasto generate --scheduler.")
    batch_size: int = Field(4, ge=1, description="Class pictures drawn at once (diffusers: 4); their last "
                            "bits depend on it.")
