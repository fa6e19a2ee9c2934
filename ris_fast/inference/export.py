"""The network of a run as a file for other programs: a torch.export program, an ONNX model, or its weights alone.

What is written has been read back and compared with the run on scenes of the run's own source; nothing else is.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns, K sources.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast import __version__, exit_codes
from ris_fast.config.load import render_toml
from ris_fast.config.schema import ConfigError
from ris_fast.config.spelling import did_you_mean
from ris_fast.config.user_code import short_reference
from ris_fast.data.open_source import open_source
from ris_fast.data.source import SceneSource
from ris_fast.files import check_writable, replacing, save_tensors
from ris_fast.inference.opened_run import OpenedRun, open_run
from ris_fast.inference.operators import NAMESPACE, PlainForms, foreign, operators_called
from ris_fast.models import Prediction
from ris_fast.physics.real_complex import to_pairs
from ris_fast.physics.scenes import Scenes
from ris_fast.streams import stage
from ris_fast.training.resume import sources
from ris_fast.training.step import network_inputs
from ris_fast.training.validation import scene_nmse

ENDINGS = {"torch-export": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
INPUTS = ("snapshots", "channel", "codes", "snr_db")
META = "ris_fast.json"  # name of the metadata in a .pt2
EXAMPLE, CHUNK, SCENES = 8, 64, 200  # scenes that are traced; that are compared at a time, and in all
CLOSE = 1e-3  # relative difference of a factor, above which a scene counts as another answer
FEW = 0.02  # share of scenes that may: a pursuit chooses, and rounding decides where two choices are equally good
SAME_NMSE = 0.01  # relative difference of the mean NMSE
MOST_BYTES = 2**31 - 2**20  # of one ONNX file
CONVENTIONS = (
    "float32; complex arrays are real pairs (re, im) in a last axis of 2; snapshots (B, L, M, 2) and channel"
    " (B, M, N, 2) in any unit, codes (L, N, 2) or (B, L, N, 2) of rms 1, snr_db (B,) in dB; the covariance is"
    " factor factor^H up to its scale, factor (B, N, Q, 2)"
)
NOT_IN_ONNX = {"pursuit_features": "the matching pursuit: eliminations of up to 45 unknowns at every step"}
Call = Callable[..., tuple[Tensor, ...]]


class ExportError(ValueError):
    """A network that cannot be written in the format, or whose file answers otherwise than the run. Exit code 3."""

    exit_code = exit_codes.DATA


class Answers(nn.Module):
    """A network whose answer is a plain tuple of tensors, the factor first, as real pairs in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> tuple[Tensor, ...]:
        answer = self.network(snapshots, channel, codes, snr_db)
        prediction = answer if isinstance(answer, Prediction) else Prediction(answer)
        factor = to_pairs(prediction.factor).float()
        return factor, *(each.float() for each in prediction[1:] if each is not None)

    def names(self, inputs: tuple[Tensor, ...]) -> tuple[str, ...]:
        """Of the outputs, as in `Prediction`."""
        with torch.no_grad():
            answer = self.network(*inputs)
        prediction = answer if isinstance(answer, Prediction) else Prediction(answer)
        return tuple(name for name, value in prediction._asdict().items() if value is not None)


@dataclass(frozen=True)
class Agreement:
    """How far the file's answers are from the run's. `apart`: share of scenes that differ by more than CLOSE."""

    split: str
    scenes: int
    largest: float  # relative difference of a scene, |F' - F| / |F|, of whichever output differs most
    median: float
    apart: float
    nmse: float  # mean, of the run
    nmse_of_file: float

    @property
    def holds(self) -> bool:
        near = abs(self.nmse_of_file - self.nmse) <= SAME_NMSE * self.nmse  # False for NaN
        return self.apart <= FEW and near

    def text(self) -> str:
        return (
            f"NMSE {self.nmse_of_file:.6f}, of the run {self.nmse:.6f}; answers differ by {self.median:.1e} (median) to"
            f" {self.largest:.1e}, more than {CLOSE:g} in {self.apart:.1%} of {self.scenes} {self.split} scenes"
        )


@dataclass(frozen=True)
class Job:
    """What one export needs. `about`: what the file says of itself, to which the format adds; `compare`: a file's
    answers with the run's."""

    opened: OpenedRun
    model: Answers
    inputs: tuple[Tensor, ...]
    out: Path
    about: dict[str, Any]
    compare: Callable[[Call], Agreement]
    portable: bool


