"""What stands for the package wandb: as much of it as is used, with the signatures of 0.31, and what it was told."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage

#: of the library's many settings, those that are given
SETTINGS = {"silent", "console", "save_code", "disable_git", "init_timeout", "finish_timeout"}


class Image:
    """A picture that is read when it is made."""

    def __init__(self, data_or_path: Any, mode: str | None = None, caption: str | None = None,
                 grouping: int | None = None, classes: Any = None, boxes: Any = None, masks: Any = None,
                 file_type: str | None = None) -> None:
        with PillowImage.open(data_or_path) as image:
            image.load()
        self.told = Path(data_or_path).name, caption


class Run:
    """A run; its first step is `step`."""

    def __init__(self, mode: str, step: int) -> None:
        self.offline, self.step = mode != "online", step
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.dir = "here"
        self.warnings: list[str] = []

    @property
    def url(self) -> str | None:
        if self.offline:
            self.warnings.append("URL not available in offline run")
        return None if self.offline else "https://wandb.test/run"

    def define_metric(self, name: str, step_metric: str | None = None, step_sync: bool | None = None,
                      hidden: bool | None = None, summary: str | None = None, overwrite: bool | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert self.exit_code is None and step is not None
        if step < self.step:
            self.warnings.append(f"step {step} is less than the current step {self.step}")  # and is dropped
            return
        self.step = step
        self.logged.append((data, step))

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code

    def of(self, key: str) -> list[tuple[int, Any]]:
        """What was logged under this name, with its "step"."""
        return [(data["step"], data[key]) for data, _ in self.logged if key in data]


class StandIn(types.ModuleType):
    """The module; `next_step` is where the server has a run that is taken up again."""

    Image, Run = Image, Run

    def __init__(self, mode: str = "online", key: bool = True) -> None:
        super().__init__("wandb")
        self.mode, self.key, self.next_step = mode, key, 0
        self.inits: list[dict[str, Any]] = []
        self.runs: list[Run] = []

    def setup(self, settings: Any = None) -> Any:
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def login(self, key: str | None = None, relogin: bool | None = None, host: str | None = None,
              force: bool | None = None, timeout: int | None = None, verify: bool = True, referrer: str | None = None,
              prompt: bool = True, anonymous: Any = None) -> bool:
        assert not prompt, "it would ask in the middle of a training"
        return self.key

    def init(self, entity: Any = None, project: Any = None, dir: Any = None, id: Any = None, name: Any = None,
             notes: Any = None, tags: Any = None, config: Any = None, config_exclude_keys: Any = None,
             config_include_keys: Any = None, allow_val_change: Any = None, group: Any = None, job_type: Any = None,
             mode: Any = None, force: Any = None, reinit: Any = None, resume: Any = None, resume_from: Any = None,
             fork_from: Any = None, save_code: Any = None, tensorboard: Any = None, sync_tensorboard: Any = None,
             monitor_gym: Any = None, settings: Any = None, anonymous: Any = None) -> Run:
        assert Path(dir).is_dir() and settings.keys() <= SETTINGS
        assert not (self.mode != "online" and resume), "which the library warns of"
        self.inits.append({"project": project, "name": name, "id": id, "resume": resume, "config": config})
        self.runs.append(Run(self.mode, self.next_step))
        return self.runs[-1]
