"""Where records come from: easy-VQA, or the user's file with its image folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pmod_model.data.broken import BrokenRecords
from pmod_model.data.easyvqa import easy_vqa_records
from pmod_model.data.errors import InputError
from pmod_model.data.reading import check_images, load_records
from pmod_model.data.records import Record

EASY_VQA = "easy-vqa"


@dataclass(frozen=True)
class Source:
    """A data set: `easy-vqa`, or a json, jsonl or parquet file and the folder of its images."""

    data: str = EASY_VQA
    image_folder: str | None = None

    def load(self, split: Literal["train", "test"], broken: BrokenRecords | None = None) -> Data:
        """Read and check the records; `split` chooses one of easy-VQA's.

        Args:
            split: of easy-VQA.
            broken: what to do about broken records; None raises. Under the policy "skip" images are
                left to `check_records`.

        Raises:
            InputError: a record or an image is not usable, or too many are.
        """
        if self.data == EASY_VQA:
            if self.image_folder is not None:
                expected = "none with --data easy-vqa"
                raise InputError("data", "--image-folder", expected, self.image_folder)
            records, folder = easy_vqa_records(split)
            return Data(f"easy-VQA {split}", records, folder)
        path = Path(self.data)
        folder = None if self.image_folder is None else Path(self.image_folder)
        if folder is not None and not folder.is_dir():
            raise InputError("data", f"--image-folder {str(folder)!r}", "a folder", "none")
        records = load_records(path, broken)
        if broken is None or broken.policy == "error":
            check_images(records, folder, path.name)
        return Data(path.name, records, folder)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, paths absolute."""
        if self.data == EASY_VQA:
            return {"data": self.data, "image_folder": None}
        folder = None if self.image_folder is None else str(Path(self.image_folder).absolute())
        return {"data": str(Path(self.data).absolute()), "image_folder": folder}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Source:
        """The inverse of `to_dict`."""
        return cls(str(values["data"]), values.get("image_folder"))


@dataclass(frozen=True)
class Data:
    """Checked records, the folder of their images, and the name of the set."""

    name: str
    records: Sequence[Record]
    folder: Path | None
