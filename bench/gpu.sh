#!/usr/bin/env bash
# Every figure that needs a GPU, in one call of under ten minutes: tests, gradient checks, a whole training, benchmarks.
#
# Call, from the root of a checkout, on a machine with Python 3.12, torch 2.11, triton 3.6 and one GPU; no network needed:
#     bash bench/gpu.sh                      # into bench/results/gpu, or where $OUT says; at most eight files
#     RIS_FAST_GPU_SH_STAGES="train bench_step" bash bench/gpu.sh     # these stages alone; names below
#     RIS_FAST_GPU_SH_SECONDS=1700 bash bench/gpu.sh                  # more time than 570 s; stages then get three times theirs
#     RIS_FAST_GPU_SH_SMOKE=1 bash bench/gpu.sh                       # control flow with tiny sizes, on any machine
#
# Wheels to put into .whl (or $RIS_FAST_WHEELS) where the machine lacks the package; all pure Python but the last line:
#     cyclopts attrs docstring-parser rich rich-rst markdown-it-py mdurl pygments
#     pytest iniconfig packaging pluggy pytest-benchmark py-cpuinfo2 (or py-cpuinfo, as pytest-benchmark asks) nvidia-ml-py
#     setuptools (77 or newer, to build the package)
#     safetensors, and for the tests of random numbers scipy
# matplotlib is not needed: the run draws nothing. Without cmake and a C++ compiler the package installs without CPU kernels.
#
# A stage that fails or runs out of time is noted and the next one follows; benchmarks that were done by then are kept.
set -u
cd "$(dirname "$0")/.."
smoke=${RIS_FAST_GPU_SH_SMOKE:-0}
stages=${RIS_FAST_GPU_SH_STAGES:-env gradcheck tests train bench_step bench_training bench_simulation bench_fused_step bench_cov_nmse train_original}
budget=${RIS_FAST_GPU_SH_SECONDS:-570}
out=${OUT:-bench/results/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd)
rm -f "$out"/{env,gradcheck,bench,train-full,train-original}.json "$out/tests.log"   # of an earlier call
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site log=$out/stages.log table=$out/table.txt
: >"$log" >"$table"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1       # the checkout's ris_fast, which lacks ris_fast.kernels, stays out of the way
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
scale=$((budget > 900 ? 3 : 1))

# stage NAME SECONDS COMMAND...: runs it within its time and what is left of all time; its output goes to the log.
stage() {
    local name=$1 seconds=$(($2 * scale)) began=$SECONDS code
    local left=$((budget - SECONDS))
    shift 2
    if ((left < 10)); then
        printf '%-18s not run: out of time\n' "$name" | tee -a "$table"
        return 0
    fi
    printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
    timeout -s INT -k 15 $((seconds < left ? seconds : left)) "$@" >>"$log" 2>&1
    code=$?
    printf '%-18s %4d s  %s\n' "$name" $((SECONDS - began)) "$(said $code)" | tee -a "$table"
}

said() { case $1 in 0) echo done ;; 124 | 137) echo 'out of time' ;; *) echo "exit code $1" ;; esac; }

