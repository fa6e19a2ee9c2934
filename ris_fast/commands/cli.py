"""The command line: the flags of every command and their help. Each command is a function in a file of its own.

Torch and matplotlib are imported by the commands that need them. The exit codes are those of `ris_fast.exit_codes`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from ris_fast import __version__
from ris_fast.commands.experiments import compare, track, tune
from ris_fast.commands.export import export
from ris_fast.commands.flags import (
    Against,
    BestDevice,
    Device,
    NoCompile,
    Preset,
    Seed,
    Settings,
    Whole,
    WholeOrAuto,
    WholeOrWord,
    absolute,
    alone,
    run_flags,
)
from ris_fast.commands.launch import check_restarts, restarts_allowed
from ris_fast.commands.new_model import new_model
from ris_fast.commands.runner import run
from ris_fast.config.load import load_config, render_toml
from ris_fast.config.schema import ConfigError
from ris_fast.environment import launched
from ris_fast.files import CONFIG
from ris_fast.streams import stage
from ris_fast.thread_policy import set_thread_policy

app = App(
    name="ris-fast",
    version=__version__,
    default_parameter=Parameter(negative=(), show_default=False),
    help="Covariance networks behind a reconfigurable intelligent surface, trained fast and watched closely.",
)


@app.command
def train(
    config: Path | None = None,
    /,
    *,
    preset: Preset = None,
    device: Device = None,
    data: Path | None = None,
    epochs: Whole = None,
    batch_size: WholeOrAuto = None,
    accumulate: Whole = None,
    seed: Seed = None,
    max_seconds: float | None = None,
    precision: str | None = None,
    no_compile: NoCompile = False,
    backend: str | None = None,
    set_: Settings = None,
    out: Path | None = None,
    resume: Path | None = None,
    init: Path | None = None,
    log_tensors: bool = False,
    anomaly: bool = False,
    profile: bool = False,
    print_config: bool = False,
) -> int:
    """Train a network; without arguments on scenes simulated on this machine's best device.

    Parameters
    ----------
    config
        TOML file with settings.
    data
        Folder of shards, ours or the original pipeline's .npz; without it scenes are simulated.
    epochs
        Epochs to train.
    batch_size
        Scenes in a micro-batch; auto: the largest that fits and is as fast as any, tried in under 20 seconds.
    accumulate
        Micro-batches in an optimizer step.
    max_seconds
        Anneal towards this many seconds and stop; 0: no limit.
    precision
        fp32, bf16, fp16, or auto: bf16 where it is measured to pay; the loss is always fp32.
    backend
        Kernels: auto (best available) or reference (plain torch).
    out
        Run folder; runs/DATE-TIME-PRESET by default.
    resume
        Continue the run in this folder, or from this checkpoint of it, with its own settings; flags and --set still
        win.
    init
        Start a new run from the weights of this run or checkpoint, of the same network, on whatever task and data are
        given here.
    log_tensors
        Write every tensor's norms at every step to tensors.csv and print a [GRAD] line at every report.
    anomaly
        Where gradients that are not finite end the run, replay its last step and name the operation and the term.
    profile
        Write a Chrome trace of a few steps into the run folder and print the ten slowest operations.
    print_config
        Print every value and where it came from, then stop.
    """
    flags = {
        **run_flags(device, data, seed, no_compile),
        "training.epochs": epochs,
        "training.batch_size": None if batch_size == "auto" else batch_size,
        "training.accumulate": accumulate,
        "training.max_seconds": max_seconds,
        "training.precision": precision,
        "training.backend": backend,
        "training.init": absolute(init),
        "health.log_tensors": True if log_tensors else None,
        "health.anomaly": True if anomaly else None,
    }
    check_restarts(out, resume)
    if batch_size == "auto" and launched():
        raise ConfigError(
            "--batch-size auto tries sizes in one process. Run it once without torchrun, and give the number it finds."
        )
    stage("loading torch")
    again = out if restarts_allowed() and resume is None and out is not None and (out / CONFIG).is_file() else None
    if again is not None:  # torchrun starts the run anew, or it was begun before: it has settings already
        from ris_fast.commands.run_folder import resumed_config

        resume, resolved = again, resumed_config(again, {}, set_ or (), flags)
    elif resume is not None:
        refused = {"CONFIG": config, "--preset": preset, "--out": out, "--init": init}
        from ris_fast.commands.run_folder import resumed_config

        resolved = resumed_config(resume, refused, set_ or (), flags)
    else:
        resolved = load_config(config, preset, set_ or (), flags)
    if batch_size == "auto":
        from ris_fast.training.batch_size import with_best_batch_size

        resolved = with_best_batch_size(resolved)
    if print_config:
        print(render_toml(resolved), end="")
        return 0
    from ris_fast.commands.train import run_training

    return run_training(resolved, out, resume=resume, profile=profile)


@app.command
def check(
    config: Path | None = None,
    /,
    *,
    preset: Preset = None,
    device: Device = None,
    data: Path | None = None,
    batch_size: Whole = None,
    seed: Seed = None,
    no_compile: NoCompile = False,
    set_: Settings = None,
    json: bool = False,
    graph: bool = False,
) -> int:
    """Check network, loss, step and scenes as `train` would use them, without training. Exit code 4: a mistake is
    certain.

    Parameters
    ----------
    config
        TOML file with settings, such as a run's config.toml.
    data
        Folder of shards; without it scenes are simulated.
    batch_size
        Scenes in a micro-batch.
    json
        Print JSON instead of lines.
    graph
        Show which parameters each term of the loss reaches, and with how much gradient.
    """
    stage("loading torch")
    from ris_fast.commands.check import check_command

    flags = {**run_flags(device, data, seed, no_compile), "training.batch_size": batch_size}
    return check_command(load_config(config, preset, set_ or (), flags), json=json, graph=graph)


@app.command
def why(run: Path | None = None, /, *, explain: str | None = None, every: bool = False, json: bool = False) -> int:
    """Why a run did not learn: the ranked cause, from its folder or from a plain metrics.jsonl.

    Parameters
    ----------
    run
        Run folder, or a file of JSON rows with train_loss and val_loss.
    explain
        Print the page on this cause instead.
    every
        Of a stalled run print every explanation that was looked at, one a line.
    json
        Print JSON instead of text.
    """
    from ris_fast.commands.why import why_command

    return why_command(run, explain=explain, json=json, every=every)


@app.command
def evaluate(
    run: Path,
    /,
    *others: Path,
    scenes: Whole = None,
    data: Path | None = None,
    device: BestDevice = "auto",
    method: str | None = None,
    count: WholeOrWord = None,
    no_positions: bool = False,
    opponents: bool = False,
    json: bool = False,
    csv: Path | None = None,
    plots: Path | None = None,
) -> int:
    """NMSE and positions of trained runs on the test scenes, by SNR, number of sources and range, beside the baselines
    and the bounds.

    Parameters
    ----------
    run
        Run folder, whose best checkpoint is meant, or one checkpoint, RUN/checkpoints/NAME.safetensors.
    others
        More runs, shown side by side with the first.
    scenes
        Test scenes to use; all of the run's by default.
    data
        Folder of another data set of the same task; the run's own by default.
    method
        How sources are found: likelihood (default), music, mvdr or pursuit, as `predict` does.
    count
        Sources in a scene: mdl (default), aic, evidence, network or a number.
    no_positions
        NMSE only.
    opponents
        Classical estimators on the same scenes as well: least squares, LMMSE, matching pursuit, maximum likelihood.
    json
        Print JSON instead of tables.
    csv
        Write every figure into this table, one row for each group and metric.
    plots
        Folder of the figures; RUN/plots of the first run by default.
    """
    unused = {"--method": method is not None, "--count": count is not None, "--opponents": opponents}
    if no_positions and any(unused.values()):
        given = ", ".join(flag for flag, there in unused.items() if there)
        raise ConfigError(f"evaluate: --no-positions leaves nothing for {given} to do. Leave one or the other out.")
    stage("loading torch")
    from ris_fast.commands.evaluate import Search, evaluate_command

    return evaluate_command(
        (run, *others),
        scenes=scenes,
        device=device,
        data=absolute(data),
        json=json,
        csv=csv,
        search=None if no_positions else Search(method, count, opponents),
        plots=plots,
    )


@app.command
def mismatch(
    run: Path,
    /,
    *others: Path,
    against: Against = None,
    data: list[Path] | None = None,
    scenes: Whole = None,
    device: BestDevice = "auto",
    json: bool = False,
    out: Path | None = None,
) -> int:
    """NMSE of runs on scenes that they were not trained on: each run on the test scenes of every run's task, and of
    tasks that differ in one setting.

    Parameters
    ----------
    run
        Run folder, whose best checkpoint is meant, or one checkpoint. Its task is the one that --against changes.
    others
        More runs, of the same array and number of snapshots.
    data
        Folder of a data set, of whatever task, whose test scenes are another row; may be given again.
    scenes
        Test scenes of each task; as many as the first run has by default, and all of a data set.
    json
        Print JSON instead of tables.
    out
        Write mismatch.json and mismatch.png into this folder.
    """
    stage("loading torch")
    from ris_fast.commands.mismatch import mismatch_command

    return mismatch_command(
        (run, *others), against=against or (), data=data or (), scenes=scenes, device=device, json=json, out=out
    )


@app.command
def predict(
    run: Path | None = None,
    /,
    *,
    data: Path | None = None,
    out: Path,
    predictions: Path | None = None,
    split: Literal["train", "val", "test"] | None = None,
    scenes: Whole = None,
    method: Literal["likelihood", "music", "mvdr", "pursuit"] | None = None,
    count: WholeOrWord = None,
    no_factor: bool = False,
    device: BestDevice = "auto",
    config: Path | None = None,
    set_: Settings = None,
) -> int:
    """Covariance, positions, powers and standard deviations of the sources in measured scenes, written to a file.

    Parameters
    ----------
    run
        Run folder, whose best checkpoint is meant, or one checkpoint, RUN/checkpoints/NAME.safetensors.
    data
        Measurements: a .npz or .safetensors file with snapshots, channel, codes and perhaps snr_db; or a folder.
    out
        File to write: .npz, .safetensors (a row for each scene) or .csv (a row for each source), by its ending.
    predictions
        Covariances from elsewhere in place of a network's: a .npz or .safetensors file with factor or covariance.
    split
        Scenes of a folder with splits; test by default.
    scenes
        Predict the first this many scenes; all by default.
    method
        likelihood (default): maximum likelihood on the measurement, ranges from their posterior in the task's limits;
        music or mvdr: the spectrum of the covariance; pursuit: the atoms of the matching pursuit.
    count
        Sources in a scene: a number; mdl (default), aic or evidence, by likelihood; network, as the network says.
    no_factor
        Leave the factors of the covariances out of the file.
    config
        TOML file whose [task] is that of --predictions, where there is no RUN.
    """
    stage("loading torch")
    from ris_fast.commands.predict import predict_command, task_of

    task = None if run is not None else task_of(config, data, set_ or ())
    if run is not None and (config is not None or set_):
        raise ConfigError("predict: a run has its own task for good. Leave --config and --set out.")
    return predict_command(
        run,
        task,
        data=data,
        out=out,
        predictions=predictions,
        split=split,
        scenes=scenes,
        method=method,
        count=count,
        factor=not no_factor,
        device=device,
    )


@app.command
def gradcheck(*, device: BestDevice = "auto", no_interpreter: bool = False, json: bool = False) -> int:
    """Check value and gradient of every kernel in every backend of this machine; exit code 1 where one is wrong.

    Parameters
    ----------
    no_interpreter
        Leave out the Triton kernels under Triton's interpreter, a good part of the one to two minutes that all takes on
        two cores.
    json
        Print JSON instead of a table.
    """
    stage("loading torch")
    from ris_fast.commands.gradcheck import gradcheck_command

    return gradcheck_command(device=device, interpreter=not no_interpreter, json=json)


@app.command
def bench(
    what: Literal["kernels", "step", "train"] | None = None, /, *, device: BestDevice = "auto", json: Path | None = None
) -> int:
    """Measure kernels, the optimizer step against its peers, and whole trainings on this machine; all three by default.

    Parameters
    ----------
    what
        kernels, step or train.
    json
        Write the figures with versions and commit to this file.
    """
    from ris_fast.commands.bench import bench_command

    return bench_command(what, device=device, json=json)


@app.command
def simulate(
    config: Path | None = None,
    /,
    *,
    out: Path | None = None,
    scenes: Whole = None,
    jobs: Whole = None,
    check: Path | None = None,
    preset: Preset = None,
    device: Device = None,
    seed: Whole = None,
    set_: Settings = None,
) -> int:
    """Write a data set of simulated scenes that `ris-fast train --data DIR` reads, or check one.

    Parameters
    ----------
    config
        TOML file with settings; [task], data.seed and training.device matter here.
    out
        Folder to write; it appears when the data set is whole, and the same command continues a broken one.
    scenes
        Training scenes; a quarter as many validation and a twentieth as many test scenes come with them.
    jobs
        Processes, each of which writes whole shards; on a CPU all cores where there is enough to do. The data set is
        the same to the last bit.
    check
        Check every byte, the statistics and the splits of this data set, and some of its scenes against the simulator;
        of an unfinished one, say what is there.
    seed
        Seed of the scenes.
    """
    stage("loading torch")
    from ris_fast.commands.simulate import check_set_command, simulate_command

    if check is not None:
        alone(
            "simulate", "--check", {"CONFIG": config, "--out": out, "--scenes": scenes, "--seed": seed, "--set": set_}
        )
        return check_set_command(check, jobs)
    resolved = load_config(config, preset, set_ or (), {"data.seed": seed, "training.device": device})
    return simulate_command(resolved, out, scenes, preset, jobs)


@app.command
def convert(
    *,
    data: Path,
    out: Path | None = None,
    map_: Annotated[Path | None, Parameter(name="--map")] = None,
    check: bool = False,
    new_map: Path | None = None,
    preset: Preset = None,
    set_: Settings = None,
) -> int:
    """Turn the original pipeline's .npz shards, or HDF5 and MATLAB files that a mapping explains, into a data set.

    Parameters
    ----------
    data
        File or folder to convert.
    out
        Folder to write; it appears when the data set is whole, and the same command continues a broken one.
    map_
        TOML file that says which array of HDF5 or .mat files is what, see docs/data.md.
    check
        Say what is understood of the first scenes and what would be written, and write nothing.
    new_map
        Write a mapping file to begin with, from the arrays of --data.
    """
    stage("loading torch")
    from ris_fast.commands.convert import convert_command

    return convert_command(data, out, mapping=map_, new_map=new_map, check=check, preset=preset, settings=set_ or ())


@app.command
def env(*, json: bool = False) -> int:
    """Versions, devices, and the backend that each kernel uses here, with the reason.

    Parameters
    ----------
    json
        Print JSON instead of a table.
    """
    from ris_fast.commands.env import env_command

    return env_command(json=json)


for command in (compare, export, new_model, track, tune):  # those with a file of their own for their flags
    app.command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; every expected error ends as a message on standard error and its exit code."""
    set_thread_policy()
    return run(app, list(sys.argv[1:] if arguments is None else arguments))
