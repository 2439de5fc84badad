"""The `[data]`, `[prior]` and `[validation]` sections of a recipe: which pictures, how they are cut, what they are
called, and which of them are held out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from PIL import ImageColor
from pydantic import Field

#: keys that leave something about a picture to chance, and how many versions it then has
CHANCES = ("random_crop", "zoom", "rotate", "brightness", "contrast", "saturation", "hue")
VARIANTS = 8

#: where a template takes the caption
PLACES = ("{caption}", "{}")


class Section(pydantic.BaseModel):
    """Typos are errors; values are checked on assignment too."""

    model_config = pydantic.ConfigDict(extra="forbid", validate_assignment=True)


class DataOptions(Section):
    """`[data]`: the pictures to learn from."""

    folder: str | None = Field(None, description="Folder of pictures, folders inside it included, with a caption for "
                               "each (caption_source) unless caption is given. Needed to train, not to plan.")
    source: Literal["folder", "shards", "world"] = Field(
        "folder", description="shards: webdataset's tar files (shards). world: pictures of the embedded base's drawn "
        "world with their captions, made as they are needed.")
    shards: list[str] | None = Field(None, description="Webdataset's tar files, one or a list: paths, folders, * "
                                     "patterns, http(s) addresses (to the Hugging Face hub with its token, HF_TOKEN or "
                                     "hf auth login), {0000..0099} for numbers. Captions are the .txt, "
                                     ".caption or .json beside each picture in the shard. A shard is read whole once, "
                                     "and its index kept beside the cache.")
    shuffle_window: int = Field(4096, ge=1, description="Samples of shards that are shuffled among each other, as in "
                                "webdataset's shuffle; in each epoch the shards come in another order too.")
    bad_samples: Literal["error", "skip"] = Field(
        "error", description="What samples of shards are that cannot be used (no picture, a damaged one, no caption, a "
        "shard cut short): an error by name, or left out and counted.")
    pictures: int | None = Field(None, ge=1, description="How many of the drawn world (default 20000).")
    doodles: float = Field(0.0, ge=0, le=1, description="Share of the drawn world's pictures that show nothing in "
                           "particular and have no caption; they keep a VAE general.")
    caption: str | None = Field(None, description="One caption for all pictures; captions in files are then not "
                                "read (diffusers' instance prompt).")
    caption_source: Literal["auto", "txt", "caption", "json", "table"] = Field(
        "auto", description="Where captions are. auto: of what is there the first of .txt, .caption and .json beside "
        "the picture (a.txt or a.png.txt for a.png), then metadata.jsonl, metadata.csv, .parquet and kohya's merged "
        ".json in its folder or the folders around it; what another one says is reported. The others: only there.")
    missing_captions: Literal["error", "empty"] = Field(
        "error", description="What a picture without a caption is: an error by name, or captioned with "
        "nothing.")
    caption_template: str | None = Field(None, description='What each caption is put into: "a photo of {}", or '
                                         '"{caption}, watercolour". An empty caption stays empty; captions of class '
                                         "pictures are left alone.")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="Share of samples that are trained without their "
                                   "caption, which guidance needs when a base is trained (SD 1.x: 0.1).")
    shuffle_tags: bool = Field(False, description="The tags of a caption in another order in each use (kohya's "
                               "shuffle_caption). Captions are then encoded in each step, not once.")
    keep_tags: int = Field(0, ge=0, description="So many tags stay in front and are never left out (kohya's "
                           "keep_tokens).")
    keep_tags_separator: str = Field("|||", description="Where it is in a caption, the tags before it are kept in "
                                     "place of keep_tags, and those behind a second one stay at the end (kohya). "
                                     "Empty: a word like others.")
    tag_separator: str = Field(",", min_length=1, description="What stands between tags.")
    tag_dropout: float = Field(0.0, ge=0, le=1, description="Share of the tags that are left out in a use, each by "
                               "itself (kohya's caption_tag_dropout_rate). Captions are then encoded in each step.")
    wildcards: bool = Field(False, description="Of {a|b|c} in a caption or the template one is chosen in each use, and "
                            "of several lines one (kohya's enable_wildcard; they may be nested). Off: lines joined.")
    caption_weights: bool = Field(False, description="(word:1.2), (word) and [word] weigh words in captions as they do "
                                  "in prompts (kohya's weighted_captions). Off, as in all trainers: read as written.")
    max_tokens: int | None = Field(None, ge=1, description="CLIP tokens after which a caption is cut, at the end of a "
                                   "word; what is lost is reported. Default: any length, in chunks of 75.")
    resolution: int = Field(512, ge=8, description="Pixels: side of the square whose area buckets have; default: what "
                            "the base was made for, 512 for SD 1.x, 1024 for SDXL.")
    resolutions: list[Annotated[int, Field(ge=8)]] | None = Field(
        None, description="Several resolutions, in place of one: each picture comes at each of them, but for those at "
        "which it would be enlarged, and at the smallest one anyhow. Class pictures are drawn, and previews made, at "
        "the largest.")
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
    random_crop: bool = Field(False, description="What is cut off lies anywhere around the picture, not alike on both "
                              "sides (kohya's random_crop).")
    zoom: float = Field(0.0, ge=0, le=1, description="Pictures are enlarged by up to so much more than their bucket "
                        "asks for (0.2: a fifth), and less of them is seen.")
    rotate: float = Field(0.0, ge=0, le=45, description="Degrees by which pictures are turned at most, either way; "
                          "they are enlarged so far that no corner is empty.")
    brightness: float = Field(0.0, ge=0, le=1, description="By how much brightness is changed at most, either way "
                              "(0.1: times 0.9 to 1.1, torchvision's ColorJitter).")
    contrast: float = Field(0.0, ge=0, le=1, description="Likewise.")
    saturation: float = Field(0.0, ge=0, le=1, description="Likewise.")
    hue: float = Field(0.0, ge=0, le=0.5, description="Part of the colour circle by which hues are shifted at most, "
                       "either way (torchvision's ColorJitter).")
    variants: int = Field(VARIANTS, ge=1, description="Versions of each picture that chance makes by the seven keys "
                          "above, as a function of its content. All are encoded once and kept, and each use takes "
                          "one of them.")
    background: str = Field("white", description="Colour under transparent pixels: a CSS name or #rrggbb.")
    mask: Literal["none", "alpha", "files"] = Field(
        "none", description="What tells which parts of a picture count. alpha: the picture's own transparency. files: "
        "a grey picture for each, white where it counts, NAME-masklabel.png beside NAME.jpg (OneTrainer's name) or as "
        "masks says; of the picture's size, or the same smaller or larger. A mask is cut, turned and mirrored with its "
        "picture, and averaged over each latent cell. Held-out pictures are validated on by their masks too; class "
        "pictures have none.")
    masks: str | None = Field(None, description="Folder of masks, each called like its picture, inner folders and all "
                              "(kohya's conditioning_data_dir).")
    mask_floor: float = Field(0.1, ge=0, le=1, description="The smallest weight of a cell, however black its mask "
                              "(OneTrainer's unmasked_weight, 0.1; kohya: 0).")
    mask_normalised: bool = Field(False, description="Whether the weights of a picture's cells are divided by their "
                                  "mean, so that a small mask counts as much as a large one (OneTrainer's "
                                  "normalize_masked_area_loss, off; kohya has none).")
    missing_masks: Literal["error", "whole"] = Field(
        "error", description="What a picture without a mask, or without an alpha channel, is: an error by name, or "
        "counted in full.")
    inpaint: Literal["random", "mask"] = Field(
        "random", description="Of a base for inpainting: which part of a picture is to be drawn anew. random: the "
        "whole of it in a quarter of the uses (RunwayML), else rectangles, ellipses or brush strokes. mask: what is "
        "white in the picture's mask, which then does not weigh the loss; without one (missing_masks) the whole.")
    inpaint_masks: int = Field(4, ge=1, description="Random holes of each picture, as a function of its content. All "
                               "are encoded once and kept, for each of its variants and mirrored or not, so that the "
                               "VAE need not stay; each use takes one of them.")
    pairs: Literal["none", "files"] = Field(
        "none", description="Of an instruct-pix2pix base, which needs it: where the pictures to edit are. files: one "
        "for each, NAME-source.png beside NAME.jpg or as sources says; of the picture's size, or the same smaller or "
        "larger. It is cut, turned and mirrored with its picture, and the caption is the instruction.")
    sources: str | None = Field(None, description="Folder of the pictures to edit, each called like the picture that "
                                "is made of it, inner folders and all.")
    source_dropout: float = Field(0.0, ge=0, le=1, description="Share of samples that are trained without the picture "
                                  "to edit alone, as caption_dropout without the caption alone; guidance by the "
                                  "picture needs it when a base is trained (Brooks et al. 2023: 0.05 for each).")
    both_dropout: float = Field(0.0, ge=0, le=1, description="Share that is trained without either (Brooks et al. "
                                "2023: 0.05).")
    cache: str | None = Field(None, description="Folder for encoded pictures and captions; default: the "
                              "user's cache directory. Several sets have one.")
    repeats: int = Field(1, ge=1, description="How often each picture comes in an epoch (kohya's num_repeats).")
    share: float | None = Field(None, gt=0, description="Of several sets, in place of repeats: which part of all "
                                "samples comes from this one, beside the shares of the others (1 and 3: a quarter). "
                                "All sets have one, or none.")
    loss_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="Of its pictures' losses, times what a "
                               "picture's own caption file says (loss_weight in a folder's .json files and tables); "
                               "held-out pictures weigh 1 (OneTrainer's loss_weight).")
    caption_loss_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        {}, description="What it is multiplied by for pictures whose caption, as it is read, has a match of a regular "
        "expression, upper and lower case alike: '\\bblurry\\b' = 0.3. The first that matches counts; 1 where none "
        "does.")

    @pydantic.field_validator("shards", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @pydantic.field_validator("caption_loss_weights")
    @classmethod
    def _are_expressions(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value

    @pydantic.field_validator("background")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        ImageColor.getrgb(value)
        return value

    @pydantic.field_validator("caption_template")
    @classmethod
    def _has_a_place(cls, value: str | None) -> str | None:
        if value is not None and not any(place in value for place in PLACES):
            raise ValueError("has no place for the caption: write {} or {caption} there")
        return value

    @pydantic.field_validator("keep_tags_separator")
    @classmethod
    def _is_no_space(cls, value: str) -> str:
        if value and not value.strip():
            raise ValueError("is nothing but spaces, which are between all words")
        return value

    @pydantic.model_validator(mode="after")
    def _separators_differ(self) -> DataOptions:
        if self.keep_tags_separator.strip() == self.tag_separator.strip() != "":
            raise ValueError(f"keep_tags_separator and tag_separator are both {self.tag_separator!r}")
        return self

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> DataOptions:
        if self.source == "world" and (self.folder is not None or self.caption is not None):
            raise ValueError("source = \"world\" draws pictures and captions itself: leave folder and caption out")
        if self.source == "shards" and not self.shards:
            raise ValueError("say where the shards are: data.shards")
        if self.source == "shards" and (self.folder is not None or self.caption_source == "table"):
            raise ValueError("source = \"shards\" has its pictures and captions in the shards: leave folder and "
                             "caption_source = \"table\" out")
        if self.source == "shards" and self.resolutions is not None:
            raise ValueError("source = \"shards\" has one resolution: give resolution in place of resolutions")
        if self.source == "shards" and self.repeats != 1:
            raise ValueError("source = \"shards\" has each sample once in an epoch: leave repeats out, and give "
                             "train.epochs or train.steps")
        if self.source != "shards" and self.shards is not None:
            raise ValueError("shards are read with source = \"shards\"")
        if self.source != "world" and (self.pictures is not None or self.doodles):
            raise ValueError("pictures and doodles are of source = \"world\"")
        if self.source == "world" and self.pictures is None:
            object.__setattr__(self, "pictures", 20_000)
        return self

    @pydantic.model_validator(mode="after")
    def _one_or_several_resolutions(self) -> DataOptions:
        if self.resolutions is None:
            return self
        if len(set(self.resolutions)) < max(len(self.resolutions), 2):
            raise ValueError("resolutions are to be two or more, all different; a single one is resolution")
        if "resolution" in self.model_fields_set and self.resolution != max(self.resolutions):
            raise ValueError("give resolution or resolutions, not both")
        if self.source == "world":
            raise ValueError("the drawn world has one resolution: give it a set for each")
        object.__setattr__(self, "resolution", max(self.resolutions))
        return self

    @pydantic.model_validator(mode="after")
    def _sizes_agree(self) -> DataOptions:
        for one in self.by_resolution if self.buckets else ():
            if one.bucket_step > one.resolution:
                raise ValueError(f"bucket_step {one.bucket_step} is larger than resolution {one.resolution}")
            low, high = one.shortest, one.longest
            if not low <= one.resolution <= high:
                raise ValueError(f"resolution {one.resolution} is not between bucket_min {low} and "
                                 f"bucket_max {high}")
        return self

    @property
    def by_resolution(self) -> Sequence[DataOptions]:
        """The same options with one resolution each, from the smallest to the largest."""
        if self.resolutions is None:
            return (self,)
        return [self.model_copy(update={"resolution": side, "resolutions": None}) for side in sorted(self.resolutions)]

    @pydantic.model_validator(mode="after")
    def _variants_of_something(self) -> DataOptions:
        if self.variants != VARIANTS and not any(getattr(self, name) for name in CHANCES):
            raise ValueError(f"variants is of {', '.join(CHANCES)}, and none of them is asked for")
        return self

    @pydantic.model_validator(mode="after")
    def _masks_of_something(self) -> DataOptions:
        fields = DataOptions.model_fields
        if self.mask == "none":
            for name in ("masks", "mask_floor", "mask_normalised", "missing_masks"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name} is of masks: say where they are with mask = \"alpha\" or \"files\"")
        elif self.source == "shards":
            raise ValueError("source = \"shards\" has no masks, as the shards' indexes know of none: unpack them into "
                             "a folder, or leave mask out")
        elif self.source == "world":
            raise ValueError("the drawn world has no masks: leave mask out")
        if self.masks is not None and self.mask != "files":
            raise ValueError("masks is a folder of files: give mask = \"files\"")
        return self

    @pydantic.model_validator(mode="after")
    def _holes_of_something(self) -> DataOptions:
        fields = DataOptions.model_fields
        if self.inpaint == "mask":
            if self.mask == "none":
                raise ValueError("inpaint = \"mask\" is of masks: say where they are with mask = \"alpha\" or "
                                 "\"files\"")
            for name, why in (("inpaint_masks", "random holes"), ("mask_floor", "masks that weigh the loss"),
                              ("mask_normalised", "masks that weigh the loss")):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name} is of {why}, and inpaint = \"mask\" has none")
        return self

    @pydantic.model_validator(mode="after")
    def _pairs_of_something(self) -> DataOptions:
        if self.pairs == "none":
            for name in ("sources", "source_dropout", "both_dropout"):
                if getattr(self, name) != DataOptions.model_fields[name].default:
                    raise ValueError(f"{name} is of pairs of pictures: give pairs = \"files\"")
        elif self.source != "folder":
            raise ValueError(f"source = \"{self.source}\" has no pairs of pictures: they are files in a folder")
        if self.caption_dropout + self.source_dropout + self.both_dropout > 1:
            raise ValueError("caption_dropout, source_dropout and both_dropout are parts of all samples, and more than "
                             "all of them")
        return self

    @pydantic.model_validator(mode="after")
    def _one_frequency(self) -> DataOptions:
        if self.share is not None and self.repeats != 1:
            raise ValueError("give repeats or share, not both")
        return self

    def caption_weight(self, caption: str) -> float:
        """What a caption makes its picture's loss weigh."""
        return next((weight for pattern, weight in self.caption_loss_weights.items()
                     if re.search(pattern, caption, re.IGNORECASE)), 1.0)

    @property
    def sets(self) -> Sequence[DataOptions]:
        """The one set that it is: `DataSets` has several."""
        return (self,)

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
                                "class pictures; without it those of folder have a caption each, as [data] has them.")
    folder: str | None = Field(None, description="Class pictures that are there already, all of them "
                               "used; default: they are drawn with the base itself, once.")
    images: int = Field(200, ge=1, description="Class pictures to draw (200: Hugging Face's DreamBooth "
                        "guide; the paper: about 1000).")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="Loss weight of class pictures beside 1 for the "
                          "others (the paper's lambda; diffusers: 1).")
    steps: int = Field(30, ge=1, description="Sampler steps for drawing them.")
    guidance: float = Field(7.5, ge=0, description="Classifier-free guidance for drawing them (diffusers: "
                            "7.5).")
    scheduler: str = Field("dpm++2m", description="As in impasto generate --scheduler.")
    batch_size: int = Field(4, ge=1, description="Class pictures drawn at once (diffusers: 4); their last "
                            "bits depend on it.")

    @pydantic.model_validator(mode="after")
    def _drawn_from_words(self) -> PriorOptions:
        if self.folder is None and self.caption is None:
            raise ValueError("say what the class is called (prior.caption), or where its pictures are (prior.folder)")
        return self


