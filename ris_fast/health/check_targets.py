"""Preflight of dense targets against their own labels: R is made of the scene's sources, by the array of the task.

Legend: B batch, N RIS elements, K sources (padded).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterator

import torch
from torch import Tensor

from ris_fast.data.fit_array import Labels, fit_array, fit_of, fits_of
from ris_fast.data.npz_load import APART
from ris_fast.health.finding import Finding
from ris_fast.health.pairing import belonging, with_factor
from ris_fast.health.subject import FEWEST, Subject
from ris_fast.physics.array import RISArray
from ris_fast.physics.pairs import conj

LOOSE = 0.02               # mean NMSE above which the array itself is in doubt; element jitter of 0.05 reaches 0.008
FITS = 0.05                # NMSE of one R on sources that are its own, where elements moved
BETTER = 0.3               # of the NMSE as read: what an explanation has to reach
EXAMINED, TRIED = 256, 8  # scenes; of these, with the sources of every other


def targets(subject: Subject) -> Iterator[Finding]:
    """The NMSE of every R on its own sources, as the reader measured it, and where it is bad, why."""
    source = subject.trainer.source
    if not hasattr(source, "target_fit"):          # targets are made from their sources there
        return
    fits = {split: source.target_fit(split) for split in ("train", "val")}
    subject.note = f"NMSE median {float(fits['train'].median()):.2g}, largest {max(float(fit.max()) for fit in fits.values()):.2g}"
    for split, fit in fits.items():
        apart = fit > APART
        if float(fit.mean()) > LOOSE or int(apart.sum()) >= max(FEWEST, 0.01 * len(fit)):
            finding = _explained(subject, split, fit, apart)
            if finding is not None:
                yield finding
                return


def _explained(subject: Subject, split: str, fit: Tensor, apart: Tensor) -> Finding | None:
    """Why R does not fit: by an explanation that makes it fit, or by what it fits instead."""
    source, task = subject.trainer.source, subject.config.task
    everywhere = Labels.of(*source.labels(split, _spread(torch.arange(len(fit)))))
    if not bool(apart.any()):
        return _other_array(task, everywhere, every_size=True)
    rows, array = _spread(apart.nonzero()[:, 0]), RISArray.of(task)
    labels = Labels.of(*source.labels(split, rows))
    now = float(fit_of(array, labels).median())
    seen = (f"in {int(apart.sum())} of {len(fit)} {split} scenes R is not made of the scene's own sources: NMSE of R on them {now:.2g} "
            f"at the median, {float(fit.max()):.2g} at most")
    for cause, how, other in _alternatives(source, split, rows, labels):
        then = float(fit_of(array, other).median())
        if then < min(APART, BETTER * now):
            return Finding(cause, f"{seen}; {how} it is {then:.2g}.")
    return (_other_array(task, everywhere, every_size=False) or _other_rows(subject, split, rows, labels, seen)
            or _other_array(task, everywhere, every_size=True))


def _spread(rows: Tensor) -> Tensor:
    """Some of these, at even distances."""
    return rows[torch.linspace(0, len(rows) - 1, min(EXAMINED, len(rows))).long()]


def _alternatives(source: Any, split: str, rows: Tensor, labels: Labels) -> Iterator[tuple[str, str, Labels]]:
    """Mistakes that would explain the misfit, each undone."""
    yield "conjugation_error", "with the conjugate of R", replace(labels, covariance=conj(labels.covariance))
    yield ("wrong_layout", "with azimuth and elevation exchanged",
           replace(labels, azimuth=labels.elevation, elevation=labels.azimuth))
    for step in (1, -1):
        neighbours = source.labels(split, (rows + step) % source.size(split))[2]
        yield ("shuffled_labels", f"with the R of the scene {'after' if step == 1 else 'before'} it", replace(labels, covariance=neighbours))


def _other_array(task: Any, labels: Labels, *, every_size: bool) -> Finding | None:
    """The settings of the task that are not the files', by the array that fits them."""
    own = RISArray.of(task)
    now, found = float(fit_of(own, labels).mean()), fit_array(own, labels, every_size=every_size)
    if found is None or now < LOOSE:
        return None
    array, layout = found.array, found.layout
    values = {"ris_horizontal": array.horizontal, "ris_vertical": array.vertical, "wavelength_m": array.wavelength_m,
              "spacing_wavelengths": found.spacing_wavelengths, "wavefront": array.wavefront}
    other = {name: value for name, value in values.items() if _differs(value, getattr(task, name))}
    fits = " and ".join(f"task.{name} = {_short(value)}" for name, value in other.items())
    said = " and ".join(_short(getattr(task, name)) for name in other)
    order = "the elements numbered with the vertical index fastest" if layout.vertical_fastest else ""
    evidence = (f"{' and '.join(filter(None, (fits, order)))} {'fits' if len(other) + bool(order) == 1 else 'fit'} these files "
                f"(NMSE of R on its own sources {found.fit:.2g}); {f'the task says {said}' if said else 'the reader takes the horizontal one'} "
                f"({now:.2g}).")
    if order:
        return Finding("wrong_layout", evidence, advice="Write y, H_full, codes and R with the horizontal index fastest (n = j N_H + i)."
                       + (f" Then {_settings(other)}." if other else ""))
    return Finding("task_differs", evidence, advice=f"{_settings(other).capitalize()}.")


def _differs(value: Any, own: Any) -> bool:
    return abs(value - own) > 1e-9 * abs(own) if isinstance(value, float) else value != own


def _short(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _settings(values: dict[str, Any]) -> str:
    return "give " + " ".join(f"--set task.{name}={_short(value)}" for name, value in values.items())


def _other_rows(subject: Subject, split: str, rows: Tensor, labels: Labels, seen: str) -> Finding | None:
    """R or the positions are another scene's: by a scene whose positions fit, or by snapshots that R does not fit either."""
    array = RISArray.of(subject.config.task)
    hits = _fitting(array, labels)
    # The same with mirrored positions, which are nobody's: what a small array lets fit by chance.
    apart = hits > 0.25 + _fitting(array, replace(labels, azimuth=-labels.azimuth, elevation=-labels.elevation))
    scenes, whose = with_factor(subject.trainer.source.batch(split, rows)), "R or the positions belong"
    if scenes.channel is not None:
        found = belonging(scenes, subject.config.task.symbols == "static")
        apart, whose = apart or found.mixed_up, "R belongs" if found.mixed_up else "R belongs to its snapshots, and the positions (ptr) belong"
    how = f", and {hits:.0%} of some of them fit the positions of another scene" if hits > 0.25 else ""
    return Finding("shuffled_labels", f"{seen}{how}: {whose} to another scene.") if apart else None


def _fitting(array: RISArray, labels: Labels) -> float:
    """Share of some scenes whose R is made of the sources of any of the others."""
    few = range(min(TRIED, len(labels.covariance)))
    pairs = (fits_of(array, replace(labels, covariance=labels.covariance[row].expand_as(labels.covariance))) for row in few)
    return sum(float(torch.stack(each).min()) < FITS for each in pairs) / len(few)


CHECKS = {"targets are made of their own sources": targets}
