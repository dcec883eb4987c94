"""Times the reference's training loader (black box): decode + augment, one process, one thread."""
import argparse, json, os, time, tempfile, shutil
os.environ.setdefault("OMP_NUM_THREADS","1")
ap=argparse.ArgumentParser(); ap.add_argument("--data",required=True); ap.add_argument("--imgsz",type=int,default=320); ap.add_argument("--batch",type=int,default=16); ap.add_argument("--epochs",type=int,default=3); ap.add_argument("--cache",default=None)
a=ap.parse_args()
import cv2, torch
cv2.setNumThreads(1); torch.set_num_threads(1)
import logging; logging.disable(logging.INFO)
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset, build_dataloader
from ultralytics.data.utils import check_det_dataset
tmp=tempfile.mkdtemp(); shutil.copytree(a.data,tmp+"/d",dirs_exist_ok=True)
y=[f for f in os.listdir(tmp+"/d") if f.endswith(".yaml")][0]
t=open(tmp+"/d/"+y).read().splitlines()
open(tmp+"/d/"+y,"w").write("\n".join(["path: "+tmp+"/d" if l.startswith("path:") else l for l in t]))
data=check_det_dataset(tmp+"/d/"+y)
cfg=get_cfg(overrides=dict(imgsz=a.imgsz,task="detect",mode="train",cache=a.cache))
ds=build_yolo_dataset(cfg,data["train"],a.batch,data,mode="train",stride=32)
dl=build_dataloader(ds,a.batch,0,shuffle=True,rank=-1)
r=[];c=[]
for e in range(a.epochs+1):
    t=time.perf_counter(); u=time.process_time(); n=0
    for b in dl: n+=b["img"].shape[0]
    if e>0: r.append(n/(time.perf_counter()-t)); c.append(n/(time.process_time()-u))
med=lambda v: round(sorted(v)[len(v)//2],1)
print(json.dumps({"loader":"ultralytics","imgsz":a.imgsz,"batch":a.batch,"cache":a.cache,"img_s":med(r),"img_s_per_core":med(c),"img_s_each":[round(x,1) for x in r]}))
shutil.rmtree(tmp)
