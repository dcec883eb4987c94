#!/usr/bin/env python3
"""Train the reference implementation from scratch: the curve that ours is compared with.

    peer_train.py DATA.yaml --model yolov8n.yaml --imgsz 320 --batch 16 --epochs 100 --seed 0 --project OUT

Everything else is the reference's default recipe. Needs: torch, torchvision, ultralytics (PyPI).
The result is in OUT/e<epochs>_s<seed>/results.csv.
"""
import argparse

import torch
from ultralytics import YOLO

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model", default="yolov8n.yaml")
parser.add_argument("--imgsz", type=int, default=320)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--project", default="runs/peer")
args = parser.parse_args()
torch.set_num_threads(args.threads)
YOLO(args.model).train(
    data=args.data, epochs=args.epochs, imgsz=args.imgsz, batch=args.batch, seed=args.seed, device="cpu",
    pretrained=False, amp=False, workers=0, plots=False, verbose=False, exist_ok=True,
    project=args.project, name=f"e{args.epochs}_s{args.seed}",
)
