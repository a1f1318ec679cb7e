"""Data: one adapter a file, each giving the studies of a split."""

from unirg.data.phantom import PhantomData, load_phantom
from unirg.study import Study

DataConfig = PhantomData


def load_studies(config: DataConfig, split: str) -> list[Study]:
    """The studies of a split ("train", "dev", "test"; phantom data also "unseen"), in a fixed order."""
    return load_phantom(config, split)
