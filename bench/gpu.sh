#!/usr/bin/env bash
# Every figure that needs a GPU: smoke, a whole training, tests, benchmarks, gradient checks, in the order of their worth.
#
# Call, from the root of a checkout, on a machine with Python 3.12, torch 2.11, triton 3.6 and one GPU; no network needed:
#     bash bench/gpu.sh                      # 420 s; results into bench/results/gpu, or where $OUT says; two files
#     RIS_FAST_GPU_SH_SECONDS=380 bash bench/gpu.sh                   # a second call does first what the first did not get through
#     RIS_FAST_GPU_SH_STAGES="smoke train_full" bash bench/gpu.sh     # these stages alone; names in bench/gpu/stages.py
#     RIS_FAST_GPU_SH_SMOKE=1 bash bench/gpu.sh                       # control flow with tiny sizes, on any machine
# Outside of a repository say which commit this is: RIS_FAST_COMMIT=...
# Afterwards `python -m bench.gpu.report` writes README's table and bench/results/gpu/README.md, and says what is missing.
#
# Wheels to put into .whl (or $RIS_FAST_WHEELS) where the machine lacks the package; all pure Python but the last line:
#     cyclopts attrs docstring-parser rich rich-rst markdown-it-py mdurl pygments
#     pytest pytest-xdist execnet iniconfig packaging pluggy pytest-benchmark py-cpuinfo nvidia-ml-py
#     safetensors, and for the tests of random numbers scipy
# matplotlib is not needed: the run draws nothing. The C++ kernels are not built: nothing here runs on a CPU.
set -u
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
RIS_FAST_COMMIT=$(git describe --always --dirty=+ --abbrev=7 --exclude '*' 2>/dev/null || echo "${RIS_FAST_COMMIT:-unknown}")
# The checkout's ris_fast lacks ris_fast.kernels: what is installed comes first.
export RIS_FAST_COMMIT PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}

install() {
    local wheels=("${RIS_FAST_WHEELS:-.whl}"/*.whl)
    if [[ -e ${wheels[0]} ]]; then
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${wheels[@]}" ||
            for wheel in "${wheels[@]}"; do python3 -m zipfile -e "$wheel" "$site" || return; done   # no pip: a pure wheel is a zip
    fi
    cp -r ris_fast "$site/" && cp -r kernels "$site/ris_fast/kernels"   # no build: a GPU needs no C++ kernel, and seconds count
}

install || exit
python3 -m bench.gpu.run