class ValidationOptions(Section):
    """`[validation]`: pictures that are held out, and the loss on them."""

    folder: str | None = Field(None, description="Pictures of their own to validate with, captioned as those of [data] "
                               "are; none of [data] is then held out, but for copies of these.")
    fraction: float | None = Field(None, ge=0, lt=1, description="Share of the pictures that is held out, at least "
                                   "one; which ones follows from train.seed and their contents, and copies go with "
                                   "them. Default: 0.1 of 8 or more different pictures, but at most 16; none of fewer. "
                                   "0: no validation.")
    every: int | None = Field(None, ge=1, description="Steps between validations, beside the one before the first step "
                              "and the one after the last. Default: a twentieth of the run, but at least 25 steps, and "
                              "seldom enough to take a sixth of the time at most.")
    repeats: int = Field(4, ge=1, description="Noises and timesteps for each picture, the same at each validation: one "
                         "timestep of every so-manieth part of the process.")
    patience: int | None = Field(None, ge=1, description="The run ends after so many validations in a row without a "
                                 "new lowest loss. Default: it never does (diffusers and kohya have none).")
    keep_best: bool = Field(True, description="Whether the artifact of the lowest loss is kept, as NAME-best beside "
                            "the last one.")

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> ValidationOptions:
        if self.folder is not None and self.fraction:
            raise ValueError("give folder or fraction, not both")
        return self


def of_class_pictures(data: DataOptions, prior: PriorOptions) -> DataOptions:
    """`[data]` as it is for class pictures: their own caption, as they were drawn with it, and no template, which
    would put the words of what is learned into it."""
    change: dict[str, object] = {"caption": prior.caption, "caption_template": None, "mask": "none", "masks": None,
                                 "mask_floor": DataOptions.model_fields["mask_floor"].default,
                                 "mask_normalised": False, "missing_masks": "error", "inpaint": "random",
                                 "caption_loss_weights": {}}
    if prior.caption is not None:
        change |= {"shuffle_tags": False, "tag_dropout": 0.0, "wildcards": False, "keep_tags_separator": "",
                   "caption_weights": False, "max_tokens": None}
    return data.model_copy(update=change)
