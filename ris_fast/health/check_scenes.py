"""Preflight of the scenes: repeated, stale, empty, mixed up or not the physics that they claim to be.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Callable, Iterator

import torch
from torch import Tensor

from ris_fast.data.fingerprints import find_overlap, scene_hashes
from ris_fast.data.shards import verify_manifest
from ris_fast.health.finding import Finding
from ris_fast.health.subject import FEWEST, Subject
from ris_fast.physics.channel import sense
from ris_fast.physics.pairs import conj, to_complex
from ris_fast.physics.scenes import Scenes
from ris_fast.training.telemetry import prints

EXPLAINED = 0.8            # of the explained energy that the SNR promises; mixed-up scenes reach a few per cent
COMPARED = 64
HASHED = 4096
FEW = 4                    # of the first scenes, one in so many may be copies of others in the data; a batch that comes again is more


def _all(subject: Subject) -> Scenes:
    return Scenes.concatenate([scenes for group in subject.groups for scenes in group])


def finite(subject: Subject) -> Iterator[Finding]:
    """No scene carries NaN or infinity."""
    for split, scenes in (("train", _all(subject)), ("val", subject.validation)):
        for name in ("snapshots", "channel", "factor", "covariance", "snr_db"):
            value = getattr(scenes, name)
            if value is None:
                continue
            bad = (~value.flatten(1).isfinite()).any(1) if value.dim() > 1 else ~value.isfinite()
            if bool(bad.any()):
                first = int(scenes.index[bad][0])
                yield Finding("nonfinite_data", f"{int(bad.sum())} of {scenes.batch} {split} scenes have a {name} that is not "
                              f"finite, first scene {first}.")
                return


def distinct(subject: Subject) -> Iterator[Finding]:
    """No scene of the first steps is there twice, none is empty, and inputs and targets differ between scenes."""
    yield from _filled("training", _all(subject))
    yield from _filled("validation", subject.validation)
    yield from _repeats(subject, _all(subject))


def _filled(what: str, scenes: Scenes) -> Iterator[Finding]:
    """No scene is empty, and not all have one target."""
    empty = (scenes.snapshots.flatten(1) == 0).all(1)
    if scenes.channel is not None:
        empty |= (scenes.channel.flatten(1) == 0).all(1)
    if bool(empty.any()) and not bool(empty.all()):
        yield Finding("empty_cache_slot", f"{int(empty.sum())} of the first {scenes.batch} {what} scenes have snapshots or a channel "
                      f"of zeros, first scene {int(scenes.index[empty][0])}.")
    target = scenes.factor if scenes.factor is not None else scenes.covariance
    if scenes.batch > 2 and bool((target == target[:1]).all()):
        yield Finding("constant_targets", f"all of the first {scenes.batch} {what} scenes have the same target.")


def _repeats(subject: Subject, scenes: Scenes) -> Iterator[Finding]:
    hashes = prints(scenes.snapshots)[~(scenes.snapshots.flatten(1) == 0).all(1)]
    different = len(hashes.unique())
    first = subject.groups[0]
    batch = [prints(each.snapshots) for each in first]
    again = len(hashes) - different
    if 0 < again <= len(hashes) // FEW and _copies(scenes) and not _other_labels(scenes):
        subject.note = f"{again} of the first {len(hashes)} scenes are copies of others in the data, under numbers of their own"
        return
    if again < max(1, len(hashes) // 100):
        return
    seen = f"the first {len(subject.groups)} steps serve {len(hashes)} scenes, of which {different} are different"
    if _other_labels(scenes):
        yield Finding("stale_cache", f"{seen}, and the targets of equal snapshots differ: snapshots are left from an earlier "
                      f"batch.")
        return
    if len(batch[0]) > 1 and all(len(each.unique()) == 1 for each in batch if len(each) > 1):
        yield Finding("constant_input", f"{seen}: every scene of a batch shows the same snapshots.")
    elif len(first) > 1 and all(torch.equal(each.sort()[0], batch[0].sort()[0]) for each in batch if len(each) == len(batch[0])):
        yield Finding("rank_sees_other_data" if len(torch.cat([prints(g[0].snapshots) for g in subject.groups]).unique())
                      > len(batch[0]) else "repeated_batch", f"{seen}: all {len(first)} parts of a step have the same scenes.")
    else:
        yield Finding("repeated_batch", f"{seen}: batches come again.")


def _copies(scenes: Scenes) -> bool:
    """Whether equal scenes have numbers of their own: the data hold them twice, and each number is served once."""
    return len(scenes.index.unique()) == scenes.batch


def _other_labels(scenes: Scenes) -> bool:
    """Whether some scenes with the same snapshots have other targets."""
    target = prints(scenes.factor if scenes.factor is not None else scenes.covariance)
    pairs = torch.stack([prints(scenes.snapshots), target], 1)
    full = len(pairs.unique(dim=0)) - len(pairs[:, 0].unique())
    return full > len(pairs) // 50 and len(target.unique()) > len(pairs[:, 0].unique())


def splits(subject: Subject) -> Iterator[Finding]:
    """No validation scene is a training scene, by the bytes of its snapshots."""
    source = subject.trainer.source

    def hashes(split: str, most: int) -> list[bytes]:
        index = torch.arange(min(most, source.size(split)))
        return [value for part in index.split(512) for value in scene_hashes(source.batch(split, part).snapshots)]
    overlap = find_overlap("train", hashes("train", HASHED), "val", hashes("val", 256))
    if overlap.count:
        yield Finding("split_overlap", f"{overlap}.")


def manifest(subject: Subject) -> Iterator[Finding]:
    """What training reads of a data set has the statistics that its manifest promises; nothing to compare in a simulation."""
    wrong = verify_manifest(subject.trainer.source, contents=False)
    if wrong:
        yield Finding("manifest_differs", f"{wrong[0]}{f' ({len(wrong) - 1} more differences)' if len(wrong) > 1 else ''}.")


# ---- the physics ----------------------------------------------------------------------------------------------------


def explained(snapshots: Tensor, channel: Tensor, codes: Tensor, factor: Tensor, static: bool) -> Tensor:
    """Share of each scene's energy that the best amplitudes of its sources explain: (B,) in [0, 1], 1 without noise.

    Model: y_l = H (c_l o A s_l), least squares in s, one for all snapshots where the symbols are static.
    """
    columns = torch.stack([to_complex(sense(channel, codes, factor[:, :, k])) for k in range(factor.shape[2])], -1)
    y = to_complex(snapshots)
    if static:
        columns, y = columns.flatten(1, 2)[:, None], y.flatten(1)[:, None]
    used = columns.abs().square().sum(-2, keepdim=True)
    q, r = torch.linalg.qr(torch.where(used > 0, columns / used.clamp_min(1e-30).sqrt(), 0))
    keep = torch.diagonal(r, dim1=-2, dim2=-1).abs() > 1e-4
    part = (q.conj().transpose(-1, -2) @ y[..., None]).squeeze(-1)
    return (part.abs().square() * keep).sum((1, 2)) / y.abs().square().sum((1, 2)).clamp_min(1e-30)


def promised(scenes: Scenes) -> Tensor:
    """The share of signal in the snapshots at the scenes' SNR: (B,)."""
    ratio = 10.0 ** (scenes.snr_db / 10.0)
    return ratio / (1.0 + ratio)


