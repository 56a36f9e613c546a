"""One image where it lies: in a file, or in a part of one."""

from __future__ import annotations

from typing import NamedTuple

from qsr_engine.data.errors import DataError


class StoredImage(NamedTuple):
    """Where the bytes of one image lie: in a file, or in a part of one. ImageNet has 1.3 million of these."""

    file: str
    label: int
    size: int  # bytes
    offset: int = 0
    member: str = ""  # its name where the file is an archive

    @property
    def where(self) -> str:
        """The image's name for messages."""
        return f"{self.file}: {self.member}" if self.member else self.file

    def read(self) -> bytes:
        """The bytes of the image. Raises DataError where they cannot be read, or are not as many as before."""
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
                grown = not self.member and stream.read(1)
        except OSError as error:
            raise DataError(f"{self.where}: this image cannot be read: {error.strerror or error}") from error
        if grown or len(data) < self.size:
            raise DataError(f"{self.where}: this image does not have its {self.size} bytes any more; do not change it")
        return data


class ListedImage(NamedTuple):
    """An image, and what else tells it from another image of the same size: its name and time of change."""

    image: StoredImage
    identity: str