def export_run(
    run: str | Path, form: str, out: str | Path, *, portable: bool = False, scenes: int = SCENES
) -> dict[str, Any]:
    """Writes the network of a run to `out` after comparing the file's answers with the run's; a file that was there is
    replaced whole, or stays.

    Args: run: a run folder or one checkpoint; form: 'torch-export', 'onnx' or 'safetensors'; portable: a torch-export
        program without operators of ris-fast, which runs where it is not installed; scenes: how many to compare on.
    Returns: the metadata of the file, with `out`, `bytes`, and under `agreement` what was compared.
    Raises: ConfigError for what is asked, ExportError where the network cannot be written or the answers differ,
        StorageError.
    """
    out = Path(out)
    _check(form, out, portable, scenes)
    opened = open_run(run)
    if opened.folder.resolve() in out.resolve().parents and out.resolve().parent != opened.folder.resolve():
        raise ConfigError(f"export: --out {out} is among the run's own files. Write outside of {opened.folder}.")
    model, source = Answers(opened.network()).eval(), open_source(opened.config, "cpu")
    split = "test" if source.size("test") else "val"
    batch = source.batch(split, torch.arange(min(EXAMPLE, source.size(split)), device=source.index_device))
    inputs = tuple(each.contiguous() for each in network_inputs(batch))
    called = operators_called(model, inputs)
    if form == "onnx":
        _check_onnx(called)
    check_writable(out)
    about = _about(opened, form, model.names(inputs), inputs)
    stage(f"exporting: {form}")
    write = {"torch-export": _torch_export, "onnx": _onnx, "safetensors": _safetensors}[form]
    compare = partial(_compare, model, source=source, split=split, scenes=scenes)
    return write(Job(opened, model, inputs, out, about, compare, portable))


def _check(form: str, out: Path, portable: bool, scenes: int) -> None:
    if form not in ENDINGS:
        raise ConfigError(f"export: there is no format '{form}'.{did_you_mean(form, ENDINGS)}")
    if out.suffix != ENDINGS[form]:
        raise ConfigError(f"export: --out is {out}; expected a name that ends in {ENDINGS[form]} for --format {form}.")
    if portable and form != "torch-export":
        raise ConfigError(f"export: --portable is for --format torch-export; {form} needs no ris-fast. Leave it out.")
    if scenes < 1:
        raise ConfigError(f"export: --scenes {scenes} asked for. Give --scenes 1 or more.")


def _check_onnx(called: set[str]) -> None:
    """Before minutes of work. Raises: ConfigError, ExportError."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ConfigError(f"export: --format onnx needs {', '.join(missing)}. Run: pip install 'ris-fast[onnx]'")
    for name, what in NOT_IN_ONNX.items():
        if f"{NAMESPACE}.{name}" in called:
            raise ExportError(
                f"export: ONNX cannot express {NAMESPACE}::{name}, which this network calls ({what}). Nothing was"
                " written. Use --format torch-export --portable, which runs wherever torch does."
            )


def _about(opened: OpenedRun, form: str, outputs: tuple[str, ...], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """What a file says of itself."""
    config = opened.config
    return {
        "made_by": f"ris-fast {__version__} export",
        "format": form,
        "model": short_reference(config.model.name),
        "sources": sources(config),
        "options": dict(config.model.options),
        "checkpoint": opened.checkpoint,
        "weights": opened.kind,
        "epoch": opened.epoch,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
        "conventions": CONVENTIONS,
        "inputs": {name: ["B" if _has_batch(i, x) else len(x), *x.shape[1:]] for i, (name, x) in _named(inputs)},
        "outputs": list(outputs),
        "settings": render_toml(config),
    }


def _named(inputs: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[str, Tensor]]]:
    return enumerate(zip(INPUTS, inputs))


def _has_batch(position: int, value: Tensor) -> bool:
    """Whether the first axis is the batch: of all but the codes that all scenes share."""
    return INPUTS[position] != "codes" or value.dim() == 4


@torch.no_grad()
def _compare(model: Answers, call: Call, source: SceneSource, split: str, scenes: int) -> Agreement:
    """On the first scenes of a split, in batches of one, of three and of as many as fit. Raises: ExportError."""
    scenes, apart, ours, theirs, start = min(scenes, source.size(split)), [], [], [], 0
    for size in (1, 3, *[CHUNK] * scenes):
        if start >= scenes:
            break
        stage(f"comparing with the run: {start} of {scenes} scenes")
        index = torch.arange(start, min(scenes, start + size), device=source.index_device)
        batch, start = source.batch(split, index), start + len(index)
        inputs = tuple(each.contiguous() for each in network_inputs(batch))
        expected = model(*inputs)
        try:
            found = call(*inputs)
        except Exception as error:  # of whatever runtime
            raise ExportError(
                f"export: what was exported does not run on a batch of {len(index)} scenes: {_first_line(error)}"
                " Nothing was written. Check that the network reads the number of scenes from its inputs."
            ) from error
        apart.append(torch.stack([_difference(a, b) for a, b in zip(found, expected, strict=True)]).amax(0))
        ours.append(_nmse(expected[0], batch))
        theirs.append(_nmse(found[0], batch))
    differences = torch.cat(apart).nan_to_num(nan=torch.inf)
    agreement = Agreement(
        split=split,
        scenes=scenes,
        largest=float(differences.max()),
        median=float(differences.median()),
        apart=float((differences > CLOSE).double().mean()),
        nmse=float(torch.cat(ours).mean()),
        nmse_of_file=float(torch.cat(theirs).mean()),
    )
    if not agreement.holds:
        raise ExportError(
            f"export: what was exported answers otherwise than the run: {agreement.text()}. Nothing was written. Check"
            " the network for randomness or branches on the values of its inputs, or use --format safetensors."
        )
    return agreement


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    """|F' - F| / |F| of each scene: (B,)."""
    size = expected.double().flatten(1).norm(dim=1).clamp_min(1e-30)
    return (found.double() - expected.double()).flatten(1).norm(dim=1) / size