def physics(subject: Subject) -> Iterator[Finding]:
    """Snapshots, channel and target of one scene belong together, where the run trains and where it validates."""
    last = subject.groups[-1][0]
    finding = None
    for what, whole in (("training", last if last.batch >= FEWEST else _all(subject)), ("validation", subject.validation)):
        finding = finding or _together(subject, what, whole)
    if finding is not None:
        yield finding


def _together(subject: Subject, what: str, whole: Scenes) -> Finding | None:
    """What is wrong with how the parts of `whole` are paired; None where nothing is."""
    if whole.channel is None or whole.factor is None or whole.batch < FEWEST:
        return None
    scenes, static = whole[:COMPARED], subject.config.task.symbols == "static"
    score = _score(scenes, static)
    if not score < EXPLAINED:
        return None
    seen = (f"in the {what} scenes, the sources of a scene explain {score:.0%} of what the SNR promises of its snapshots"
            f"{'; in the training scenes they do' if what == 'validation' else ''}")
    for cause, how, alternative in _alternatives(scenes):
        if _score(alternative, static) > max(EXPLAINED, 1.2 * score):
            return Finding(cause, f"{seen}, and {_score(alternative, static):.0%} {how}.")
    return Finding(_unpaired(scenes, static), f"{seen}: snapshots, channel and target do not belong together.")


