"""The pictures in README.md and docs/, drawn from the committed records into docs/images.

python benchmarks/pictures.py             # draws them
python benchmarks/pictures.py --check     # exit 1 if one is not that of its record

A picture carries a hash of the numbers in it, so that the check needs no drawing: another matplotlib draws other
pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dqkernels.bench import picture_draw, plot, record

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "docs" / "images"
#: Records, and which of their pictures pages show.
SHOWN = {
    "generate-zen4": ("latency", "memory"),
    "generate-batches-zen4": ("speed",),
    "gemm-h200": ("latency", "floor"),
    "dq_docstrings": ("score",),
    "demo": ("score",),
}


def wanted() -> list[tuple[Path, plot.Loaded, plot.Picture, str]]:
    """Every file that has to be there, with what it is drawn of."""
    found = []
    for name, names in SHOWN.items():
        loaded = plot.load(HERE / "results" / f"{name}.json")
        for picture in plot.need_pictures(loaded):
            if picture.name in names:
                for style in plot.STYLES:
                    found.append((FOLDER / plot.file_name(loaded, picture, style), loaded, picture, style))
    return found


def stale() -> list[str]:
    """Names of files that are missing, or not what their record says."""
    return [
        path.name
        for path, _, picture, style in wanted()
        if not path.is_file() or plot.stamp(path) != picture_draw.stamp_of(picture, style)
    ]


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        for name in stale():
            print(f"{name} is not that of its record: run python benchmarks/pictures.py")
        return 1 if stale() else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, loaded, picture, style in wanted():
        record.replace(path, picture_draw.draw(picture, style, footer=loaded.footer))
        print(path.relative_to(HERE.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
