from __future__ import annotations

import shutil
from pathlib import Path

from deat_rb.runs.options import make_options
from deat_rb.runs.plan import plan


def test_plan_lines_say_which_files_of_a_folder_were_left_out(image_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "train" / "red" / "0000.png").rename(folder / "train" / "red" / "0000.heic")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / ".ipynb_checkpoints" / "0001-checkpoint.png").touch()
    lines = plan(make_options({
        "method": "pgd-1", "arch": "wrn-10-1", "dataset": "folder", "data_dir": str(folder), "val_size": 8,
        "batch_size": 8, "device": "cpu",
    })).lines()  # fmt: skip
    assert ("files", "2 files left out: hidden (1), .heic (1)") in lines