def _score(scenes: Scenes, static: bool) -> float:
    """1 where scenes are what they claim to be, about 0 where they are mixed up."""
    share = explained(scenes.snapshots, scenes.channel, scenes.codes, scenes.factor, static)
    return float(share.sum() / promised(scenes).sum())


def _alternatives(scenes: Scenes) -> Iterator[tuple[str, str, Scenes]]:
    """Mistakes that would explain the mismatch, each undone."""
    def snapshots(change: Callable[[Tensor], Tensor]) -> Scenes:
        return replace(scenes, snapshots=change(scenes.snapshots))

    length, antennas = scenes.snapshots.shape[1:3]
    yield "conjugation_error", "with the conjugate of the target", replace(scenes, factor=conj(scenes.factor))
    yield "wrong_layout", "with real and imaginary parts of the snapshots swapped", snapshots(lambda y: y.flip(-1))
    yield "wrong_layout", "with the conjugate of the snapshots", snapshots(conj)
    yield "wrong_layout", "with real and imaginary parts of the channel swapped", replace(scenes, channel=scenes.channel.flip(-1))
    yield "wrong_layout", "with snapshots and antennas read in the other order", snapshots(
        lambda y: y.reshape(-1, antennas, length, 2).transpose(1, 2))
    yield "wrong_layout", "with real and imaginary parts in planes", snapshots(
        lambda y: y.reshape(y.shape[0], 2, length, antennas).permute(0, 2, 3, 1).contiguous())
    for step in (1, -1):
        for cause, names in (("mismatched_channel", ("channel",)), ("stale_cache", ("snapshots",)),
                             ("shuffled_labels", ("factor",))):
            yield cause, f"with the {names[0]} of the scene {'after' if step == 1 else 'before'} it", replace(
                scenes, **{name: getattr(scenes, name).roll(step, 0) for name in names})


def _unpaired(scenes: Scenes, static: bool) -> str:
    """Which of the three is in the wrong order: the pair that still fits when every scene is tried against every other."""
    few = scenes[:24]
    count = few.batch
    left, right = (index.flatten() for index in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"))
    threshold = EXPLAINED * promised(few)[left]

    def fits(names: tuple[str, ...]) -> bool:
        """Whether most scenes fit with another scene's `names`."""
        taken = {name: getattr(few, name)[right if name in names else left] for name in ("snapshots", "channel", "factor")}
        share = explained(taken["snapshots"], taken["channel"], few.codes, taken["factor"], static)
        return float((share > threshold).view(count, count).any(1).float().mean()) > 0.7
    for cause, name in (("shuffled_labels", "factor"), ("mismatched_channel", "channel"), ("stale_cache", "snapshots")):
        if fits((name,)):
            return cause
    return "wrong_layout"


CHECKS = {"scenes are finite": finite, "scenes differ": distinct, "validation shares no scene with training": splits,
          "scenes are those of their manifest": manifest,
          "snapshots, channel and target belong together": physics}