def _nmse(factor: Tensor, scenes: Scenes) -> Tensor:
    return scene_nmse(Prediction(factor.contiguous()), scenes).double()


# ---- the formats ----------------------------------------------------------------------------------------------------


def _traced(model: Answers, inputs: tuple[Tensor, ...], plain: bool) -> torch.export.ExportedProgram:
    """The graph of the network, for any batch size. Raises: ExportError."""
    batch = torch.export.Dim("batch", min=1)
    sizes = {name: {0: batch} if _has_batch(i, x) else {} for i, (name, x) in _named(inputs)}
    try:
        with torch.no_grad(), _quiet():
            with PlainForms() if plain else nullcontext():
                program = torch.export.export(model, inputs, dynamic_shapes=sizes, strict=False)
            nested = len(_graphs(program)) > 1  # regions of autocast, which torch 2.13 saves and cannot load again
            return program.run_decompositions({}) if nested else program
    except Exception as error:  # torch.export has no common class for what it cannot trace
        raise ExportError(
            f"export: torch.export cannot trace this network for any batch size: {_first_line(error)} Nothing was"
            " written. Take Python branches on values and fixed batch sizes out of forward, or use --format"
            " safetensors."
        ) from error


def _graphs(program: torch.export.ExportedProgram) -> list[torch.fx.Graph]:
    return [each.graph for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]


def _torch_export(job: Job) -> dict[str, Any]:
    program = _traced(job.model, job.inputs, job.portable)
    called = foreign(node.target for graph in _graphs(program) for node in graph.nodes)
    needed = {name.partition(".")[0] for name in called}
    job.about["needs"] = [f"import {NAMESPACE}.inference.operators"] * (NAMESPACE in needed)
    job.about["needs"] += [f"the operators {name}::*" for name in sorted(needed - {NAMESPACE})]
    loaded = torch.export.load(io.BytesIO(_saved(program, job.about)))
    job.about["agreement"] = vars(job.compare(loaded.module()))
    return _written(job.out, _saved(program, job.about), job.about)


def _saved(program: torch.export.ExportedProgram, about: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files={META: json.dumps(about)})
    return buffer.getvalue()


def _onnx(job: Job) -> dict[str, Any]:
    import onnxruntime

    program = _traced(job.model, job.inputs, True)
    try:
        with _quiet():
            proto = torch.onnx.export(
                program, (), dynamo=True, verbose=False, output_names=job.about["outputs"]
            ).model_proto
    except Exception as error:
        cause = _last_line(error)
        todo = "Work with real pairs in place of complex numbers, or use" if "complex" in cause else "Use"
        raise ExportError(
            f"export: ONNX cannot express this network: {cause} Nothing was written. {todo} --format torch-export."
        ) from error
    if proto.ByteSize() > MOST_BYTES:
        raise ExportError(f"export: {proto.ByteSize():,} bytes are more than one ONNX file holds. Use torch-export.")
    job.about["opset"] = max(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = [each.name for each in session.get_inputs()]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        named = {name: value.numpy() for name, value in zip(INPUTS, given) if name in taken}
        return tuple(torch.from_numpy(each) for each in session.run(job.about["outputs"], named))

    job.about["agreement"] = vars(job.compare(call))
    for key, value in job.about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    return _written(job.out, proto.SerializeToString(), job.about)


def _safetensors(job: Job) -> dict[str, Any]:
    from safetensors.torch import load, save

    weights = {name: value.detach().clone().contiguous() for name, value in job.model.network.state_dict().items()}
    again = Answers(job.opened.network())
    again.network.load_state_dict(load(save(weights)))
    job.about["agreement"] = vars(job.compare(again.eval()))
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in job.about.items()}
    return job.about | {"out": str(job.out), "bytes": save_tensors(job.out, weights, texts)}


def _written(out: Path, content: bytes, about: dict[str, Any]) -> dict[str, Any]:
    with replacing(out) as partial:
        partial.write_bytes(content)
    return about | {"out": str(out), "bytes": len(content)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    """As a sentence."""
    said = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {said[0]}"[:300].rstrip(".") + "."


def _last_line(error: Exception) -> str:
    """The deepest cause, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return _first_line(error)