install() {
    local wheels=(${RIS_FAST_WHEELS:-.whl}/*.whl)
    if [[ -e ${wheels[0]} ]]; then
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "${wheels[@]}" ||
            for wheel in "${wheels[@]}"; do python3 -m zipfile -e "$wheel" "$site" || return; done   # no pip: a pure wheel is a zip
    fi
    local package=(-m pip install -q --no-index --no-build-isolation --no-deps --no-cache-dir --upgrade --target "$site" .)
    python3 "${package[@]}" || RIS_FAST_NO_NATIVE=1 python3 "${package[@]}" || by_hand
}

# Where the machine cannot build a package: its files, laid out as an installation would.
by_hand() {
    mkdir -p "$site" && cp -r ris_fast "$site/" && cp -r kernels "$site/ris_fast/kernels"
}

environment() {
    python3 -m ris_fast env --json >"$work/env.json" || return
    local asked=name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu
    smi "$asked,clocks_event_reasons.active" || smi "$asked" || echo "no nvidia-smi" >"$work/smi.csv"   # older drivers: throttle, not event
    python3 - "$work/env.json" "$work/smi.csv" "$out/env.json" <<'PY'
import json, sys
found = json.load(open(sys.argv[1]))
found["nvidia_smi"] = open(sys.argv[2]).read().strip()
json.dump(found, open(sys.argv[3], "w"), indent=1)
PY
}

smi() { nvidia-smi --format=csv,noheader --query-gpu="$1" >"$work/smi.csv"; }

gradcheck() { python3 -m ris_fast gradcheck --no-interpreter --json >"$out/gradcheck.json"; }

# What torch and its compiler have to say to their authors is no error here, as it is in the tests elsewhere.
quiet=(-W ignore::UserWarning -W ignore::FutureWarning -W ignore::DeprecationWarning -p no:cacheprovider -o addopts=--strict-markers)

tests() {
    local which=(tests/training/test_capture.py tests/training/optim/test_fused_adamw_gpu.py tests/data/test_source.py tests/gradcheck tests/kernels)
    python3 -c 'import scipy' 2>>"$log" || which+=(--ignore tests/kernels/test_philox.py)
    ((smoke)) && which=(tests/training/test_capture.py -k 'replayed or equals_eager')
    python3 -m pytest -q -rfEs --durations=10 "${quiet[@]}" "${which[@]}" >"$out/tests.log" 2>&1
}

# train PRESET SECONDS: summary and rows of one training, in one file.
train() {
    local run=$work/run-$1 small=(--max-seconds $(($2 * scale)))   # a schedule that ends within the stage
    ((smoke)) && small=(--device cpu --set data.train_scenes=1024 --set data.val_limit=64 --set model.options.width=64
        --set training.compile=false --set training.batch_size=256 --epochs 2 --precision fp32 --set health.preflight=false)
    python3 -m ris_fast train --preset "$1" --set report.plots=false --out "$run" "${small[@]}"
    local code=$?
    ((smoke && code == 4)) && code=0                            # two epochs teach it nothing: stalled, and run to its end
    python3 - "$run" >"$out/train-$1.json" <<'PY'
import json, sys
run = sys.argv[1]
rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
json.dump({"summary": json.load(open(f"{run}/summary.json")), "rows": rows}, sys.stdout, indent=1)
PY
    return $code
}

# bench NAME [pytest arguments]: one file of benchmarks, its figures into the work folder.
bench() {
    local name=$1
    shift
    ((smoke)) && set -- -k "$(smallest "$name")"
    python3 -m pytest -q "${quiet[@]}" "bench/test_$name.py" --benchmark-json="$work/bench-$name.json" "$@"
}

smallest() {
    case $1 in
        train_step) echo launches ;;
        training) echo 'phases and 64' ;;
        simulation) echo 'test_simulate and 64-1' ;;
        fused_step) echo 'host_time and 2]' ;;
        cov_nmse) echo '1-thread-low-rank-64-64' ;;
    esac
}

bench_step() { bench train_step -k 'not precisions'; }   # its cases have both precisions on a GPU
bench_training() { bench training -k 'rate or phases or efficiency'; }
bench_simulation() { bench simulation; }
bench_fused_step() { bench fused_step; }
bench_cov_nmse() { bench cov_nmse; }

# One bench.json out of those of the files, and the figures that a person looks for first.
gather() {
    python3 - "$work" "$out" >>"$table" <<'PY'
import glob, json, os, sys
work, out = sys.argv[1:]
read = lambda path: json.load(open(path)) if os.path.exists(path) and os.path.getsize(path) else None
parts = [part for part in map(read, sorted(glob.glob(f"{work}/bench-*.json"))) if part]
if parts:
    json.dump(parts[0] | {"benchmarks": [each for part in parts for each in part["benchmarks"]]}, open(f"{out}/bench.json", "w"), indent=1)
lines = []
environment, checks = (read(f"{out}/{name}") for name in ("env.json", "gradcheck.json"))
if environment:
    lines.append(f"machine            {environment['nvidia_smi']}; torch {environment['versions']['torch']}, triton {environment['versions']['triton']}")
if checks:
    lines.append(f"gradient checks    {sum(row['passed'] for row in checks['rows'])} of {len(checks['rows'])} passed")
if os.path.exists(f"{out}/tests.log"):
    lines.append(f"tests              {open(f'{out}/tests.log').read().strip().splitlines()[-1].strip('= ')}")
for preset in ("full", "original"):
    run = read(f"{out}/train-{preset}.json")
    if not run:
        continue
    summary, rows = run["summary"], run["rows"]
    scores = [(min(row[key] for key in ("val_nmse_raw", "val_nmse_ema") if row.get(key) is not None), row["seconds"]) for row in rows if row["event"] == "epoch"]
    reached = [f"{target} after {seconds:.1f} s" for target in (0.5, 0.35, 0.187, 0.03) for seconds in [next((s for score, s in scores if score <= target), None)] if seconds is not None]
    lines.append(f"train {preset:<12} {summary['verdict']}, {summary['seconds']:.1f} s, {summary['scenes_per_s']:,.0f} scenes/s, best NMSE {summary['best_val_nmse']}; {', '.join(reached) or 'no target reached'}")
    lines.append(f"                   {next((row.get('compile') for row in rows if row['event'] == 'start'), '')}")
for part in parts:
    for each in part["benchmarks"]:
        found = each["extra_info"]
        figures = found.get("times_slower_than_ours") or found.get("times_ours") or {row["batch_size"]: row["scenes_per_s"] for row in found.get("rows", [])} or {"scenes_per_s": found.get("scenes_per_s")}
        told = ", ".join(f"{key} {value:,.3g}" for key, value in figures.items() if isinstance(value, (int, float)))
        lines.append(f"{each['name']}: {told}" if told else each["name"])
print("\n".join(lines))
PY
}

export -f install by_hand environment smi gradcheck tests train bench smallest $(declare -F | awk '{print $3}' | grep '^bench_')
export smoke scale out work site log
quiet_words=${quiet[*]}
export quiet_words
run() { stage "$1" "$2" bash -c "set -u; read -ra quiet <<<\"\$quiet_words\"; $3"; }

run install 90 install
for name in $stages; do
    case $name in
        env) run env 30 environment ;;
        gradcheck) run gradcheck 90 gradcheck ;;
        tests) run tests 150 tests ;;
        train) run train 130 'train full 85' ;;
        train_original) run train_original 130 'train original 85' ;;
        bench_step) run bench_step 100 bench_step ;;
        bench_training) run bench_training 120 bench_training ;;
        bench_simulation | bench_fused_step | bench_cov_nmse) run "$name" 40 "$name" ;;
        *) echo "$name is no stage" | tee -a "$table" ;;
    esac
done
gather 2>>"$log"
find "$out" -type f -empty -delete
cat "$table"
