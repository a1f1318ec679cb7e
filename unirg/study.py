"""Study: the one record that flows from the data adapters to the prompt, the rewards and the evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class StudyImage:
    """One image of a study.

    `source` is a file, an array of uint8 grey (H, W) or RGB (H, W, 3) levels, or a function that draws such an array
    (drawn films are made when first needed). `view` is the projection where known: "frontal", "lateral", ...
    """

    source: Path | np.ndarray | Callable[[], np.ndarray]
    view: str | None = None

    @cached_property
    def _pixels(self) -> np.ndarray:
        return self.source() if callable(self.source) else np.asarray(self.source)

    def load(self) -> Image.Image:
        """The image as RGB; levels of more than 8 bits are spread over 0 to 255, from the image's darkest to its
        brightest. Raises OSError (file missing, or not an image) with the path in the message."""
        if not isinstance(self.source, Path):
            return Image.fromarray(self._pixels).convert("RGB")
        try:
            with Image.open(self.source) as image:
                if image.mode.startswith(("I", "F")):  # PIL's own conversion cuts 16 bits off at 255: a white film
                    levels_HW = np.asarray(image, dtype=np.float64)
                    spread = np.ptp(levels_HW) or 1.0
                    levels_HW = (levels_HW - levels_HW.min()) * (255.0 / spread)
                    return Image.fromarray(levels_HW.round().astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
        except FileNotFoundError:
            raise
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error on corrupt files
            raise OSError(f"{self.source}: cannot be read as an image ({error})") from error


@dataclass(frozen=True)
class Study:
    """One imaging study with what is known about it. Every field but `id` is optional.

    `labels` maps a finding's name (the extractor's vocabulary, `unirg.extraction`) to 1 present, 0 absent, -1
    uncertain; a key "effusion/left" says it of one side. A missing key means that nothing is known, never that it is
    absent. `extra` holds an adapter's further columns; rewards receive them by name (e.g. `complete`, a complete
    reference).
    """

    id: str
    images: tuple[StudyImage, ...] = ()
    indication: str | None = None
    comparison: str | None = None
    technique: str | None = None
    findings: str | None = None
    impression: str | None = None
    prior: "Study | None" = None
    patient: str | None = None
    institution: str | None = None
    demographics: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, int] = field(default_factory=dict)
    modality: str | None = None
    language: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
