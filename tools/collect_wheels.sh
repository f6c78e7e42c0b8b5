#!/usr/bin/env bash
# Collect what the models need beyond torch and numpy, for a machine that has these but no network.
#   tools/collect_wheels.sh FOLDER [PYTHON_VERSION] [more packages, such as mmdet pycocotools]
# There, with the Python of that version:
#   python -m pip install --no-index --no-deps --target packages FOLDER/*.whl
#   PYTHONPATH=packages:.:ops python tools/benchmark.py
# For segmentation and tools/benchmark.py; mmcv without its compiled ops, OpenCV without windows.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $# -ge 1 && $1 != -* ]] || { sed -n '2,7s/^# \?//p' "$0" >&2 && exit 2; }
folder=$1 version=${2:-3.12}
[[ $version =~ ^3\.[0-9]+$ ]] || { echo "PYTHON_VERSION must be such as 3.12, got $version" >&2 && exit 2; }

names=(mmengine mmcv-lite mmsegmentation opencv-python-headless
  addict ftfy platformdirs prettytable pyyaml regex termcolor wcwidth yapf scipy # imported
  rich markdown-it-py mdurl pygments # for what they print
  matplotlib contourpy cycler fonttools kiwisolver packaging pillow pyparsing python-dateutil six)
requirements=()
for name in "${names[@]}" "${@:3}"; do
  pin=$(sed -n "s/^${name/%-headless/}==\([^;]*\)$/\1/p" constraints.txt)
  requirements+=("$name${pin:+==$pin}")
done
"${PYTHON:-.venv/bin/python}" -m pip download --no-deps --only-binary=:all: \
  --python-version "$version" --dest "$folder" "${requirements[@]}"
du -sh "$folder"
