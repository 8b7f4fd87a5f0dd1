#!/usr/bin/env bash
# The study's claims at small scale: the grid of grids/tddpo on the embedded model and real pairs, to the report.
#
#   bash bench/small_study.sh DATASET MT_BENCH_DIR OUT
#
# DATASET       pairs in conversations (bench/README.md: 2,212 pairs ranked by GPT-4), a parquet file
# MT_BENCH_DIR  folder with MT-Bench's three official files
# OUT           folder to write; rerun to continue
# On two cores: pairs of at most 700 characters, 144 of them, nine steps, two seeds; bench/small_study.grid. SEEDS, BETAS,
# ... in the environment make it smaller or larger. The judge is the model itself: its scores measure nothing, and are
# marked so; accuracy is what is measured here (claims.json of this folder).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dataset=$1 questions=$2 out=$3
mkdir -p "$out/results"
export HF_HUB_OFFLINE=1 MODEL=$out/model DATA=$out/data/short MT_BENCH=$out/data/mt_bench RESULTS=$out/results
export JUDGE=${JUDGE:-hf:$out/model}

python "$here/../examples/embedded_model.py" "$MODEL"
python - "$dataset" "$out/data/short.parquet" <<'PY'
import sys
from pathlib import Path
from datasets import load_dataset
rows = load_dataset("parquet", data_files=sys.argv[1], split="train")
short = rows.filter(lambda row: sum(len(m["content"]) for m in [*row["chosen"], row["rejected"][-1]]) <= 700)
Path(sys.argv[2]).parent.mkdir(parents=True, exist_ok=True)
short.to_parquet(sys.argv[2])
print(f"{len(short)} of {len(rows)} pairs have at most 700 characters")
PY
python "$here/../prep_data.py" --dataset "$out/data/short.parquet" --val_fraction 0.4 --limit 144 --out "$DATA"
python "$here/../prep_data.py" --mt_bench "$questions" --out "$MT_BENCH"
cp "$here/small_study_claims.json" "$RESULTS/claims.json"
bash "$here/../sweep.sh" "$here/small_study.grid" --yes
