"""Times the reference's training loader as a black box: decode + augment in one process on one thread.

    python benches/peer_loader.py --data datasets/bccd --imgsz 640

Needs the package `ultralytics`. Prints one line of JSON: `img_s` by the clock on the wall, `img_s_per_core` by processor
time (medians over the passes; the first pass is not timed). The counterpart is `boxwright bench loader --decode-always`
(the reference decodes the image of each sample anew too and takes mosaic partners from a buffer).
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="dataset folder with one YAML file")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cache", default=None, help="ram: keep decoded images")
    args = parser.parse_args()

    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_dataloader, build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    # A copy, because the reference writes its caches beside the labels.
    folder = tempfile.mkdtemp()
    try:
        root = shutil.copytree(args.data, os.path.join(folder, "data"))
        name = next(f for f in os.listdir(root) if f.endswith(".yaml"))
        path = os.path.join(root, name)
        with open(path) as file:
            lines = file.read().splitlines()
        with open(path, "w") as file:
            file.write("\n".join(f"path: {root}" if line.startswith("path:") else line for line in lines))
        data = check_det_dataset(path)
        overrides = dict(imgsz=args.imgsz, task="detect", mode="train", cache=args.cache)
        dataset = build_yolo_dataset(get_cfg(overrides=overrides), data["train"], args.batch, data, mode="train", stride=32)
        loader = build_dataloader(dataset, args.batch, 0, shuffle=True, rank=-1)
        wall, processor = [], []
        for epoch in range(args.epochs + 1):
            began, used = time.perf_counter(), time.process_time()
            images = sum(batch["img"].shape[0] for batch in loader)
            if epoch > 0:
                wall.append(images / (time.perf_counter() - began))
                processor.append(images / (time.process_time() - used))
    finally:
        shutil.rmtree(folder)

    def median(values):
        return round(sorted(values)[len(values) // 2], 1)

    print(
        json.dumps(
            {
                "loader": "ultralytics",
                "imgsz": args.imgsz,
                "batch": args.batch,
                "workers": 0,
                "epochs": args.epochs,
                "cache": args.cache,
                "img_s": median(wall),
                "img_s_per_core": median(processor),
                "img_s_each": [round(v, 1) for v in wall],
            }
        )
    )


if __name__ == "__main__":
    main()
