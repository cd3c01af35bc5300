"""GGT-100K's size: 103,707 training and 500 test pairs in category folders. Slow: `pytest -m slow -s tests/e2e/test_data_scale.py`.

The files are small PNGs; what is measured depends on their number. Times and memory are of fresh processes, torch's import left
out of the times and counted in the memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from envs.balance import Classes, Epochs
from envs.index import open_index

pytestmark = pytest.mark.slow

TRAIN, TEST = 103_707, 500
CATEGORIES = ("general_mixed", "haze", "low_light", "old_photos", "rain", "snow")
FIRST_S, AGAIN_S, MEMORY_GIB = 60.0, 2.0, 1.0
WORKERS, PER_STEP, RESUMED_AT = 2, 8, 6_000

OPEN = """
import json, resource, sys, time
from pathlib import Path
from envs.manifest import ManifestConfig, ManifestEnv
from envs.index import open_index
start = time.perf_counter()
index = open_index(sys.argv[1], cache=Path(sys.argv[2]))
opened = time.perf_counter() - start
def access(numbers):
    start = time.perf_counter()
    for n in numbers: index[n]
    return (time.perf_counter() - start) / len(numbers)
size = len(index)
access(range(100))
spots = [access([(base + 7919 * k) % size for k in range(2000)]) for base in (0, size // 2, size - 1)]
start = time.perf_counter()
env = ManifestEnv(ManifestConfig(sys.argv[1], size=32, per_step=8, cache=sys.argv[2]))
env.draw(0, 8), env.draw(6000, 8)
print(json.dumps({"rows": size, "open_s": opened, "access_us": [1e6 * s for s in spots], "env_s": time.perf_counter() - start,
                  "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                  "types": index.types(), "bad": index.bad_count}))
"""


# argv: source, cache, seed of the draws, per_step, then first, last and stride of the steps that this process draws
ROWS = """
import sys
import numpy as np
from envs.manifest import ManifestConfig, ManifestEnv
source, cache, out = sys.argv[1:4]
per_step, first, last, stride = map(int, sys.argv[4:])
env = ManifestEnv(ManifestConfig(source, size=32, per_step=per_step, cache=cache, seed=1))
np.save(out, [env.order.row(step, position) for step in range(first, last, stride) for position in range(per_step)])
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGT-100K/{train,test}/CATEGORY/{LQ,GT}/000000.png, 208,414 files."""
    root, made = tmp_path_factory.mktemp("big") / "GGT-100K", tmp_path_factory.mktemp("made")
    views = []
    for seed in range(8):
        coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))
        gt = coarse.resize((40, 40), Image.Resampling.BICUBIC)
        gt.save(made / "gt.png")
        gt.point(lambda value: value // 2 + 20).save(made / "lq.png")
        views.append([(made / f"{role}.png").read_bytes() for role in ("lq", "gt")])
    for split, count in (("train", TRAIN), ("test", TEST)):
        for n in range(count):
            folder = root / split / CATEGORIES[n % len(CATEGORIES)]
            for role, data in zip(("LQ", "GT"), views[n % len(views)], strict=True):
                if n < len(CATEGORIES):
                    (folder / role).mkdir(parents=True)
                (folder / role / f"{n:06d}.png").write_bytes(data)
    return root


def opened(source: Path, cache: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(source), str(cache)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_the_index_at_full_size(big: Path, tmp_path: Path) -> None:
    first = opened(big, tmp_path)
    again = opened(big, tmp_path)
    small = opened(big / "test", tmp_path)
    print(json.dumps({"first": first, "again": again, "500 rows": small}, indent=1))
    assert first["rows"] == again["rows"] == TRAIN + TEST
    assert first["bad"] == 0 and set(first["types"]) == {"haze", "lowlight", "mix", "oldphoto", "rain", "snow"}
    assert first["open_s"] < FIRST_S
    assert again["open_s"] < AGAIN_S
    assert max(first["peak_gib"], again["peak_gib"]) < MEMORY_GIB
    assert max(again["access_us"]) < 3 * min(again["access_us"])  # wherever the row is
    assert np.median(again["access_us"]) < 3 * np.median(small["access_us"])  # however many there are


def test_processes_share_nothing_and_miss_nothing(big: Path, tmp_path: Path) -> None:
    """Two workers, and a process that resumes in the middle, each of which opens the data set itself."""
    steps = -(-TRAIN // PER_STEP)

    def drawn(name: str, first: int, last: int, stride: int) -> np.ndarray:
        arguments = [big, tmp_path, tmp_path / f"{name}.npy", PER_STEP, first, last, stride]
        subprocess.run([sys.executable, "-c", ROWS, *map(str, arguments)], check=True)
        return np.load(tmp_path / f"{name}.npy")

    workers = [drawn(f"worker{n}", n, steps, WORKERS) for n in range(WORKERS)]
    straight = np.concatenate(workers)
    index = open_index(big, cache=tmp_path)
    train = {n for n, split in enumerate(index.column("split")) if split == "train"}
    assert len(train) == TRAIN and set(straight.tolist()) == train, "missed"
    assert len(straight) - TRAIN == steps * PER_STEP - TRAIN == len(straight) - len(set(straight.tolist())), "shared"
    before, after = drawn("before", 0, RESUMED_AT, 1), drawn("after", RESUMED_AT, steps, 1)
    assert sorted(np.concatenate([before, after])[:TRAIN].tolist()) == sorted(train), (
        "repeated or skipped by the resume"
    )


def test_workers_share_nothing_and_a_resume_repeats_and_skips_nothing() -> None:
    labels = [CATEGORIES[n % len(CATEGORIES)] for n in range(TRAIN)]
    order = Epochs(Classes(labels, range(TRAIN), {}), seed=1, per_step=PER_STEP)
    steps = -(-TRAIN // PER_STEP)
    workers = [
        [order.row(step, position) for step in range(worker, steps, WORKERS) for position in range(PER_STEP)]
        for worker in range(WORKERS)
    ]
    late = {
        order.row(steps - 1, position) for position in range(TRAIN % PER_STEP, PER_STEP)
    }  # of the second epoch already
    counts = np.bincount(np.concatenate(workers), minlength=TRAIN)
    assert counts.min() == 1 and counts.sum() == steps * PER_STEP
    assert {int(row) for row in np.flatnonzero(counts == 2)} == late
    before = [order.row(step, position) for step in range(RESUMED_AT) for position in range(PER_STEP)]
    anew = Epochs(
        Classes(labels, range(TRAIN), {}), seed=1, per_step=PER_STEP
    )  # another process, which knows the step alone
    after = [anew.row(step, position) for step in range(RESUMED_AT, steps) for position in range(PER_STEP)]
    assert sorted((before + after)[:TRAIN]) == list(range(TRAIN))
