"""Images that are bombs, or broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
BOMBS = """
import io, random, resource, sys
import numpy as np
from PIL import Image
from qsr_engine.data import decoding
from qsr_engine.data.images import check_image
from qsr_engine.data.errors import DataError
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import EvalView, TrainView

def encode(format, **options):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, format=format, **options)
    return stream.getvalue()

files = [encode("PNG"), encode("JPEG", quality=60), encode("JPEG", progressive=True), encode("JPEG", subsampling=0)]
decoders = [decoding.Decoder(16, TrainView(16, "crop_flip")), decoding.Decoder(16, EvalView(16))]
out = np.empty((16, 16, 3), np.uint8)

def outcome(data, number=0):
    sample = Sample("s.tar", "k7", bytes(data), 0)
    for error in decoders[number % 2].decode([sample], random.Random(number), out[None]).values():
        assert str(error).startswith("s.tar: sample 'k7' "), error
        return str(error)
    return ""

for file in files:
    assert outcome(file) == ""  # all libraries are loaded
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

for regions in {False, decoding.REGIONS}:  # with and without the extension
    decoding.REGIONS = regions
    for width, height in [(60000, 60000), (65500, 65500), (60000, 1700), (10001, 10000)]:
        for file in files:
            data = bytearray(file)
            if data[:4] == b"\\x89PNG":
                import zlib
                data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
                data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
            else:
                frame = max(data.find(b"\\xff\\xc0"), data.find(b"\\xff\\xc2")) + 5
                data[frame : frame + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
            text = outcome(data)
            assert "limit" in text, (width, height, text)
            try:
                check_image(bytes(data), "x")
            except DataError as error:
                assert "limit" in str(error), error
            else:
                raise AssertionError("it was decoded")

rng = np.random.default_rng(0)
good = bad = 0
for file in files:
    cuts = [file[:at] for at in range(0, len(file), max(1, len(file) // 150))]
    for number in range(400):
        data = bytearray(file)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            data[at] = int(rng.integers(256))
        cuts.append(data)
    for number, data in enumerate(cuts):
        if outcome(data, number):
            bad += 1
        else:
            good += 1
print(good, bad)
"""


def test_image_bombs_and_broken_images_are_errors_and_never_a_crash(tmp_path: Path) -> None:
    """In a process of its own that may take 256 MiB more: 60,000 x 60,000 pixels would be 10.8 GB."""
    script = tmp_path / "bombs.py"
    script.write_text(BOMBS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    good, bad = map(int, done.stdout.split())
    assert good > 100
    assert bad > 600
