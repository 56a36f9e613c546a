"""Writes the seeds of the corpus: `python -m tests.fuzz.make_seeds`. They are committed, so that all fuzz the same."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from qsr_engine.data.checking import measure_shard
from qsr_engine.data.index import Index, Split
from tests.support.shard_files import picture, tar_bytes, with_field

CORPUS = Path(__file__).parent / "corpus"


def sample(key: str, kind: str, label: int = 0) -> dict[str, bytes]:
    """The members of one sample with an image of 8 x 8 pixels."""
    suffix = "jpg" if kind == "JPEG" else "png"
    return {f"{key}.cls": str(label).encode(), f"{key}.{suffix}": picture(8, 8, kind=kind, seed=label)}


def of_infos(members: Iterable[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar file of members that need not be plain files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def named(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", pax: dict[str, str] | None = None
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax or {}
    return info


def shards() -> dict[str, bytes]:
    """The seeds of shards, by name."""
    good = sample("a", "JPEG", 1) | sample("b", "PNG", 2) | sample("c", "JPEG", 3)
    plain = [(named(name), data) for name, data in good.items()]
    links = [
        (named("l.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (named("h.jpg", tarfile.LNKTYPE, "a.jpg"), b""),
        (named("dev.jpg", tarfile.CHRTYPE), b""),
        (named("pipe.jpg", tarfile.FIFOTYPE), b""),
        (named("folder.d", tarfile.DIRTYPE), b""),
        (named("/absolute.cls"), b"1"),
        (named("../outside.cls"), b"1"),
        (named("__remark__.cls"), b"1"),
    ]
    whole = tar_bytes(good)
    pax = of_infos(
        [
            (named("k" * 120 + ".cls", pax={"comment": "of this member"}), b"1"),
            (named("k" * 120 + ".jpg"), good["a.jpg"]),
        ],
        tarfile.PAX_FORMAT,
    )
    return {
        "good.tar": whole,
        "truncated.tar": whole[:4200],
        "links.tar": of_infos(plain[:2] + links + plain[2:]),
        "pax.tar": pax,
        "pax_sparse.tar": of_infos(
            [(named("s.jpg", pax={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**10)}), b"x"), *plain],
            tarfile.PAX_FORMAT,
        ),
        "long_names.tar": of_infos([(named("d/" * 90 + "n.cls"), b"1"), *plain]),
        "twice.tar": of_infos([*plain[:4], (named("a.cls"), b"1")]),
        "huge.tar": with_field(whole, 0, 124, b"%011o\0" % (5 * 10**9)),
        "huge_binary.tar": with_field(whole, 0, 124, b"\x80" + (10**18).to_bytes(11, "big")),
        "negative.tar": with_field(whole, 0, 124, b"\xff" * 11 + b"\0"),
        "sparse.tar": with_field(whole, 0, 156, b"S"),
        "huge_pax.tar": with_field(pax, 0, 124, b"%011o\0" % 8**9),
        "compressed.tar": gzip.compress(whole, mtime=0),
        "empty.tar": bytes(1024),
    }


def main() -> None:
    for folder in ("shards", "index"):
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
    for name, data in shards().items():
        (CORPUS / "shards" / name).write_bytes(data)
    split = Split(samples=3, shards=[measure_shard(CORPUS / "shards" / "good.tar", 3)])
    index = Index(classes=["x", "y", "z", "\u00e9"], splits={"train": split, "val": Split(samples=0, shards=[])})
    (CORPUS / "index" / "good.json").write_text(index.model_dump_json(indent=1))
    (CORPUS / "index" / "names.json").write_text(index.model_dump_json().replace("good.tar", "../good.tar"))
    (CORPUS / "index" / "deep.json").write_text("[" * 5000)


if __name__ == "__main__":
    main()
