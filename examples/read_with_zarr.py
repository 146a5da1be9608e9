"""Read a cache without ddk: zarr-python and xarray are enough. The bytes: docs/format.md.

python examples/read_with_zarr.py mix.zarr
"""

import json
import sys
from pathlib import Path

import numpy as np
import xarray
import zarr

from ddk_cache.testing import tiny_cache

path = Path(sys.argv[1])
if not path.exists():
    tiny_cache(path).close()  # yours comes from `ddk-cache build`

# Arrays are padded to whole shards; an attribute lists the valid rows.
folder = path / "domains" / "letters" / "train"
split = zarr.open_group(folder, mode="r")
(start, count), *_ = split.attrs["valid_rows"]
rows = slice(start, start + count)

# Log-probabilities are integers of a fixed step.
data = xarray.open_zarr(folder, consolidated=False)
labels = data["label_logprob"].isel(row=rows)
loss = -(labels * labels.attrs["scale"]).where(labels != labels.attrs["minus_infinity"])
print(f"teacher: {float(loss.mean()):.3f} nats per token over {count} rows")
print(loss.mean("position").to_series().describe().round(3).to_string())

# Ids are numbered by frequency; a position stores their differences, one plane per byte. The
# entries of a row follow one another, and docs/format.md decodes all of them.
spec = json.loads((path / "zarr.json").read_text())["attributes"]["ddk"]["spec"]
frequent = json.loads((path / "plans/letters.json").read_text())["frequent_ids"]
order = np.array(frequent + sorted(set(range(spec["vocab_size"])) - set(frequent)))
_, count = split["position_fields"][start, :2, 0]  # label_kept, exact_count
planes = split["target_ids"][start][:, :count]
ids = order[sum(planes[b].astype(int) << 8 * b for b in range(len(planes))).cumsum(-1)]
probs = (split["target_probs"][start][:count] / spec["prob_levels"]) ** 4
kept = dict(zip(ids.tolist(), probs.round(3).tolist(), strict=True))
print(f"after token {split['tokens'][start, 0]} the teacher expects {kept}")
print("(0 stands for what the other entries and the tail leave of one)")
