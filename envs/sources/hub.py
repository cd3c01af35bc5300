"""Data sets of the Hugging Face hub by id (`hf:owner/name`): fetched once by `datasets`, kept as a folder that it saved.

No code of the data set is run: `datasets` reads Parquet, images and text by itself, and refuses scripts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

PREFIX = "hf:"


def fetched(source: str, cache: Path) -> Path:
    """The folder of `hf:owner/name` (or `hf:FOLDER`, with what `datasets` can load) below `cache`; fetched if it is not there.

    Images stay as their bytes. It is not fetched again: delete the folder to follow changes on the hub. ValueError, with the
    remedy, if it cannot be had.
    """
    name = source.removeprefix(PREFIX)
    folder = cache / f"hub-{hashlib.sha256(name.encode()).hexdigest()[:24]}"
    if folder.is_dir():
        return folder
    from datasets import Dataset, DatasetDict, Image, load_dataset

    try:
        data = load_dataset(name)
    except (
        Exception
    ) as error:  # of many kinds: no network, no such id, no licence accepted, a layout that it cannot guess
        raise ValueError(
            f"{source} cannot be loaded ({type(error).__name__}: {str(error)[:200]}): check id and network (`hf auth login` for "
            "gated sets), or download it and give its folder"
        ) from error
    splits = data if isinstance(data, DatasetDict) else DatasetDict({"train": data})

    def with_bytes(split: Dataset) -> Dataset:
        for column, feature in split.features.items():
            if isinstance(feature, Image):
                split = split.cast_column(column, Image(decode=False))
        return split

    temporary = cache / f".tmp-{os.getpid()}-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    DatasetDict({name: with_bytes(split) for name, split in splits.items()}).save_to_disk(str(temporary))
    os.replace(temporary, folder)
    return folder
