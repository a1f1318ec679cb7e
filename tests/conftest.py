"""Fixtures shared by the tests: invented studies and a tiny policy."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from unirg.policy import Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig
from unirg.study import Study, StudyImage
from unirg.tiny import TinyConfig

collect_ignore = ["plugin_package"]  # a package of its own: endtoend/test_plugin_package.py installs and tests it
# In the background of a script Ctrl-C is ignored, by the tests too and by all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # spinning threads on shared cores make tests many times slower

REPORTS = (
    "There is a small left pleural effusion. The heart is enlarged.",
    "The lungs are clear. No pneumothorax.",
    "Right lower lobe opacity, which may be pneumonia. Heart size is normal.",
    "Pacemaker in place.",
)


def invented_studies() -> list[Study]:
    """Four studies with one invented film each, of different report lengths; the last has two films."""
    rng = np.random.default_rng(0)
    studies = []
    for i, text in enumerate(REPORTS):
        films = [StudyImage(rng.integers(0, 255, (64, 64), dtype=np.uint8)) for _ in range(2 if i == 3 else 1)]
        studies.append(Study(f"s{i}", tuple(films), indication="cough" if i % 2 else None, findings=text))
    return studies


TINY = TinyConfig(
    vocabulary=400, hidden=64, heads=2, layers=2, mlp=96, vision_hidden=32, vision_layers=2, image_size=64
)


@pytest.fixture(scope="session")
def studies() -> list[Study]:
    return invented_studies()


@pytest.fixture
def tiny_policy() -> Policy:
    """A tiny random Qwen3-VL in float32, fresh for every test."""
    return load_policy(PolicyConfig(tiny=TINY), PromptConfig(style="short"), texts=REPORTS * 20, seed=0)
